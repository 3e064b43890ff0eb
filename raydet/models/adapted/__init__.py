"""A base model and folders with adapters → detectors that share the weights of the base."""
