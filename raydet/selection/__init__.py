"""A detections table with embeddings → images and objects chosen from it, as a table and a list."""
