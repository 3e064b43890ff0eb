"""Documents and files of strangers: opened, decoded and parsed within limits."""
