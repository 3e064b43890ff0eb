"""Images tables → a checkpoint."""
