"""The row groups of a table's files, as its manifest states them, stored compactly, since there may be millions."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq

from raydet.tables.columns import Integers, starts_of

FileGroups = Sequence[tuple[int, int]]
"""Number of rows and bytes of each row group of a file, in order; the bytes are uncompressed."""


def groups_of(footer: pq.FileMetaData) -> FileGroups:
    """Return the row groups that a Parquet file's footer describes."""
    groups = map(footer.row_group, range(footer.num_row_groups))
    return [(group.num_rows, group.total_byte_size) for group in groups]


@dataclass(frozen=True, eq=False)
class Layout:
    """The row groups of all files, in row order.

    Attributes:
        files: File names, ascending, [F].
        starts: Row groups starts[i] to starts[i + 1] (exclusive) belong to file i, int64 [F + 1].
        num_rows: Rows of each row group, int64 [G].
        num_bytes: Uncompressed bytes of each row group, int64 [G].
    """

    files: tuple[str, ...]
    starts: Integers
    num_rows: Integers
    num_bytes: Integers

    @classmethod
    def of(cls, groups_by_file: Mapping[str, FileGroups]) -> Self:
        """Build the layout from the row groups of each file, by file name.

        Raises:
            ValueError: A number is negative, or the content, which may come from an untrusted file, is malformed.
        """
        files = tuple(sorted(groups_by_file))
        groups: list[Any] = [groups_by_file[name] for name in files]
        try:
            numbers = np.array(list(itertools.chain.from_iterable(groups)) or np.zeros((0, 2)), np.int64)
            starts = starts_of(np.array([len(own) for own in groups], np.int64))
        except (TypeError, OverflowError) as error:
            raise ValueError(str(error)) from None
        if numbers.shape != (starts[-1], 2) or (numbers < 0).any():
            raise ValueError("a row group needs a number of rows and a number of bytes")
        return cls(files, starts, *np.ascontiguousarray(numbers.T))

    def only(self, name: str) -> Self:
        """Return the layout of one file."""
        at = self.files.index(name)
        own = slice(self.starts[at], self.starts[at + 1])
        starts = self.starts[at : at + 2] - self.starts[at]
        return type(self)((name,), starts, self.num_rows[own], self.num_bytes[own])

    def groups_between(self, start: int, stop: int) -> range:
        """Return the numbers of the row groups that contain the rows from `start` to `stop` (exclusive)."""
        ends = np.cumsum(self.num_rows)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        return range(int(first), min(int(last) + 1, len(ends)))
