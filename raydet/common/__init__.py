"""Foundations without dependencies on other packages: errors, console, threads, signals, box arithmetic."""
