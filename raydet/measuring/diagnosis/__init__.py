"""Matches → tables of the error analysis."""
