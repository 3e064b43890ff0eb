"""Many short trainings → a trials table and the best checkpoint."""
