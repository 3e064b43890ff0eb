"""Detections and their images → what a second model says about each: a class, an answer, a vector, a depth."""
