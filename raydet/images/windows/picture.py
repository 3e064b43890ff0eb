"""An open TIFF → upright RGB pixels of any window, from the pieces that it touches."""

from collections import OrderedDict
from collections.abc import Sequence, Set
from functools import partial

import numpy as np
from numpy.typing import NDArray

from raydet.common.threads import in_order
from raydet.images.decode import DecodeError, decode
from raydet.images.limits import too_large
from raydet.images.pixels import SIDEWAYS, turned
from raydet.images.windows.directory import ORIENTATION, Ranges, WindowError, read_directory
from raydet.images.windows.georeference import georeference_of
from raydet.images.windows.layout import PixelLayout, Range

_KEPT_BYTES = 64 * 2**20
"""Decoded pieces that are kept beside those of the last window; neighbouring windows share pieces."""
_GAP_BYTES, _MOST_READ_BYTES = 64 * 2**10, 32 * 2**20
"""Ranges with a smaller gap between them are read as one, up to a size."""
_TRUNCATED = "truncated: the TIFF file ends in the middle of the image data"

Pixels = NDArray[np.uint8]
Piece = tuple[int, int]


class OpenTiff:
    """A TIFF that is open for reading; used by one thread at a time.

    Attributes:
        size_hw: Height and width in pixels of the upright picture.
        georeference: Position on Earth of the upright picture.
    """

    def __init__(self, file: Ranges, *, max_pixels: int, is_remote: bool = False) -> None:
        """Read the directory.

        Args:
            file: The file.
            max_pixels: Windows for which more pixels must be decoded are refused.
            is_remote: Reading takes long to begin, so ranges are read in parallel.

        Raises:
            WindowError: It is no TIFF, is damaged, or has samples that raydet does not read.
            OSError: The storage failed.
        """
        self._file, self._max_pixels, self._is_remote = file, max_pixels, is_remote
        directory = read_directory(file)
        self._layout = layout = PixelLayout.of(directory)
        orientation = directory.number(ORIENTATION, 1)
        self._orientation = orientation if 1 <= orientation <= 8 else 1
        is_sideways = self._orientation in SIDEWAYS
        self.size_hw = (layout.width, layout.height) if is_sideways else (layout.height, layout.width)
        found = georeference_of(directory)
        self.georeference = found._replace(transform=self._upright(found.transform))
        self._pieces: OrderedDict[Piece, Pixels] = OrderedDict()
        self._damaged: dict[Piece, str] = {}

    def refusal_of(self, width: int, height: int) -> str | None:
        """Return why windows of this size cannot be read; None if they can."""
        if self._orientation in SIDEWAYS:
            width, height = height, width
        layout = self._layout
        num_pixels = layout.most_pixels(min(width, layout.width), min(height, layout.height))
        if num_pixels <= self._max_pixels:
            return None
        return (
            f"{too_large(num_pixels, self._max_pixels)} for each window, because it is stored in pieces of "
            f"{layout.segment_width:,} × {layout.piece_height:,} pixels: write it with tiles of 512 × 512, or raise "
            "--max-pixels"
        )

    def window(self, left: int, top: int, width: int, height: int) -> Pixels:
        """Read a window of the upright picture, which must lie inside it.

        Returns:
            RGB, uint8 [height, width, 3].

        Raises:
            WindowError: A piece is damaged, or decoding takes too much memory.
            OSError: The storage failed.
        """
        reason = self.refusal_of(width, height)
        if reason is not None:
            raise WindowError(reason)
        stored_left, stored_top = self._stored(left, top, width, height)
        if self._orientation in SIDEWAYS:
            width, height = height, width
        right, bottom = stored_left + width, stored_top + height
        layout = self._layout
        needed = layout.pieces_of(stored_left, stored_top, right, bottom)
        self._load(needed)
        pixels = np.empty((height, width, 3), np.uint8)
        for row, column in needed:
            y, x = row * layout.piece_height, column * layout.segment_width
            piece = self._pieces[row, column]
            rows = slice(max(stored_top, y), min(bottom, y + piece.shape[0]))
            columns = slice(max(stored_left, x), min(right, x + piece.shape[1]))
            pixels[
                rows.start - stored_top : rows.stop - stored_top,
                columns.start - stored_left : columns.stop - stored_left,
            ] = piece[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]
        return turned(pixels, self._orientation)

    def _load(self, needed: Sequence[Piece]) -> None:
        """Decode the needed pieces that are not there, and forget others."""
        for piece in needed:
            if piece in self._pieces:
                self._pieces.move_to_end(piece)
        reason = next((self._damaged[piece] for piece in needed if piece in self._damaged), None)
        if reason is not None:  # a large strip belongs to many windows
            raise WindowError(reason)
        missing = [piece for piece in needed if piece not in self._pieces]
        self._forget(len(needed) - len(missing))
        ranges = {piece: self._layout.ranges_of(piece) for piece in missing}
        contents = self._read({own for of_piece in ranges.values() for own in of_piece}, len(missing))
        for piece in missing:
            parts = [contents[own] for own in ranges[piece]]
            data, num_rows = self._layout.file_of(piece, parts)
            try:
                pixels = decode(data, max_pixels=self._max_pixels)
            except DecodeError as error:
                self._damaged[piece] = str(error)
                raise WindowError(str(error)) from None
            if pixels.shape[:2] != (num_rows, self._layout.segment_width):
                raise WindowError("broken TIFF: a tile or strip has another size than it should")
            self._pieces[piece] = pixels

    def _forget(self, num_needed: int) -> None:
        kept_bytes = sum(pixels.nbytes for pixels in self._pieces.values())
        while len(self._pieces) > num_needed and kept_bytes > _KEPT_BYTES:
            _, pixels = self._pieces.popitem(last=False)
            kept_bytes -= pixels.nbytes

    def _read(self, ranges: Set[Range], num_pieces: int) -> dict[Range, bytes]:
        """Read the ranges of pieces, neighbours together."""
        if any(size and offset + size > self._file.size() for offset, size in ranges):
            raise WindowError(_TRUNCATED)
        # A small file may name the same bytes many times, each time from another place on.
        most = min(self._file.size(), self._layout.most_bytes(num_pieces))
        if sum(size for _, size in ranges) > most:
            raise WindowError("broken TIFF: its tiles or strips overlap, or are far larger than their pixels")
        groups: list[list[Range]] = []
        for offset, size in sorted(ranges):
            last = groups[-1] if groups else [(0, 0)]
            end = last[-1][0] + last[-1][1]
            if groups and 0 <= offset - end <= _GAP_BYTES and offset + size - last[0][0] <= _MOST_READ_BYTES:
                last.append((offset, size))
            else:
                groups.append([(offset, size)])
        work = partial(_parts_of, self._file)
        contents = in_order(work, groups) if self._is_remote and len(groups) > 1 else map(work, groups)
        return {
            own: part
            for group, parts in zip(groups, contents, strict=True)
            for own, part in zip(group, parts, strict=True)
        }

    def _stored(self, x: int, y: int, width: int = 0, height: int = 0) -> tuple[int, int]:
        """Return the upper left corner of an upright window among the stored pixels."""
        full_height, full_width = self.size_hw
        mirrored_x, mirrored_y = full_width - x - width, full_height - y - height
        return {
            1: (x, y),
            2: (mirrored_x, y),
            3: (mirrored_x, mirrored_y),
            4: (x, mirrored_y),
            5: (y, x),
            6: (y, mirrored_x),
            7: (mirrored_y, mirrored_x),
            8: (mirrored_y, x),
        }[self._orientation]

    def _upright(self, transform: tuple[float, ...] | None) -> tuple[float, ...] | None:
        """Return the transform from upright pixels, given that from stored ones."""
        if transform is None or self._orientation == 1:
            return transform
        origin, right, down = (np.array(self._stored(*corner), np.float64) for corner in ((0, 0), (1, 0), (0, 1)))
        matrix = np.array(transform).reshape(2, 3)
        linear = matrix[:, :2] @ np.stack([right - origin, down - origin], axis=1)
        shift = matrix[:, :2] @ origin + matrix[:, 2]
        return tuple(np.column_stack([linear, shift]).ravel().tolist())


def _parts_of(file: Ranges, group: Sequence[Range]) -> list[bytes]:
    """Read the ranges of a group, which are near each other, at once."""
    start, end = group[0][0], group[-1][0] + group[-1][1]
    data = file.read_at(end - start, start) if end > start else b""
    if len(data) < end - start:
        raise WindowError(_TRUNCATED)
    return [data[offset - start : offset - start + size] for offset, size in group]
