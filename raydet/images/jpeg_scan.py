"""Whether a JPEG can be decoded to its end, told from its markers.

A sequential JPEG of one scan fails in libjpeg for two reasons: what stands before the scan makes no sense, or the file
ends before the scan does. Inside the scan nothing is fatal: coefficients that make no sense are a warning, and a
marker that comes too early fills the rest with grey. So where the next marker after the scan, restarts aside, is that
of the end of the image, the scan itself need not be decoded; entropy decoding is most of the work of a small picture.
"""

import re

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, b"\xff\xd9"
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_OTHER_FRAMES = frozenset(range(0xC2, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Progressive, lossless and arithmetic ones; the three left out define tables."""
# Neither a stuffed zero nor a restart; several 0xFF in a row are filling.
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def without_scan(data: bytes) -> bytes | None:
    """A JPEG without the coded picture: it can be decoded, to nothing but grey, if and only if the whole file can.

    Returns:
        What stands before the scan, and the end mark; None where nothing can be told so: the file has several scans,
        is coded otherwise, or its scan does not end as it should.
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
    """Where the coded picture begins, if it is sequential and its first scan has all components."""
    place, num_frames, num_components = 2, 0, 0
    while data[place] == 0xFF:
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker < 0xC0 or marker == 0xFF or 0xD0 <= marker <= 0xD9 or marker in _OTHER_FRAMES or size < 2:
            return None
        if marker in _SEQUENTIAL_FRAMES:
            num_frames, num_components = num_frames + 1, data[place + 9]
        place += 2 + size
        if marker == _START_OF_SCAN:
            is_whole = num_frames == 1 and data[place - size + 2] == num_components
            return place if is_whole else None
    return None
