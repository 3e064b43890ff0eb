"""Check of a JPEG's decodability from its markers, without entropy decoding.

libjpeg fails on a sequential JPEG with one scan for two reasons: invalid data before the scan, or a file that ends
inside the scan. Inside the scan nothing is fatal: invalid coefficients cause a warning, and an early marker fills the
rest with grey. So if the first marker after the scan, apart from restarts, is the end of the image, the scan itself
need not be decoded. Entropy decoding is most of the work for a small image.
"""

import re
from collections.abc import Iterator

_START_OF_IMAGE, _START_OF_SCAN, _END_OF_IMAGE = 0xD8, 0xDA, b"\xff\xd9"
_MOST_SEGMENTS, _MOST_SEGMENTS_OF_ALL = 100, 10_000
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_OTHER_FRAMES = frozenset(range(0xC2, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Progressive, lossless and arithmetic frames; the three excluded markers define tables."""
# Neither a stuffed zero nor a restart; repeated 0xFF bytes are padding.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def without_scan(data: bytes, start: int) -> bytes | None:
    """Remove the scan of a JPEG; the result decodes, to plain grey, if and only if the complete file does.

    Args:
        data: Content of the file.
        start: Place of its only scan, from `find_scan`.

    Returns:
        The data before the scan and the end marker; None if there is no end marker after the scan.
    """
    marker = _MARKER.search(data, start)
    if marker is None or marker.group() != _END_OF_IMAGE:
        return None
    return data[:start] + _END_OF_IMAGE


def find_scan(data: bytes) -> int | None:
    """Return the offset of a JPEG's scan if it is sequential and its first scan contains all components.

    libjpeg then reads no other scan. None if the file has several scans, a different coding or many segments.
    """
    try:
        return _find_scan(data)
    except IndexError:
        return None


def has_long_header(data: bytes, most_segments: int, most_filling: int) -> bool:
    """Return True if a JPEG has more segments, or bytes between them, before its first scan; Pillow visits each."""
    num_segments, filling = 0, 0
    for marker, gap in _markers(data):
        num_segments, filling = num_segments + 1, filling + gap
        if num_segments > most_segments or filling > most_filling:
            return True
        if marker == _START_OF_SCAN:
            return False
    return len(data) > most_filling and not num_segments


def has_more_scans(data: bytes, most: int) -> bool:
    """Return True if a JPEG has more than `most` scans, or more segments than any encoder writes."""
    num_scans = 0
    for num_segments, (marker, _) in enumerate(_markers(data)):
        num_scans += marker == _START_OF_SCAN
        if num_scans > most or num_segments > _MOST_SEGMENTS_OF_ALL:
            return True
    return False


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the markers of a JPEG's segments up to its end, as libjpeg finds them, each with the bytes before it."""
    place = 0
    while (found := _MARKER.search(data, place)) is not None:
        marker, gap, place = found.group()[-1], found.start() - place, found.end()
        if marker == _END_OF_IMAGE[1]:
            return
        if marker not in (_START_OF_IMAGE, 0x01):
            yield marker, gap
            place += max(2, int.from_bytes(data[place : place + 2]))


def _find_scan(data: bytes) -> int | None:
    place, num_frames, num_components = 2, 0, 0
    for _ in range(_MOST_SEGMENTS):
        if data[place] != 0xFF:
            return None
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
