"""Many short training runs → a trials table and the best checkpoint."""
