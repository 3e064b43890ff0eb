"""A TIFF file → its size and georeference, and any window of its pixels, without decoding the rest."""
