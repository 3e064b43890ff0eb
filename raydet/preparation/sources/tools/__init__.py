"""Exports of annotation tools, one module per tool → the records of every source."""
