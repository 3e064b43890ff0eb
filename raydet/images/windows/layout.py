"""The directory of a TIFF → pieces of its pixels, each of which is a small TIFF by itself.

A TIFF stores tiles or strips, which are compressed one by one. A piece is one tile, or some rows of strips. With the
tags that say how bytes become pixels it is a complete file, which `decode` reads as it reads any image. So a window has
the pixels that the whole picture would have, in every mode and compression that raydet knows, and within its limits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from raydet.images.decode import DecodeError, upright_size_hw
from raydet.images.limits import MAX_SIDE
from raydet.images.windows.directory import (
    BITS,
    COMPRESSION,
    EXTRA_SAMPLES,
    HEIGHT,
    JPEG_TABLES,
    PHOTOMETRIC,
    PIXEL_TAGS,
    PLANAR,
    PREDICTOR,
    ROWS_PER_STRIP,
    SAMPLE_FORMAT,
    SAMPLES,
    STRIP_BYTES,
    STRIP_OFFSETS,
    TILE_BYTES,
    TILE_HEIGHT,
    TILE_OFFSETS,
    TILE_WIDTH,
    WIDTH,
    Directory,
    WindowError,
    build_tiff,
    long_tag,
)

_SIDE_END = 2**31
_MOST_SAMPLES, _MOST_BITS = 4, 16
_IS_FLOAT = 3
_UNCOMPRESSED, _YCBCR, _RGB = 1, 6, 2
_LEAST_TILE_SIDE = 16
"""TIFF allows multiples of it. A window has thousands of smaller tiles, each of which costs as much as a large one."""
_PIECE_PIXELS = 2**20
"""Strips are decoded together up to about this many pixels."""

Range = tuple[int, int]
"""Offset and number of bytes in a file."""


@dataclass(frozen=True)
class PixelLayout:
    """The places of a picture's pixels.

    Attributes:
        directory: Tags of the picture.
        width: Columns as they are stored.
        height: Rows as they are stored.
        segment_width: Columns of a tile or strip.
        segment_height: Rows of a tile or strip.
        piece_height: Rows of a piece, which is as wide as a segment.
        num_planes: Number of channels that are stored one after the other; 1 if they are interleaved.
        offsets: Place of each segment in the file, planes first, then rows, int64 [planes, down, across].
        num_bytes: Size of each segment; 0 for one that is not stored, which is empty, int64 [planes, down, across].
    """

    directory: Directory
    width: int
    height: int
    segment_width: int
    segment_height: int
    piece_height: int
    num_planes: int
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]

    @classmethod
    def of(cls, directory: Directory) -> "PixelLayout":
        """Read and check the layout in a directory.

        Raises:
            WindowError: It is damaged, or its pixels are of a kind that raydet does not read.
        """
        width, height = directory.number(WIDTH, 0), directory.number(HEIGHT, 0)
        if not (0 < width < _SIDE_END and 0 < height < _SIDE_END):
            raise WindowError(f"broken TIFF: {width:,} × {height:,} pixels")
        _refuse_samples(directory)
        segment_width, segment_height = _segment_size(directory, width, height)
        num_planes = directory.number(SAMPLES, 1) if directory.number(PLANAR, 1) == 2 else 1
        shape = (num_planes, math.ceil(height / segment_height), math.ceil(width / segment_width))
        tags = (TILE_OFFSETS, TILE_BYTES) if TILE_OFFSETS in directory.tags else (STRIP_OFFSETS, STRIP_BYTES)
        offsets, num_bytes = (_places(directory, tag, shape) for tag in tags)
        segment = (segment_width, segment_height)
        layout = cls(directory, width, height, *segment, segment_height, num_planes, offsets, num_bytes)
        if TILE_OFFSETS not in directory.tags:
            layout = replace(layout, piece_height=layout._band_height())
        layout._refuse_contents()
        return layout

    def _refuse_contents(self) -> None:
        if max(self.segment_width, self.piece_height) > MAX_SIDE:
            raise WindowError(
                f"it is stored in pieces of {self.segment_width:,} × {self.piece_height:,} pixels, over the limit of "
                f"{MAX_SIDE:,} a side: write it with tiles of 512 × 512"
            )
        if self.num_bytes.max() > self._most_bytes(self.segment_height):
            num_bytes = self._raw_bytes(self.segment_height)
            raise WindowError(f"broken TIFF: {self.num_bytes.max():,} bytes for a segment of {num_bytes:,}")
        try:
            upright_size_hw(self.tiff_of(1, 1, [b"\0"] * self.num_planes))
        except DecodeError as error:
            raise WindowError(str(error)) from None

    def _band_height(self) -> int:
        """Return the rows of strips that make a piece of a useful size."""
        rows = min(max(1, _PIECE_PIXELS // self.width), MAX_SIDE)
        return rows if self.is_raw else max(1, rows // self.segment_height) * self.segment_height

    @cached_property
    def is_raw(self) -> bool:
        """True for strips without compression, in which any row can be found."""
        number = self.directory.number
        is_plain = number(COMPRESSION, 1) == _UNCOMPRESSED and number(PHOTOMETRIC, 0) != _YCBCR
        return is_plain and TILE_OFFSETS not in self.directory.tags and self.num_planes == 1

    def most_bytes(self, num_pieces: int) -> int:
        """Return the stored bytes of pieces, at most."""
        return num_pieces * self.num_planes * self._most_bytes(self.piece_height)

    def pieces_of(self, left: int, top: int, right: int, bottom: int) -> list[tuple[int, int]]:
        """Return the pieces that a window of the stored pixels touches, as row and column in their grid."""
        rows = range(top // self.piece_height, -(-bottom // self.piece_height))
        columns = range(left // self.segment_width, -(-right // self.segment_width))
        return [(row, column) for row in rows for column in columns]

    def most_pixels(self, width: int, height: int) -> int:
        """Return the pixels to decode, at most, for a window of this size."""
        across = min(math.ceil(self.width / self.segment_width), (width - 1) // self.segment_width + 2)
        down = min(math.ceil(self.height / self.piece_height), (height - 1) // self.piece_height + 2)
        return across * self.segment_width * down * self.piece_height

    def ranges_of(self, piece: tuple[int, int]) -> list[Range]:
        """Return the places of a piece's segments, those of a plane together; of uncompressed strips, of its rows."""
        row, column = piece
        top, bottom = row * self.piece_height, min((row + 1) * self.piece_height, self.height)
        segments = range(top // self.segment_height, -(-bottom // self.segment_height))
        if not self.is_raw:
            part = np.s_[:, segments.start : segments.stop, column]
            pairs = zip(self.offsets[part].ravel().tolist(), self.num_bytes[part].ravel().tolist(), strict=True)
            return list(pairs)
        ranges = []
        for segment in segments:
            first, last = (
                min(max(edge - segment * self.segment_height, 0), self.segment_height) for edge in (top, bottom)
            )
            offset, stored = int(self.offsets[0, segment, 0]), int(self.num_bytes[0, segment, 0])
            start, stop = self._raw_bytes(first), self._raw_bytes(last)
            if stored and stored < stop:
                raise WindowError("broken TIFF: a strip is too short")
            ranges.append((offset + start, stop - start if stored else 0))
        return ranges

    def file_of(self, piece: tuple[int, int], parts: Sequence[bytes]) -> tuple[bytes, int]:
        """Return a piece as a complete TIFF, and its number of rows; `parts` are the bytes of its ranges.

        Raises:
            WindowError: Only some of its segments are stored.
        """
        top = piece[0] * self.piece_height
        # A tile at the border of the picture is complete.
        is_tiled = TILE_OFFSETS in self.directory.tags
        num_rows = self.piece_height if is_tiled else min(self.piece_height, self.height - top)
        if not any(parts):
            num_bytes = self._raw_bytes(num_rows)
            empty = {COMPRESSION: _UNCOMPRESSED}
            if self.directory.number(PHOTOMETRIC, 0) == _YCBCR:
                empty[PHOTOMETRIC] = _RGB
            return self.tiff_of(num_rows, num_rows, [b"\0" * num_bytes] * self.num_planes, empty), num_rows
        if not all(parts):
            raise WindowError("broken TIFF: some of its strips are missing")
        if self.is_raw:
            return self.tiff_of(num_rows, num_rows, [b"".join(parts)]), num_rows
        return self.tiff_of(num_rows, min(self.segment_height, num_rows), parts), num_rows

    def tiff_of(
        self, num_rows: int, rows_per_strip: int, strips: Sequence[bytes], changed: dict[int, int] | None = None
    ) -> bytes:
        """Build a TIFF of one segment's width, with the pixel tags of this one.

        Args:
            num_rows: Its height.
            rows_per_strip: Rows of each strip but the last.
            strips: Their content, one plane after the other.
            changed: Tags with another value; the compression is then that of the strips, which no other tag describes.
        """
        tags = {number: self.directory.tags[number] for number in PIXEL_TAGS if number in self.directory.tags}
        if changed:
            tags = {number: tag for number, tag in tags.items() if number not in (PREDICTOR, JPEG_TABLES)}
        numbers = {WIDTH: self.segment_width, HEIGHT: num_rows, ROWS_PER_STRIP: rows_per_strip, **(changed or {})}
        order = self.directory.order
        tags |= {number: long_tag([value], order) for number, value in numbers.items()}
        return build_tiff(tags, strips, order)

    def _most_bytes(self, num_rows: int) -> int:
        """Return the stored bytes of some rows of a segment, in one plane, at most; compression may enlarge them."""
        return 4 * self._raw_bytes(num_rows) + 2**16

    def _raw_bytes(self, num_rows: int) -> int:
        """Return the bytes of some rows of a segment, in one plane, without compression."""
        samples = 1 if self.num_planes > 1 else self.directory.number(SAMPLES, 1)
        return num_rows * math.ceil(self.segment_width * samples * self.directory.number(BITS, 1) / 8)


def _segment_size(directory: Directory, width: int, height: int) -> tuple[int, int]:
    """Return width and height of the tiles or strips."""
    if TILE_OFFSETS in directory.tags:
        size = directory.number(TILE_WIDTH, 0), directory.number(TILE_HEIGHT, 0)
    else:
        size = width, min(directory.number(ROWS_PER_STRIP, height), height)
    least = _LEAST_TILE_SIDE if TILE_OFFSETS in directory.tags else 1
    if not all(least <= side < _SIDE_END for side in size):
        raise WindowError(f"broken TIFF: tiles of {size[0]:,} × {size[1]:,} pixels")
    return size


def _places(directory: Directory, tag: int, shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """Return the values of a tag with one number for each segment."""
    values, num_segments = directory.numbers(tag), math.prod(shape)
    if len(values) < num_segments:
        raise WindowError(f"broken TIFF: places of {len(values):,} of {num_segments:,} tiles or strips")
    if values.dtype.kind != "u" or values.max() >= 2**62:
        raise WindowError("broken TIFF: impossible places of tiles or strips")
    return values[:num_segments].astype(np.int64).reshape(shape)


def _refuse_samples(directory: Directory) -> None:
    num_samples = directory.number(SAMPLES, 1)
    bits, formats, extra = (directory.numbers(tag) for tag in (BITS, SAMPLE_FORMAT, EXTRA_SAMPLES))
    if num_samples > _MOST_SAMPLES:
        num_extra = f", {len(extra)} of them of an unknown meaning" if len(extra) else ""
        raise WindowError(
            f"it has {num_samples:,} channels{num_extra}; choose three of them, for example with gdal_translate -b"
        )
    if num_samples < 1 or (len(bits) and min(bits) < 1):
        raise WindowError("broken TIFF: no samples")
    if (len(bits) and max(bits) > _MOST_BITS) or (formats >= _IS_FLOAT).any():
        # `decode` scales them by the largest value of the whole picture.
        raise WindowError("its float or 32-bit samples state no range; convert it to 8 bits")
