"""The library: preference pairs to log-prob tables, policies and implicit rewards."""
