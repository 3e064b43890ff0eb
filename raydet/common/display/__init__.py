"""Progress of a command and its result: counts that the work advances → a bar, plain lines, or JSON objects."""
