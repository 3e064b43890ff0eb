"""Images and a checkpoint → a detections table."""
