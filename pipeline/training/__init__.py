"""Training policies over the cached tables."""
