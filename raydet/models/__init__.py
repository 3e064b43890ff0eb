"""A model name or a checkpoint → a detector of any family, its loss, its optimizer and one optimizer step."""
