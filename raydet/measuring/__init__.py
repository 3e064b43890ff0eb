"""Truth and detections → COCO numbers and metrics tables."""
