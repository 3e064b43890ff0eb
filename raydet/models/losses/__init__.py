"""A detector and a micro-batch → loss terms in units of the global batch."""
