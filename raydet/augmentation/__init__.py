"""A decoded image and its boxes → model input."""
