"""The manifest of a table: its entries, and the row groups of its files, stored compactly, since there may be millions.

A manifest may come from a stranger, so `parse_manifest` checks all that raydet reads from it.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq

from raydet.common.errors import UserError, one_line
from raydet.common.untrusted.documents import DocumentError, parse_json
from raydet.tables.columns import Integers, starts_of
from raydet.tables.schema import SCHEMA_VERSION

MANIFEST_NAME = ".manifest.json"
"""`datasets` skips only names that start with a dot, or lie in a folder that starts with a dot or two underscores."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.parquet")
_MAX_SUM = 2**53
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "config_hash": str,
    "id_space": (str, type(None)),
    "num_detections": int,
    "num_errors": int,
    "num_rows": int,
    "prepare": dict,
    "runs": dict,
    "seconds": (int, float),
    "token": (str, dict),
}
"""Types of the entries that raydet reads, if they are there."""

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


def parse_manifest(data: bytes, uri: str) -> tuple[dict[str, Any], Layout]:
    """Parse and check a manifest.

    Args:
        data: Content of the file.
        uri: Table, for messages.

    Returns:
        The entries, `files` included, and the layout of the files.

    Raises:
        UserError: The manifest is damaged, was written by another version, or names files that are no part of a table.
    """
    try:
        manifest = parse_json(data)
        if not isinstance(manifest, dict):
            raise DocumentError("it must be an object")
        version = manifest["schema_version"]
        layout = _check_entries(manifest) if version == SCHEMA_VERSION else None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error, limit=200)
        raise UserError(
            f"{uri} is damaged: {MANIFEST_NAME} is not the manifest of a table ({reason}); run the command that writes "
            "it again"
        ) from None
    if layout is None:
        raise UserError(
            f"{uri} has schema version {version!r:.20}, but this raydet reads version {SCHEMA_VERSION}; "
            "write the table again with this version"
        )
    if not layout.files:
        raise UserError(f"{uri} is an empty table: its manifest lists no file")
    return manifest, layout


def _check_entries(manifest: dict[str, Any]) -> Layout:
    for name, kind in _ENTRIES.items():
        value = manifest.get(name)
        if name in manifest and (not isinstance(value, kind) or isinstance(value, bool)):
            raise DocumentError(f"`{name}` has a value of the wrong type")
    files = manifest["files"]
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise DocumentError(f"{name[:80]!r} is not the name of a Parquet file inside the table")
    for name, own in manifest.get("runs", {}).items():
        if not isinstance(own, dict) or not isinstance(own.get("run"), str) or name not in files:
            raise DocumentError(f"the entry of the run {name[:80]!r} is malformed")
    layout = Layout.of(files)
    sums = [numbers.sum(dtype=np.float64) for numbers in (layout.num_rows, layout.num_bytes)]
    if max(sums) >= _MAX_SUM or manifest["num_rows"] != layout.num_rows.sum():
        raise DocumentError("its numbers of rows contradict each other")
    return layout
