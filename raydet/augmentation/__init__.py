"""A decoded image and its boxes → what a model sees of them."""
