"""Results and rows of tables → text and HTML for a Python prompt and for notebooks."""
