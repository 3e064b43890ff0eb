"""Limits of memory and time for decoding, judged by what a file states before its pixels are decoded.

A file beyond them is refused. A file that may not be what it states is decoded in a process of its own
(`isolation.py`), with limits that the system enforces.
"""

import re

from PIL import ImageFile, TiffImagePlugin

from raydet.images import jpeg_scan

MAX_SIDE = 65_535
"""Largest width and height in pixels; that of a JPEG. Other formats can state any."""
MAX_SCANS = 20
"""Scans of a JPEG of any size; encoders write about ten."""
MAX_SCANNED_PIXELS = 100_000_000
"""Pixels times scans of a JPEG with more than `MAX_SCANS`; a second of work."""
BIG_BYTES = 256 * 2**20
"""Images that need more memory are decoded one at a time in each process."""

_BYTES_PER_PIXEL = 10
"""Memory in proportion to `max_pixels`."""
_LEAST_LIMIT_BYTES = 64 * 2**20
_RESULT_BYTES = 3
_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Bytes that Pillow needs for a pixel in each mode; 4 in all others."""
_DECODER_BYTES = {"WEBP": 12, "AVIF": 10, "JPEG2000": 12}
"""Bytes that a decoder needs for a pixel beside the image itself: canvases, planes and copies."""
_PROGRESSIVE_BYTES = 3
_WEBP_BYTES = 4 + _RESULT_BYTES + _DECODER_BYTES["WEBP"]
_ALWAYS_ISOLATED = ("AVIF", "JPEG2000")
"""Formats whose header and pixel data each state a size."""
_PACKED_BYTES, _PACKED_RATIO = 64 * 2**20, 500
_SLOW_TILES = ("ppm", "ppm_plain", "bmp_rle")
"""Decoders of Pillow that are written in Python."""
_SLOW_PIXELS = 1_000_000
_MOST_BYTES = {"GIF": 2 * 2**20}
_MOST_BYTES_OF_OTHERS = 256 * 2**20
_MAX_PIECES, _MAX_FILLING = 1_000, 100_000
_PIECE_BYTES = 64
_PNG_WALKED_BYTES = 100_000
_MAX_TIFF_VALUES = 2**20
_TIFF_TEXTS = (1, 2, 7)
"""Types whose values Pillow keeps as bytes."""
_HEADER_BYTES = 4096
_COMMENT = re.compile(rb"#[^\n\r]*")


def refusal_of_structure(name: str, data: bytes, scan: int | None) -> str | None:
    """Return why reading the header of a file would take too long or too much memory; None if it would not.

    Args:
        name: Format of the file.
        data: Its content.
        scan: Place of a JPEG's only scan from `jpeg_scan.find_scan`; None if there is more to see.
    """
    if name == "JPEG" and scan is None and jpeg_scan.has_long_header(data, _MAX_PIECES, _MAX_FILLING):
        return f"broken JPEG: more than {_MAX_PIECES:,} segments, or much filling, before the image"
    if name == "PNG" and len(data) > _PNG_WALKED_BYTES and _has_tiny_chunks(data):
        return "broken PNG: too many chunks"
    if name == "TIFF":
        return _refusal_of_tiff(data)
    if name == "PPM" and _is_endless(data):
        return f"broken PPM: a header of more than {_HEADER_BYTES:,} bytes"
    return None


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in the header of a WebP, for which Pillow allocates memory when it opens the file."""
    kind, head = data[12:16], data[:30].ljust(30, b"\0")
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return None


def needed_bytes(name: str, image: ImageFile.ImageFile) -> int:
    """Estimate the memory for decoding an image to RGB, in bytes."""
    stored = _STORED_BYTES.get(image.mode, 4)
    extra = _DECODER_BYTES.get(name, _PROGRESSIVE_BYTES if "progressive" in image.info else 0)
    return image.width * image.height * (stored + _RESULT_BYTES + extra)


def refusal_of_size(size: tuple[int, int], max_pixels: int) -> str | None:
    """Return why an image of this width and height is refused; None if it is not."""
    width, height = size
    if width * height > max_pixels:
        return too_large(width * height, max_pixels)
    if max(size) > MAX_SIDE:
        return f"a side of {max(size):,} pixels is over the limit of {MAX_SIDE:,}"
    return None


