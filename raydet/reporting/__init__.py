"""Metrics tables → HTML pages."""
