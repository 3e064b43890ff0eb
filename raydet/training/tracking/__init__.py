"""Metrics of a run → trackers."""
