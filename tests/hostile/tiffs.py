"""Hostile TIFF files to read by windows: lies about places and sizes, loops, bombs in tiles, as bytes."""

import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.hostile.pictures import Make, saved, tiff
from tests.tiffs import UTM_32_N, TagValues, block_of, write_tiled

SIZE_HW = (96, 150)
"""Of every good file: six tiles of 64 × 64, or some strips."""
_HEAD_BYTES = 8
_DIRECTORY_BYTES = 2 + 12 * 10 + 4
_NOISE = np.random.default_rng(5)
_PIXELS = _NOISE.integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)


def tiled(**options: Any) -> bytes:
    """Return a good file of noise in tiles of 64 × 64; `options` are those of `write_tiled`."""
    with tempfile.TemporaryDirectory() as folder:
        return write_tiled(Path(folder) / "a.tif", SIZE_HW, block_of(_PIXELS), **options).read_bytes()


GOOD: Mapping[str, Make] = {
    "tiles": lambda: tiled(tags=UTM_32_N),
    "big": lambda: tiled(is_big=True),
    "big-endian planes": lambda: tiled(is_planar=True, order=">"),
    "jpeg tiles": lambda: tiled(compression="jpeg"),
    "strips": lambda: saved("TIFF", size=SIZE_HW[::-1]),
    "lzw strips": lambda: saved("TIFF", size=SIZE_HW[::-1], compression="tiff_lzw"),
    "palette": lambda: saved("TIFF", "P", size=SIZE_HW[::-1], compression="tiff_lzw"),
    "fax": lambda: saved("TIFF", "1", size=SIZE_HW[::-1], compression="group4"),
}
"""Files to damage."""


Field = tuple[int, str]
"""Place of a field in the bytes of a file, and its format in `struct`."""


class Entry(NamedTuple):
    """Fields of an entry of a directory."""

    kind: Field
    number: Field
    value: Field


