"""A table on disk: a folder of Parquet files, whole once its manifest is there.

The manifest (`_manifest.json`) is written last and holds the number of rows of each file, the schema version and
the hash of the configuration that made it. Readers refuse a folder without one.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from raydet import storage
from raydet.errors import UserError
from raydet.schema import SCHEMA_VERSION, Category, TableKind, categories_of, parse_metadata

MANIFEST_NAME = "_manifest.json"
ROW_GROUP_BYTES = 16 * 2**20
"""A row group is what is read at once; small enough to shuffle, large enough to stream from object storage."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of a table: file name, its number in the file, its rows, and its compressed size in bytes."""

    file: str
    index: int
    num_rows: int
    num_bytes: int


@dataclass(frozen=True)
class Table:
    """A whole table that can be read; cheap to pickle, since it holds no data."""

    uri: str
    kind: TableKind
    schema: pa.Schema
    categories: tuple[Category, ...]
    manifest: dict[str, Any]
    files: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows in all files together."""
        return sum(self.manifest["files"].values())

    def row_groups(self) -> tuple[RowGroup, ...]:
        """The row groups of all files, in the order of the rows."""
        groups = []
        filesystem, path = storage.resolve(self.uri)
        for name in self.files:
            metadata = pq.read_metadata(f"{path}/{name}", filesystem=filesystem)
            for index in range(metadata.num_row_groups):
                group = metadata.row_group(index)
                groups.append(RowGroup(name, index, group.num_rows, group.total_byte_size))
        return tuple(groups)

    def read_row_group(self, group: RowGroup, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads one row group, all columns or those named."""
        filesystem, path = storage.resolve(self.uri)
        with pq.ParquetFile(f"{path}/{group.file}", filesystem=filesystem) as file:
            return file.read_row_group(group.index, columns=None if columns is None else list(columns))

    def iter_batches(self, columns: Sequence[str] | None = None, batch_size: int = 1024) -> Iterator[pa.RecordBatch]:
        """Streams the rows in order, a batch at a time."""
        filesystem, path = storage.resolve(self.uri)
        for name in self.files:
            with pq.ParquetFile(f"{path}/{name}", filesystem=filesystem) as file:
                yield from file.iter_batches(batch_size=batch_size, columns=None if columns is None else list(columns))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads the whole table into memory, all columns or those named."""
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        return pa.Table.from_batches([batch.cast(schema) for batch in self.iter_batches(columns)], schema=schema)


def is_table(uri: str) -> bool:
    """Whether there is a whole raydet table, of whatever kind."""
    return storage.exists(storage.join(uri, MANIFEST_NAME))


def open_table(uri: str, kind: TableKind) -> Table:
    """Opens a table for reading.

    Args:
        uri: The folder.
        kind: What it must hold.

    Raises:
        UserError: There is no such folder, it is not whole, or it is of another kind or schema version.
    """
    uri = storage.absolute_uri(uri)
    if not storage.exists(uri):
        raise UserError(f"no such table: {uri}")
    if not is_table(uri):
        raise UserError(
            f"{uri} is not a whole raydet table (no {MANIFEST_NAME}): the command that writes it did not finish, "
            "or it was never a table; run that command again"
        )
    manifest = json.loads(storage.read_bytes(storage.join(uri, MANIFEST_NAME)))
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{uri} has schema version {manifest['schema_version']}, this raydet reads version {SCHEMA_VERSION}; "
            "write the table again with this version"
        )
    files = tuple(sorted(manifest["files"]))
    if not files:
        raise UserError(f"{uri} is an empty table: it has no file")
    filesystem, path = storage.resolve(uri)
    try:
        schema = pq.read_schema(f"{path}/{files[0]}", filesystem=filesystem)
    except FileNotFoundError:
        raise UserError(f"{uri} lacks the file {files[0]} that its manifest names") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{uri} is damaged: {files[0]} is no whole Parquet file ({error})") from None
    content = parse_metadata(schema, kind=kind, where=uri)
    return Table(uri, kind, schema, categories_of(content), manifest, files)


def write_manifest(uri: str, num_rows_by_file: dict[str, int], *, config_hash: str, **extra: Any) -> None:
    """Declares a table whole. `extra` is anything JSON can hold that readers may like to know."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "config_hash": config_hash,
        "num_rows": sum(num_rows_by_file.values()),
        "files": num_rows_by_file,
        **extra,
    }
    storage.write_bytes(storage.join(uri, MANIFEST_NAME), json.dumps(manifest, indent=1).encode())


class TableWriter:
    """Writes rows into Parquet files of sensible size and, when all went well, the manifest.

    Use it as a context manager: an exception inside leaves no manifest, so no reader takes the rest for a table.
    """

    def __init__(
        self, uri: str, schema: pa.Schema, *, config_hash: str, file_bytes: int = 256 * 2**20, prefix: str = "part"
    ) -> None:
        self.uri = storage.absolute_uri(uri)
        self._filesystem, self._path = storage.resolve(self.uri)
        self._schema = schema
        self._config_hash = config_hash
        self._file_bytes = file_bytes
        self._prefix = prefix
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0
        self._file_written = 0
        self._writer: pq.ParquetWriter | None = None
        self._rows: dict[str, int] = {}
        self.extra: dict[str, Any] = {}

    def __enter__(self) -> Self:
        storage.make_folder(self.uri)
        return self

    def write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows, given as dictionaries with the names of the schema's columns."""
        self.write(pa.RecordBatch.from_pylist(list(rows), schema=self._schema))

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends a batch in the table's schema."""
        self._pending.append(batch)
        self._pending_bytes += batch.nbytes
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        table = pa.Table.from_batches(self._pending, schema=self._schema)
        if self._writer is None:
            name = f"{self._prefix}-{len(self._rows):05d}.parquet"
            # Images are compressed already: snappy leaves them as they are and is nearly free.
            self._writer = pq.ParquetWriter(f"{self._path}/{name}", self._schema, filesystem=self._filesystem)
            self._rows[name] = 0
        name = next(reversed(self._rows))
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._rows[name] += table.num_rows
        self._file_written += self._pending_bytes
        self._pending, self._pending_bytes = [], 0
        if self._file_written >= self._file_bytes:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._file_written = None, 0

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None:
            self._close_file()
            return
        if not self._rows:
            # A table without rows still has a file, which carries the schema.
            self._pending.append(pa.RecordBatch.from_pylist([], schema=self._schema))
        self._flush()
        self._close_file()
        write_manifest(self.uri, self._rows, config_hash=self._config_hash, **self.extra)
