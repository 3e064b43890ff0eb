"""Annotation formats, one per module → the same records."""
