"""The ledger: committed, damaged, killed, compacted, collected."""
