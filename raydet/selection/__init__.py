"""A detections table → images and objects chosen from it, as a table and a list."""
