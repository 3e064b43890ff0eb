"""Images of a collection → small JPEG files, made when they are asked for and kept within a limit of memory.

The page never gets the bytes of an image file: what it shows has been decoded and encoded again.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import pyarrow as pa
from PIL import Image

from raydet.browsing.sources import Sources
from raydet.common.errors import UserError, one_line
from raydet.common.redaction import without_secrets
from raydet.common.threads import available_cpus
from raydet.config import DEFAULT_MAX_PIXELS
from raydet.images.collection import Collection, TableCollection
from raydet.images.decode import DecodeError, decode
from raydet.tables.table import RowGroup, Table

THUMBNAIL_SIDE, PICTURE_SIDE = 320, 2048
"""Longest sides in pixels."""
_CACHE_BYTES = 64 * 2**20
_GROUPS_BYTES = 128 * 2**20
_QUALITY = {THUMBNAIL_SIDE: 78, PICTURE_SIDE: 88}
_Value = TypeVar("_Value")


class PictureError(Exception):
    """An image that cannot be shown; the message is a short reason."""


class RecentlyUsed(Generic[_Value]):
    """The most recently used values, of a limited total size; thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._values: OrderedDict[object, tuple[_Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> _Value | None:
        """Return a value; None if it is not kept."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: object, value: _Value, num_bytes: int) -> None:
        """Keep a value, unless it alone exceeds the limit, and drop those that were not used for longest."""
        with self._lock:
            if key in self._values or num_bytes > self._max_bytes:
                return
            self._values[key] = value, num_bytes
            self._num_bytes += num_bytes
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= self._values.popitem(last=False)[1][1]


@dataclass(frozen=True)
class TableWithMemory(Table):
    """An images table that keeps the row groups it read last: neighbouring thumbnails come from the same ones."""

    recent: RecentlyUsed[pa.Table] = field(default_factory=lambda: RecentlyUsed(_GROUPS_BYTES), compare=False)
    lock: Any = field(default_factory=threading.Lock, compare=False)

    def read_row_groups(self, groups: Iterable[RowGroup], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """See `Table.read_row_groups`; one row group is read at a time, because each may take gigabytes."""
        for group in groups:
            with self.lock:
                found = self.recent.get(group)
                if found is None:
                    found = next(super().read_row_groups([group], columns))
                    self.recent.put(group, found, found.nbytes)
            yield found


class Pictures:
    """Pictures of the images of some sources; thread-safe."""

    def __init__(self, sources: Sources) -> None:
        self._collection = None if sources.collection is None else _with_memory(sources.collection)
        self._positions = sources.positions
        self._made = {side: RecentlyUsed[bytes](_CACHE_BYTES) for side in _QUALITY}
        self._at_once = threading.Semaphore(available_cpus())

    def thumbnail(self, image: int) -> bytes:
        """Return a JPEG of at most `THUMBNAIL_SIDE` pixels.

        Raises:
            PictureError: The image does not exist or cannot be read.
        """
        return self._get(image, THUMBNAIL_SIDE)

    def picture(self, image: int) -> bytes:
        """Return a JPEG of at most `PICTURE_SIDE` pixels; raises as `thumbnail` does."""
        return self._get(image, PICTURE_SIDE)

    def _get(self, image: int, side: int) -> bytes:
        if not 0 <= image < len(self._positions):
            raise PictureError("no such image")
        found = self._made[side].get(image)
        if found is None:
            with self._at_once:
                found = self._make(int(self._positions[image]), side)
            self._made[side].put(image, found, len(found))
        return found

    def _make(self, position: int, side: int) -> bytes:
        if self._collection is None or position < 0:
            raise PictureError("the picture is not in the collection")
        try:
            row = next(self._collection.read(position, position + 1))
            if row.data is None:
                raise PictureError(row.error or "the image can no longer be read")
            pixels = decode(row.data, max_pixels=DEFAULT_MAX_PIXELS, at_least_hw=(side, side))
        except (DecodeError, UserError, OSError) as error:
            raise PictureError(one_line(without_secrets(str(error)))) from None
        picture = Image.fromarray(pixels)
        picture.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=_QUALITY[side])
        return buffer.getvalue()


def _with_memory(collection: Collection) -> Collection:
    if not isinstance(collection, TableCollection):
        return collection
    return replace(collection, table=TableWithMemory(**vars(collection.table)))
