"""The first directory of a TIFF file → the tags that raydet uses, read by ranges and bounded; tags and strips → a TIFF.

Everything else in the file is left unread: further images and overviews, metadata, and tags that only other programs
know. A directory may come from a stranger, so nothing is read that a tag merely claims to be long.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_SEGMENTS = 2**23
"""Tiles or strips of a picture: 2 terapixels in tiles of 512 × 512."""
_MOST_TAGS = 1_000
_MOST_BYTES = 2**20
"""Of a tag that does not list segments."""
_NUMBERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 11: "f4", 12: "f8", 13: "u4", 16: "u8", 17: "i8"}
"""numpy type of each TIFF type; texts (2), undefined bytes (7) and fractions (5, 10) are kept as bytes."""
_SIZES = {2: 1, 5: 8, 7: 1, 10: 8}
_LONG, _OFFSET_TYPE = 4, 18
_HEAD_BYTES, _ENTRY_BYTES = 8, 12

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 274, 277, 278, 279, 284
PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 317, 320, 322, 323, 324, 325
INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES = 332, 338, 339, 347
YCBCR_COEFFICIENTS, YCBCR_SUBSAMPLING, YCBCR_POSITIONING, REFERENCE_BLACK_WHITE = 529, 530, 531, 532
PIXEL_SCALE, TIE_POINTS, TRANSFORMATION, GEO_KEYS, GEO_TEXTS = 33550, 33922, 34264, 34735, 34737

PIXEL_TAGS = (
    *(BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, SAMPLES, PLANAR, PREDICTOR, COLOUR_MAP, INK_SET, EXTRA_SAMPLES),
    *(SAMPLE_FORMAT, JPEG_TABLES, YCBCR_COEFFICIENTS, YCBCR_SUBSAMPLING, YCBCR_POSITIONING, REFERENCE_BLACK_WHITE),
)
"""Tags that say how the bytes of a segment become pixels."""
_LAYOUT_TAGS = (WIDTH, HEIGHT, ORIENTATION, ROWS_PER_STRIP, TILE_WIDTH, TILE_HEIGHT)
_SEGMENT_TAGS = (STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES)
_GEO_TAGS = (PIXEL_SCALE, TIE_POINTS, TRANSFORMATION, GEO_KEYS, GEO_TEXTS)
_USED = frozenset((*PIXEL_TAGS, *_LAYOUT_TAGS, *_SEGMENT_TAGS, *_GEO_TAGS))


class WindowError(Exception):
    """A picture, or a window of one, that cannot be read; the message is one short reason."""


class Ranges(Protocol):
    """A file that is read by ranges."""

    def size(self) -> int:
        """Return the size in bytes."""

    def read_at(self, num_bytes: int, offset: int, /) -> bytes:
        """Return up to `num_bytes` bytes from an offset, fewer at the end."""


@dataclass(frozen=True)
class Tag:
    """The value of a tag as it is stored.

    Attributes:
        kind: TIFF's number of the type.
        count: Number of values.
        data: The bytes, in the byte order of the file.
    """

    kind: int
    count: int
    data: bytes


@dataclass(frozen=True)
class Directory:
    """The tags of a picture.

    Attributes:
        order: Byte order of the file, "<" or ">", as numpy writes it.
        tags: Those that raydet uses.
    """

    order: str
    tags: Mapping[int, Tag]

    def numbers(self, tag: int) -> NDArray[Any]:
        """Return the values of a tag; none if it is absent."""
        found = self.tags.get(tag)
        if found is None or found.kind not in _NUMBERS:
            return np.zeros(0, np.int64)
        return np.frombuffer(found.data, self.order + _NUMBERS[found.kind])

    def number(self, tag: int, default: int) -> int:
        """Return the first value of a tag, or the default if there is no whole number."""
        values = self.numbers(tag)
        return int(values[0]) if len(values) and values.dtype.kind != "f" else default


def read_directory(file: Ranges) -> Directory:
    """Read the first directory of a TIFF or BigTIFF file.

    Raises:
        WindowError: The file is not a TIFF, or its directory is damaged or too large.
        OSError: The storage failed.
    """
    head = _exactly(file, min(16, file.size()), 0)
    if not head:
        raise WindowError("empty file")
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or len(head) < 16:
        raise WindowError("not a TIFF: other formats can only be decoded as a whole")
    order = "<" if head[:1] == b"I" else ">"
    is_big = 43 in head[2:4]
    place, word = (8, "u8") if is_big else (4, "u4")
    start = _number(head, place, order + word)
    count_type, entry_bytes = ("u8", 20) if is_big else ("u2", 12)
    count_bytes = np.dtype(count_type).itemsize
    num_tags = _number(_exactly(file, count_bytes, start), 0, order + count_type)
    if not 0 < num_tags <= _MOST_TAGS:
        raise WindowError(f"broken TIFF: {num_tags:,} tags")
    entries = _exactly(file, num_tags * entry_bytes, start + count_bytes)
    tags = {}
    for at in range(0, len(entries), entry_bytes):
        number, kind = (_number(entries, at + shift, order + "u2") for shift in (0, 2))
        if number in _USED and number not in tags:
            tags[number] = _tag(file, number, kind, entries[at + 4 : at + entry_bytes], order + word)
    return Directory(order, tags)


def long_tag(values: Sequence[int], order: str) -> Tag:
    """Return a tag of 32-bit numbers."""
    return Tag(_LONG, len(values), np.array(values, f"{order}u4").tobytes())


def build_tiff(tags: Mapping[int, Tag], strips: Sequence[bytes], order: str) -> bytes:
    """Build a TIFF of strips.

    Args:
        tags: All tags but the places and sizes of the strips.
        strips: Content of the strips.
        order: Byte order of the tags and of the strips' samples, "<" or ">".
    """
    tags = {**tags, STRIP_BYTES: long_tag([len(strip) for strip in strips], order)}
    directory_bytes = 2 + (len(tags) + 1) * _ENTRY_BYTES + 4
    place = _HEAD_BYTES + directory_bytes
    sizes = [len(tag.data) for tag in tags.values()] + [4 * len(strips)]
    start = place + sum(size + size % 2 for size in sizes if size > 4)
    tags[STRIP_OFFSETS] = long_tag(np.cumsum([start, *map(len, strips[:-1])]).tolist(), order)
    entries: list[bytes] = []
    far: list[bytes] = []
    for number, tag in sorted(tags.items()):
        head = np.array([number, tag.kind], f"{order}u2").tobytes() + np.array([tag.count], f"{order}u4").tobytes()
        if len(tag.data) <= 4:
            entries.append(head + tag.data.ljust(4, b"\0"))
            continue
        entries.append(head + np.array([place], f"{order}u4").tobytes())
        far.append(tag.data + b"\0" * (len(tag.data) % 2))
        place += len(far[-1])
    mark = b"II*\0" if order == "<" else b"MM\0*"
    first = np.array([_HEAD_BYTES], f"{order}u4").tobytes() + np.array([len(tags)], f"{order}u2").tobytes()
    return b"".join([mark, first, *entries, b"\0" * 4, *far, *strips])


def _tag(file: Ranges, number: int, kind: int, rest: bytes, word: str) -> Tag:
    """Read the value of a tag: at the end of its entry if it fits, otherwise where the entry says."""
    size = np.dtype(word).itemsize
    kind = 16 if kind == _OFFSET_TYPE else kind
    item_bytes = np.dtype(_NUMBERS[kind]).itemsize if kind in _NUMBERS else _SIZES.get(kind, 0)
    count = _number(rest, 0, word)
    most = MAX_SEGMENTS if number in _SEGMENT_TAGS else _MOST_BYTES // max(item_bytes, 1)
    if not item_bytes or count > most:
        raise WindowError(f"broken TIFF: tag {number} has {count:,} values of type {kind}")
    num_bytes = count * item_bytes
    data = rest[size:][:num_bytes] if num_bytes <= size else _exactly(file, num_bytes, _number(rest, size, word))
    return Tag(kind, count, data)


def _number(data: bytes, place: int, dtype: str) -> int:
    return int(np.frombuffer(data, dtype, 1, place)[0])


def _exactly(file: Ranges, num_bytes: int, offset: int) -> bytes:
    if offset + num_bytes > file.size():
        raise WindowError("truncated: its directory lies beyond the end of the file")
    return file.read_at(num_bytes, offset)
