"""Training speed against TRL."""
