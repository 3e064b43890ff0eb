"""A training config and a model → the optimizer, its learning-rate schedule, and a moving average of the weights."""
