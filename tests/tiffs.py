"""Tiled TIFF files, written tile by tile, of any size."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
TagValues = Mapping[int, tuple[str, Sequence[float]]]
"""Values of further tags, with the `struct` code of their type."""

UTM_32_N: TagValues = {
    33550: ("d", [0.5, 0.5, 0.0]),
    33922: ("d", [0.0, 0.0, 0.0, 500_000.0, 5_400_000.0, 0.0]),
    34735: ("H", [1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632]),
}
"""Pixels of half a metre in UTM zone 32 N."""
_KINDS = {"B": 2, "H": 3, "I": 4, "d": 12, "Q": 16}
"""TIFF's number of each type; bytes are texts."""
_COMPRESSIONS = {"raw": 1, "deflate": 8, "jpeg": 7}


def write_tiled(
    path: Path,
    size_hw: tuple[int, int],
    block: Callable[[int, int, int, int], Pixels],
    *,
    tile: int = 64,
    compression: str = "deflate",
    predictor: bool = False,
    is_planar: bool = False,
    is_big: bool = False,
    order: str = "<",
    skipped: Sequence[int] = (),
    tags: TagValues | None = None,
) -> Path:
    """Write a tiled TIFF of 8-bit samples.

    Args:
        path: File to write.
        size_hw: Height and width in pixels.
        block: Returns the pixels of a window (left, top, width, height), uint8 [height, width, channels], 1 to 4.
        tile: Side of the tiles.
        compression: raw, deflate or jpeg.
        predictor: Store differences of neighbouring pixels; with deflate.
        is_planar: Store the channels one after the other.
        is_big: Write a BigTIFF.
        order: Byte order, "<" or ">".
        skipped: Numbers of tiles that are not stored.
        tags: Further tags, or other values.
    """
    height, width = size_hw
    num_channels = block(0, 0, 1, 1).shape[2]
    down, across = -(-height // tile), -(-width // tile)
    planes: list[slice] = [slice(own, own + 1) for own in range(num_channels)] if is_planar else [slice(None)]
    places: list[int] = []
    sizes: list[int] = []
    with path.open("wb") as file:
        head = 16 if is_big else 8
        file.write(b"\0" * head)
        for plane in planes:
            for number in range(down * across):
                top, left = number // across * tile, number % across * tile
                shown = block(left, top, min(tile, width - left), min(tile, height - top))[..., plane]
                pixels = np.pad(shown, [(0, tile - shown.shape[0]), (0, tile - shown.shape[1]), (0, 0)], mode="edge")
                data = b"" if len(places) in skipped else _encoded(pixels, compression, predictor)
                places.append(file.tell() if data else 0)
                sizes.append(len(data))
                file.write(data)
        is_ycbcr = compression == "jpeg" and num_channels == 3
        values: dict[int, tuple[str, Sequence[float]]] = {
            256: ("I", [width]),
            257: ("I", [height]),
            258: ("H", [8] * num_channels),
            259: ("H", [_COMPRESSIONS[compression]]),
            262: ("H", [6 if is_ycbcr else 2 if num_channels > 2 else 1]),
            277: ("H", [num_channels]),
            284: ("H", [2 if is_planar else 1]),
            317: ("H", [2 if predictor else 1]),
            322: ("I", [tile]),
            323: ("I", [tile]),
            324: ("Q" if is_big else "I", places),
            325: ("I", sizes),
        }
        if num_channels in (2, 4):
            values[338] = ("H", [2])
        if is_ycbcr:
            values[530] = ("H", [2, 2])
        values |= tags or {}
        start = file.tell() + file.tell() % 2
        file.seek(start)
        file.write(_directory(values, start, order, is_big))
        mark = {"<": b"II", ">": b"MM"}[order]
        file.seek(0)
        file.write(
            mark + struct.pack(f"{order}HHHQ", 43, 8, 0, start)
            if is_big
            else mark + struct.pack(f"{order}HI", 42, start)
        )
    return path


def block_of(pixels: Pixels) -> Callable[[int, int, int, int], Pixels]:
    """Return the function that `write_tiled` takes, for pixels in memory."""
    return lambda left, top, width, height: pixels[top : top + height, left : left + width]


def _encoded(pixels: Pixels, compression: str, predictor: bool) -> bytes:
    if compression == "jpeg":
        stream = io.BytesIO()
        squeezed = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        Image.fromarray(squeezed).save(stream, "JPEG", quality=90)
        return stream.getvalue()
    if predictor:
        pixels = np.concatenate([pixels[:, :1], np.diff(pixels, axis=1)], axis=1)
    return zlib.compress(pixels.tobytes(), 1) if compression == "deflate" else pixels.tobytes()


def _directory(values: Mapping[int, tuple[str, Sequence[float]]], start: int, order: str, is_big: bool) -> bytes:
    word, count_type = ("Q", "Q") if is_big else ("I", "H")
    size = struct.calcsize(f"<{word}")
    head = struct.pack(f"{order}{count_type}", len(values))
    far, place = b"", start + len(head) + len(values) * (4 + 2 * size) + size
    entries = b""
    for number, (code, numbers) in sorted(values.items()):
        data = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        stored = data.ljust(size, b"\0") if len(data) <= size else struct.pack(f"{order}{word}", place + len(far))
        if len(data) > size:
            far += data + b"\0" * (len(data) % 2)
        entries += struct.pack(f"{order}HH{word}", number, _KINDS[code], len(numbers)) + stored
    return head + entries + b"\0" * size + far
