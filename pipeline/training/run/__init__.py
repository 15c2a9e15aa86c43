"""Training itself: the model, the step, the loop and its checkpoints."""
