"""Metrics tables → one HTML page."""
