"""A listing of images → the same with the size and georeference of each TIFF; such rows → open pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import pyarrow as pa

from raydet.common.errors import UserError
from raydet.common.threads import in_order
from raydet.common.untrusted.opening import LocalFile
from raydet.images.files import ReadError
from raydet.images.listing import LISTING_SCHEMA, Listing
from raydet.images.references import FileReader, Reference
from raydet.images.windows.directory import Ranges, WindowError
from raydet.images.windows.picture import OpenTiff

PICTURE_FIELDS = (pa.field("crs", pa.string()), pa.field("transform", pa.list_(pa.float64())))
"""Columns of a detections table of pictures that were read by windows."""
PICTURE_SCHEMA = pa.schema(
    [
        *LISTING_SCHEMA,
        pa.field("height", pa.int64()),
        pa.field("width", pa.int64()),
        *PICTURE_FIELDS,
        pa.field("error", pa.string()),
    ]
)
"""A picture in an index: size and georeference as the file states them when it is listed, or why it has none."""
MAX_WINDOWS = 2**20
"""Windows of a picture, if they do not overlap. A small file may leave out its tiles and state any size."""


@dataclass(frozen=True)
class WindowSize:
    """The windows in which pictures are to be read.

    Attributes:
        side: Largest width and height in pixels.
        max_pixels: Most pixels to decode for a window.
    """

    side: int
    max_pixels: int


class ListedPicture(NamedTuple):
    """A row of an index, with the columns of `PICTURE_SCHEMA`."""

    image_id: int
    path: str
    uri: str | None
    offset: int | None
    size: int | None
    height: int | None
    width: int | None
    crs: str | None
    transform: list[float] | None
    error: str | None

    @property
    def size_hw(self) -> tuple[int, int] | None:
        """Height and width of the upright picture in pixels; None if it cannot be read."""
        return None if self.height is None or self.width is None else (self.height, self.width)


def with_sizes(listing: Listing, reader: FileReader, windows: WindowSize) -> Listing:
    """Read the directory of each picture, several at a time.

    Raises:
        UserError: None of the pictures can be read by windows.
        OSError: The storage failed.
    """
    batches = (_with_sizes(batch, reader, windows) for batch in listing.batches)
    first: list[pa.RecordBatch] = []
    for batch in batches:
        first.append(batch)
        if batch["error"].null_count:
            return Listing("windowed", chain(first, batches), listing.skipped, PICTURE_SCHEMA)
    path, reason = (first[0][column][0].as_py() for column in ("path", "error"))
    raise UserError(f"--windowed can read none of the pictures, such as {path}: {reason}")


def _with_sizes(batch: pa.RecordBatch, reader: FileReader, windows: WindowSize) -> pa.RecordBatch:
    def examine(reference: Reference) -> tuple[object, ...]:
        try:
            with open_picture(reference, reader, max_pixels=windows.max_pixels) as picture:
                reason = picture.refusal_of(windows.side, windows.side) or _refusal_of_many(picture, windows.side)
                if reason is not None:
                    return None, None, None, None, reason
                crs, transform = picture.georeference
                return *picture.size_hw, crs, transform and list(transform), None
        except WindowError as error:
            return None, None, None, None, str(error)

    references = map(Reference, *(batch[name].to_pylist() for name in ("uri", "offset", "size")))
    found = zip(*in_order(examine, references), strict=True)
    more = PICTURE_SCHEMA.names[len(LISTING_SCHEMA) :]
    arrays = [pa.array(values, PICTURE_SCHEMA.field(name).type) for name, values in zip(more, found, strict=True)]
    return pa.RecordBatch.from_arrays([*batch.columns, *arrays], schema=PICTURE_SCHEMA)


def _refusal_of_many(picture: OpenTiff, side: int) -> str | None:
    height, width = picture.size_hw
    if height * width <= MAX_WINDOWS * side**2:
        return None
    return f"{width:,} × {height:,} pixels are more than {MAX_WINDOWS:,} windows: choose a larger --tile"


@contextmanager
def open_picture(reference: Reference, reader: FileReader, *, max_pixels: int) -> Iterator[OpenTiff]:
    """Context manager: open a TIFF file, or one in a tar file.

    Raises:
        WindowError: It cannot be read, and a retry would not help.
        OSError: The storage failed, independently of this file.
    """
    uri, offset, size = reference
    try:
        with reader.open_file(uri) as file:
            part: Ranges = file if offset is None or size is None else _PartOfFile(file, offset, size)
            yield OpenTiff(part, max_pixels=max_pixels, is_remote=not isinstance(file, LocalFile))
    except ReadError as error:
        raise WindowError(str(error)) from None
    except OSError as error:
        reason = reader.reason_of(error, uri or "")
        if reason is None:
            raise
        raise WindowError(str(reason)) from None


class _PartOfFile:
    """A file inside a tar file."""

    def __init__(self, file: Ranges, offset: int, size: int) -> None:
        self._file, self._offset, self._size = file, offset, size

    def size(self) -> int:
        return self._size

    def read_at(self, num_bytes: int, offset: int, /) -> bytes:
        return self._file.read_at(max(0, min(num_bytes, self._size - offset)), self._offset + offset)
