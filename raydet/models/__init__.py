"""A checkpoint or a model name → one detector contract over all families: build, load, loss, step, optimizer."""
