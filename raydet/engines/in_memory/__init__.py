"""A model for images in memory, without Ray: `raydet.load` and the detections that it returns."""
