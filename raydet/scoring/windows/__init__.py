"""Pictures of any size → their tiles as images to score; detections in tiles → one row per picture."""