def refusal_of_work(
    name: str, image: ImageFile.ImageFile, data: bytes, max_pixels: int, scan: int | None
) -> str | None:
    """Return why decoding an image would take too much memory or time; None if it would not."""
    reason = _refusal_of_memory(needed_bytes(name, image), max_pixels)
    if reason is not None:
        return reason
    if name == "JPEG" and scan is None:
        num_pixels = image.width * image.height
        most = max(MAX_SCANS, MAX_SCANNED_PIXELS // num_pixels)
        if jpeg_scan.has_more_scans(data, most):
            return f"a JPEG of more than {most:,} scans takes too long to decode"
    return None


def refusal_of_webp(data: bytes, max_pixels: int) -> str | None:
    """Return why a WebP may not even be opened, which allocates its canvas; None if it may."""
    size = webp_size(data)
    if size is None:
        return None
    return refusal_of_size(size, max_pixels) or _refusal_of_memory(size[0] * size[1] * _WEBP_BYTES, max_pixels)


def _refusal_of_memory(needed: int, max_pixels: int) -> str | None:
    limit = max(_BYTES_PER_PIXEL * max_pixels, _LEAST_LIMIT_BYTES)
    if needed <= limit:
        return None
    return f"decoding it takes {needed / 1e6:,.0f} MB, over the limit of {limit / 1e6:,.0f} MB (see --max-pixels)"


def too_large(num_pixels: int, max_pixels: int) -> str:
    """Return the reason for refusing an image with too many pixels."""
    if min(num_pixels, max_pixels) < 1e6:
        return f"{num_pixels:,} pixels is over the limit of {max_pixels:,} pixels"
    return f"{num_pixels / 1e6:,.0f} Mpx is over the limit of {max_pixels / 1e6:,.0f} Mpx"


def must_be_isolated(name: str, data: bytes) -> bool:
    """Return True if not even the header may be read in this process."""
    if name in _ALWAYS_ISOLATED or len(data) > _MOST_BYTES.get(name, _MOST_BYTES_OF_OTHERS):
        return True
    size = webp_size(data) if name == "WEBP" else None
    return size is not None and _is_packed(size[0] * size[1] * _WEBP_BYTES, len(data))


def should_be_isolated(name: str, image: ImageFile.ImageFile, num_bytes: int) -> bool:
    """Return True if the pixels should not be decoded in this process.

    These are images that are very large for their file, and those for which Pillow's decoder is slow, or allocates
    memory by a second statement of the size.
    """
    if _is_packed(needed_bytes(name, image), num_bytes):
        return True
    num_pixels = image.width * image.height
    if num_pixels > _SLOW_PIXELS and any(tile[0] in _SLOW_TILES for tile in image.tile[:1]):
        return True
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (image.tag_v2.get(tag, 0) for tag in (322, 323))
        return not isinstance(width, int) or not isinstance(height, int) or width * height > 4 * num_pixels + 2**22
    return False


def _is_packed(needed: int, num_bytes: int) -> bool:
    return needed > _PACKED_BYTES and needed > _PACKED_RATIO * num_bytes


def _has_tiny_chunks(data: bytes) -> bool:
    """Return True if a PNG has so many small chunks that walking over them, which Pillow does in Python, takes long."""
    place, num_chunks, most = 8, 0, max(_MAX_PIECES, len(data) // _PIECE_BYTES // 4)
    while place + 8 <= len(data):
        num_chunks += 1
        if num_chunks > most:
            return True
        place += 12 + int.from_bytes(data[place : place + 4])
    return False


def _refusal_of_tiff(data: bytes) -> str | None:
    """Check the number of tags and of their values, which Pillow makes Python objects."""
    order = "little" if data[:2] == b"II" else "big"
    is_big = int.from_bytes(data[2:4], order) == 43  # type: ignore[arg-type]

    def number(place: int, size: int) -> int:
        return int.from_bytes(data[place : place + size], order)  # type: ignore[arg-type]

    place = number(8, 8) if is_big else number(4, 4)
    count_bytes, entry_bytes = (8, 20) if is_big else (2, 12)
    num_tags = number(place, count_bytes)
    if num_tags > _MAX_PIECES:
        return f"broken TIFF: more than {_MAX_PIECES:,} tags"
    for tag in range(num_tags):
        entry = place + count_bytes + tag * entry_bytes
        num_values = number(entry + 4, 8 if is_big else 4)
        if num_values > _MAX_TIFF_VALUES and number(entry + 2, 2) not in _TIFF_TEXTS:
            return f"broken TIFF: a tag of {num_values:,} values"
    return None


def _is_endless(data: bytes) -> bool:
    """Return True if comments or blanks make the header of a PPM longer than `_HEADER_BYTES`."""
    num_words = 3 if data[1:2] in b"14" else 4
    words = _COMMENT.sub(b"", data[:_HEADER_BYTES]).split(None, num_words)
    return len(data) > _HEADER_BYTES and len(words) <= num_words - 1
