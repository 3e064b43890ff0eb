"""Foundations without dependencies on other packages: errors, console, progress, threads, signals, box arithmetic."""
