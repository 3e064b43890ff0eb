"""Annotations and images → images tables, cleaned and split."""
