"""Numbers of a run → the trackers that people watch."""
