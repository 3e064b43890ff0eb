"""An images table → one HTML page about it."""
