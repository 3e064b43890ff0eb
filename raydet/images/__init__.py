"""References to image files → upright RGB pixels, or a reason for failure; drawing of boxes."""
