"""Annotations and images → an images table, cleaned and split."""
