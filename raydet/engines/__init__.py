"""A checkpoint and images → detections in memory."""
