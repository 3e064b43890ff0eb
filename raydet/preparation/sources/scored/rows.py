"""Rows of a table by position, with only a few row groups in memory; and the images in them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from raydet.common.errors import UserError
from raydet.config import PrepareDetectionsConfig
from raydet.images.files import ReadError, refuse_size
from raydet.images.references import FileReader, Reference
from raydet.tables import storage
from raydet.tables.columns import Integers
from raydet.tables.table import Table, open_table

_MOST_GROUPS = 4
"""Threads read neighbouring images, which lie in several row groups if the images are large."""


class RecentRows:
    """Some columns of a table; thread-safe, and fast if the positions ascend, apart from small jumps."""

    def __init__(self, table: Table, columns: Sequence[str]) -> None:
        self._table, self._columns = table, columns
        self._ends = np.cumsum(table.layout.num_rows)
        self._recent: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, position: int) -> pa.Table:
        """Return the row at a position, as a table of one row; raises as `Table.read_row_groups` does."""
        number = int(np.searchsorted(self._ends, position, side="right"))
        return self._group(number).slice(position - self._first_of(number), 1)

    def take(self, positions: Integers) -> pa.RecordBatch:
        """Return the rows at some positions, at least one, in their order; raises as `Table.read_row_groups` does."""
        order = np.argsort(positions, kind="stable")
        ascending = positions[order]
        numbers, starts = np.unique(np.searchsorted(self._ends, ascending, side="right"), return_index=True)
        parts = []
        for number, own in zip(numbers.tolist(), np.split(ascending, starts[1:]), strict=True):
            places = own - self._first_of(number)
            is_run = places[-1] - places[0] == len(places) - 1
            rows = self._group(number)
            parts.append(rows.slice(places[0], len(places)) if is_run else rows.take(pa.array(places)))
        rows = pa.concat_tables(parts)
        if (np.diff(order) != 1).any():
            rows = rows.take(pa.array(np.argsort(order)))
        return rows.combine_chunks().to_batches()[0]

    def _first_of(self, number: int) -> int:
        return int(self._ends[number] - self._table.layout.num_rows[number])

    def _group(self, number: int) -> pa.Table:
        # Within the lock, so that threads that need the same row group do not all read it.
        with self._lock:
            if number not in self._recent:
                (group,) = self._table.row_groups(self._first_of(number), int(self._ends[number]))
                self._recent[number] = self._table.read_row_group(group, self._columns)
                if len(self._recent) > _MOST_GROUPS:
                    self._recent.popitem(last=False)
            self._recent.move_to_end(number)
            return self._recent[number]


class TableImages:
    """The images of a table, read by the position of their row; thread-safe and picklable.

    Attributes:
        table: The images table.
        is_local: True if the table is on a local file system.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.is_local = storage.is_local(table.uri)
        self._rows, self._files = RecentRows(table, ["image"]), FileReader()

    def __reduce__(self) -> tuple[Callable[[], "TableImages"], tuple[()]]:
        return partial(TableImages, self.table), ()

    @property
    def mean_bytes(self) -> int:
        """Mean size of a row in bytes, of the image if the table holds it."""
        return max(1, int(self.table.layout.num_bytes.sum()) // max(1, self.table.num_rows))

    @property
    def holds_images(self) -> bool:
        """True if the first row holds its image, instead of referring to a file."""
        return self._cell("0")[0] is not None

    def read(self, row: str) -> bytes:
        """Read the image of a row.

        Raises:
            ReadError: The row has no image, or it cannot be read.
            OSError: The storage failed, independently of this image.
        """
        data, path = self._cell(row)
        if data is not None:
            refuse_size(len(data))
            return data
        if not path:
            raise ReadError("the table has neither bytes nor a path for this image")
        return self._files.read(Reference(path))

    def uri_of(self, row: str) -> str:
        """Return the absolute path or URI of a row's image.

        Raises:
            ReadError: The table holds the image itself.
        """
        data, path = self._cell(row)
        if data is not None or not path:
            raise ReadError("there is no file to refer to: the table holds the image")
        return path

    def _cell(self, row: str) -> tuple[bytes | None, str | None]:
        image = self._rows.at(int(row))["image"][0].as_py() or {"bytes": None, "path": None}
        return image["bytes"], image["path"]


def open_images(config: PrepareDetectionsConfig) -> TableImages:
    """Open the images that were scored.

    Raises:
        UserError: They are no images table, or cannot be stored as references.
    """
    images = TableImages(open_table(config.data, "images"))
    if config.image_storage == "reference" and images.table.num_rows and images.holds_images:
        raise UserError(f"{images.table.uri} holds its images, so there are no files to refer to; omit --image-storage")
    return images