def entries_of(data: bytes) -> list[Entry]:
    """Return the entries of the first directory of a good file."""
    order, is_big = {b"II": "<", b"MM": ">"}[data[:2]], 43 in data[2:4]
    (start,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", data, 8 if is_big else 4)
    (number,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}H", data, start)
    head, step, word, size = (8, 20, "Q", 8) if is_big else (2, 12, "I", 4)
    return [
        Entry((at + 2, f"{order}H"), (at + 4, order + word), (at + 4 + size, order + word))
        for at in range(start + head, start + head + step * number, step)
    ]


def with_fields(good: bytes, changes: Sequence[tuple[Field, int]]) -> bytes:
    """Return a file in which some fields have other values, which are cut to the size of the field."""
    data = bytearray(good)
    for (place, form), value in changes:
        struct.pack_into(form, data, place, value % 2 ** (8 * struct.calcsize(form)))
    return bytes(data)


def altered() -> Iterator[tuple[str, bytes]]:
    """Yield good files in which one field of the directory has a wrong value, each with a name."""
    for name in ("tiles", "big", "strips"):
        good = GOOD[name]()
        for number, entry in enumerate(entries_of(good)):
            for field, values in WRONG.items():
                for value in values:
                    yield f"{name}: {field} {number} is {value}", with_fields(good, [(getattr(entry, field), value)])


WRONG: Mapping[str, tuple[int, ...]] = {
    "kind": (0, 1, 2, 3, 4, 5, 12, 16, 18, 19, 65_535),
    "number": (0, 1, 2, 7, 1_000, 2**20 + 1, 2**31 - 1, 2**31, -1),
    "value": (0, 1, 2, 3, 8, 255, 65_535, 65_536, 2**31 - 1, 2**31, -1),
}
"""Wrong values of each field; -1 stands for the largest number."""


def _changed(**tags: tuple[str, list[float]]) -> Make:
    values: TagValues = {int(name.removeprefix("tag_")): value for name, value in tags.items()}
    return lambda: tiled(tags=values)


def _listed(
    side_wh: tuple[int, int], tags: dict[int, tuple[int, int, int]], places: Any, sizes: Any, data: bytes
) -> bytes:
    """Return a file whose tiles or strips lie at given places after the end of its lists, with the tags for them."""
    start = _HEAD_BYTES + _DIRECTORY_BYTES
    count, after = len(places), start + 8 * len(places)
    lists = np.concatenate([np.asarray(places) + after, np.asarray(sizes)]).astype("<u4").tobytes()
    of_places, of_sizes = (324, 325) if 322 in tags else (273, 279)
    own = {
        259: (3, 1, 8),
        277: (3, 1, 1),
        **tags,
        of_places: (4, count, start),
        of_sizes: (4, count, start + 4 * count),
    }
    missing = 10 - len({256, 257, 258, 262, *own})
    padding = {65_000 + number: (3, 1, 0) for number in range(missing)}
    return tiff(*side_wh, own | padding, lists + data)


def _overlapping() -> bytes:
    """Return a file of 390 kB with 40,000 strips of 65,000 bytes each."""
    num_strips = 40_000
    places = np.arange(num_strips) % 4_000
    return _listed((16, num_strips), {278: (4, 1, 1)}, places, np.full(num_strips, 65_000), bytes(70_000))


def _tiny_tiles() -> bytes:
    side = 700
    places = np.zeros(side * side, np.int64)
    return _listed((side, side), {322: (4, 1, 1), 323: (4, 1, 1)}, places, places + 1, b"a")


def _huge_and_empty() -> bytes:
    """Return a file of 8 MB with a million large tiles, none of which is stored."""
    places = np.zeros(1000 * 1000, np.int64)
    return _listed((10**7, 10**7), {322: (4, 1, 10_000), 323: (4, 1, 10_000)}, places, places, b"")


def _bombs() -> bytes:
    """Return two tiles of 4,096 × 4,096, the same bytes, which are 1,000 times as large when decoded."""
    packed = zlib.compress(bytes(4096 * 4096), 9)
    places = np.zeros(2, np.int64)
    tags = {322: (4, 1, 4096), 323: (4, 1, 4096)}
    return _listed((2 * 4096, 4096), tags, places, places + len(packed), packed)


def _longer_than_stated() -> bytes:
    """Return a tile of 64 × 64 whose stream has 100 million bytes."""
    packed = zlib.compress(bytes(100_000_000), 9)
    return _listed((64, 64), {322: (4, 1, 64), 323: (4, 1, 64)}, [0], [4_096], packed)


def _geo_names() -> bytes:
    """Return a file of 2 MB with 65,000 keys that each name nearly the whole text of a megabyte."""
    keys = np.zeros((65_001, 4), np.int64)
    keys[0] = (1, 1, 0, 65_000)
    keys[1:, 0] = np.arange(65_000)
    keys[1:, 1:] = (34_737, 1_000_000, 1)
    keys[1:, 3] += np.arange(65_000) % 7
    return tiled(tags={34_735: ("I", keys.ravel().tolist()), 34_737: ("B", [120] * 1_000_000)})


def _big(start: int, num_tags: int = 0) -> bytes:
    return b"II+\0" + struct.pack("<HHQ", 8, 0, start) + struct.pack("<Q", num_tags) + bytes(100)


def _jpeg_of_another_size() -> bytes:
    good, other = tiled(compression="jpeg"), saved("JPEG", size=(640, 640))
    places = [len(good)] * 6
    return tiled(compression="jpeg", tags={324: ("I", places), 325: ("I", [len(other)] * 6)})[: len(good)] + other


TIFFS: dict[str, Make] = {
    "a loop of directories": lambda: _looping(tiled()),
    "a directory beyond the end": lambda: b"II*\0\xff\xff\xff\x7f" + bytes(100),
    "a directory at its own head": lambda: b"II*\0\0\0\0\0" + bytes(100),
    "a big directory at 2^64 - 1": lambda: _big(2**64 - 1),
    "a big directory of 2^63 tags": lambda: _big(16, 2**63),
    "60,000 tags": lambda: b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + bytes(12 * 60_000),
    "no tag": lambda: b"II*\0\x08\0\0\0\0\0" + bytes(100),
    "half": lambda: tiled()[: len(tiled()) // 2],
    "without its last byte": lambda: tiled()[:-1],
    "30 bytes": lambda: tiled()[:30],
    "only a mark": lambda: b"II*\0",
    "2^31 strips": lambda: tiff(40, 30, {273: (4, 2**31, 8), 279: (4, 2**31, 8)}),
    "2^31 - 1 on each side": _changed(tag_256=("I", [2**31 - 1]), tag_257=("I", [2**31 - 1])),
    "2^32 - 1 wide": _changed(tag_256=("I", [2**32 - 1])),
    "tiles of 2^31 - 1": _changed(tag_322=("I", [2**31 - 1]), tag_323=("I", [2**31 - 1])),
    "tiles of 1": _tiny_tiles,
    "tiles of 0": _changed(tag_322=("I", [0])),
    "tiles beyond the end": _changed(tag_324=("I", [2**32 - 1] * 6)),
    "tiles of 2^32 - 1 bytes": _changed(tag_325=("I", [2**32 - 1] * 6)),
    "tiles in the directory": _changed(tag_324=("I", [8] * 6)),
    "tiles that are not stored": _changed(tag_324=("I", [0] * 6), tag_325=("I", [0] * 6)),
    "strips that overlap": _overlapping,
    "10^7 on each side, nothing stored": _huge_and_empty,
    "tiles that are bombs": _bombs,
    "a tile with a long end": _longer_than_stated,
    "JPEG tiles of another size": _jpeg_of_another_size,
    "JPEG tiles that are no JPEG": _changed(tag_259=("H", [7])),
    "old JPEG": _changed(tag_259=("H", [6])),
    "no such compression": _changed(tag_259=("H", [9_999])),
    "65,535 channels": _changed(tag_277=("H", [65_535])),
    "64 bits": _changed(tag_258=("H", [64])),
    "0 bits": _changed(tag_258=("H", [0, 0, 0])),
    "orientation 9": _changed(tag_274=("H", [9])),
    "a palette of no colours": _changed(tag_262=("H", [3])),
    "a transform of infinities": _changed(tag_34264=("d", [float("inf"), float("nan")] * 8)),
    "a transform of texts": _changed(tag_34264=("B", [65] * 16)),
    "a reference system with control characters": _changed(
        tag_34735=("H", [1, 1, 0, 1, 1026, 34_737, 20, 0]), tag_34737=("B", list(b"\x1b[31m\n\r\0red\x07"))
    ),
    "65,000 names of a megabyte": _geo_names,
    "a PNG": lambda: saved("PNG"),
    "a text": lambda: b"II*\0 is how a TIFF begins",
}
"""Each stands in place of one of several pictures."""


def _looping(data: bytes) -> bytes:
    """Return a file whose directory names itself as the next one."""
    (start,) = struct.unpack_from("<I", data, 4)
    (number,) = struct.unpack_from("<H", data, start)
    changed = bytearray(data)
    struct.pack_into("<I", changed, start + 2 + 12 * number, start)
    return bytes(changed)
