"""Matches → tables that say what goes wrong."""
