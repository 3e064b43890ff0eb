"""A video file → the times of its frames, and the frames of any range of them, each an image."""
