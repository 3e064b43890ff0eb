"""An images table and its detections → images whose boxes are the detections that pass a threshold."""
