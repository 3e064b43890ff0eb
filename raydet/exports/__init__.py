"""Exports: tables and checkpoints → other formats and the Hugging Face Hub."""
