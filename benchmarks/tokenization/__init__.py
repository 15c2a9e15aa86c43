"""Pairs to token ids: how fast, beside TRL's own preparation."""
