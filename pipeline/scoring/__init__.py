"""Scoring: engines that compute log-probs, and the ledger that keeps them."""
