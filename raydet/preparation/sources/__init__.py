"""One module a format of annotations; each yields the same records."""
