"""Vectors and thumbnails that a scoring run keeps ↔ further columns of its detections table."""
