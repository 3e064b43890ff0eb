"""Training: images tables → a checkpoint."""
