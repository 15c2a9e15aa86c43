"""What training reads: examples with their reference's log-probs, and their order."""
