"""Training: text, the step, checkpoints, and the loop that puts them together."""
