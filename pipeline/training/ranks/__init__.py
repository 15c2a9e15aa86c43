"""Training by several processes: torchrun, its ranks, and what becomes of their errors."""
