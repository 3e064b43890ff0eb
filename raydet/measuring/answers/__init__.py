"""Crops tables and the detections that they are about → answers beside detections, and images by their answers."""
