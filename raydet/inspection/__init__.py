"""Images table → HTML page and tables about the data set."""
