"""Order of the data → chunks of images that Ray Data decodes → batches for the training workers."""
