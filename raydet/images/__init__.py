"""References to image files → upright RGB pixels, or the reason why not; boxes drawn on them."""
