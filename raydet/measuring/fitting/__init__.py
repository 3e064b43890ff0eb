"""Detections and their truth → a detector's operating point: thresholds, calibrated scores, suppression."""
