"""The models that look at crops."""
