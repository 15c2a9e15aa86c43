"""Scoring speed: this package's engines against TRL's reference precompute and plain vLLM."""
