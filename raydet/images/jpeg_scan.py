"""Check of a JPEG's decodability from its markers, without entropy decoding.

libjpeg fails on a sequential JPEG with one scan for two reasons: invalid data before the scan, or a file that ends
inside the scan. Inside the scan nothing is fatal: invalid coefficients cause a warning, and an early marker fills the
rest with grey. So if the first marker after the scan, apart from restarts, is the end of the image, the scan itself
need not be decoded. Entropy decoding is most of the work for a small image.
"""

import re

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, b"\xff\xd9"
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_OTHER_FRAMES = frozenset(range(0xC2, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Progressive, lossless and arithmetic frames; the three excluded markers define tables."""
# Neither a stuffed zero nor a restart; repeated 0xFF bytes are padding.
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def without_scan(data: bytes) -> bytes | None:
    """Remove the scan of a JPEG; the result decodes, to plain grey, if and only if the complete file does.

    Returns:
        The data before the scan and the end marker; None if the check does not apply: the file has several scans,
        a different coding, or no end marker after the scan.
    """
    try:
        start = _find_scan(data)
    except IndexError:
        return None
    if start is None:
        return None
    marker = _MARKER_AFTER_SCAN.search(data, start)
    if marker is None or marker.group() != _END_OF_IMAGE:
        return None
    return data[:start] + _END_OF_IMAGE


def _find_scan(data: bytes) -> int | None:
    """Return the offset of the scan if the JPEG is sequential and its first scan contains all components."""
    place, num_frames, num_components = 2, 0, 0
    while data[place] == 0xFF:
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker < 0xC0 or marker == 0xFF or 0xD0 <= marker <= 0xD9 or marker in _OTHER_FRAMES or size < 2:
            return None
        if marker in _SEQUENTIAL_FRAMES:
            num_frames, num_components = num_frames + 1, data[place + 9]
        place += 2 + size
        if marker == _START_OF_SCAN:
            has_all_components = num_frames == 1 and data[place - size + 2] == num_components
            return place if has_all_components else None
    return None
