"""A detector with a vision transformer → the same with low-rank adapters, which can be merged and saved for peft."""
