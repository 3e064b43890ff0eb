"""Tables on disk: a folder of Parquet files, complete once its manifest exists.

The manifest (`.manifest.json`) is written last. It states the row groups of each file, the schema version, the token of
the run, which its files carry too, and the hash of its configuration. Readers refuse a folder without a manifest, plan
by its numbers instead of opening all files, compare them with each file that they read, and check every row.
"""

import contextlib
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydet.common.console import counted
from raydet.common.errors import UserError, one_line
from raydet.common.notebook.showing import row_cells, table_html, table_text
from raydet.common.threads import in_order
from raydet.common.untrusted.documents import MAX_JSON_BYTES
from raydet.tables import storage
from raydet.tables.checks import check_rows, check_types, check_unique
from raydet.tables.columns import image_ids_in
from raydet.tables.layout import MANIFEST_NAME, FileGroups, Layout, groups_of, parse_manifest
from raydet.tables.schema import (
    SCHEMA_VERSION,
    Category,
    TableKind,
    categories_of,
    parse_metadata,
    token_of,
    with_token,
)

FINDINGS_FOLDER, REJECTED_FOLDER = "__findings", "__rejected"
"""Subfolders for the lists that `prepare` writes beside an images table, or beside the tables of its splits."""
SPLITS = ("train", "val")
ANY_KIND: tuple[TableKind, ...] = get_args(TableKind)
_MOST_FOLDERS, _MOST_SHOWN = 50, 5
_SOURCE_SUFFIXES = (".jpg", ".jpeg", ".png", ".json", ".xml", ".csv", ".yaml", ".txt")
_EARLIER_MANIFEST_NAME = "_manifest.json"
_MAX_ROW_GROUP_BYTES = 2**31
_MAX_VALUES = 2**26
"""Limits of a row group that is read: a small file can claim billions of equal values."""
ROW_GROUP_BYTES = 16 * 2**20
"""Size of a row group, the unit of reading: small enough to shuffle, large enough to stream from object storage."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of a table, as the manifest states it.

    Attributes:
        file: Name of its file.
        index: Position in the file, from 0.
        first_row: Position of its first row in the table, from 0.
        num_rows: Number of rows.
        num_bytes: Uncompressed size in bytes.
    """

    file: str
    index: int
    first_row: int
    num_rows: int
    num_bytes: int


@dataclass(frozen=True)
class Table:
    """A complete, readable table; cheap to pickle, since it contains no rows.

    Attributes:
        uri: URI of the folder.
        kind: Kind of the table.
        schema: Schema of the rows.
        categories: Classes of the boxes.
        manifest: Content of the manifest, without the files.
        layout: Row groups of the files, from the manifest.
        fingerprint: 16 hex digits that change with the manifest.
    """

    uri: str
    kind: TableKind
    schema: pa.Schema
    categories: tuple[Category, ...]
    manifest: dict[str, Any]
    layout: Layout
    fingerprint: str

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files, ascending, which is the order of their rows."""
        return self.layout.files

    @property
    def num_rows(self) -> int:
        """Number of rows in all files."""
        return int(self.layout.num_rows.sum())

    def only(self, name: str) -> Self:
        """Return one file as a separate table, with the categories in that file's metadata."""
        schema, content = _read_schema(self.uri, name, self.kind)
        return replace(self, schema=schema, categories=categories_of(content), layout=self.layout.only(name))

    def row_groups(self, start: int = 0, stop: int | None = None) -> tuple[RowGroup, ...]:
        """Return the row groups in row order, from the manifest: all, or those with rows `start` to `stop`."""
        layout = self.layout
        return self._groups(range(len(layout.num_rows)) if stop is None else layout.groups_between(start, stop))

    def _groups(self, numbers: Sequence[int]) -> tuple[RowGroup, ...]:
        layout = self.layout
        firsts = np.cumsum(layout.num_rows) - layout.num_rows
        files = np.searchsorted(layout.starts, numbers, side="right") - 1
        return tuple(
            RowGroup(
                layout.files[file],
                number - int(layout.starts[file]),
                int(firsts[number]),
                int(layout.num_rows[number]),
                int(layout.num_bytes[number]),
            )
            for number, file in zip(numbers, files.tolist(), strict=True)
        )

    def split_row_groups(self, num_parts: int) -> list[list[RowGroup]]:
        """Split the row groups, in order, into at most this many parts of similar size in bytes, none of them empty."""
        groups = self.row_groups()
        ends = np.cumsum([group.num_bytes for group in groups])
        num_parts = max(1, min(num_parts, len(groups)))
        part_of = np.minimum((ends - 1) * num_parts // max(int(ends[-1]) if len(ends) else 0, 1), num_parts - 1)
        parts = [
            [group for group, own in zip(groups, part_of, strict=True) if own == index] for index in range(num_parts)
        ]
        return [part for part in parts if part]

    def read_row_group(self, group: RowGroup, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one row group: all columns, or the given ones; raises as `read_row_groups` does."""
        return next(self.read_row_groups([group], columns))

    def read_row_groups(self, groups: Iterable[RowGroup], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Read row groups one by one, opening a file only once for its successive row groups.

        Raises:
            UserError: A file is missing, or its row groups differ from the manifest.
            OSError: The storage failed.
        """
        for name, own in itertools.groupby(groups, lambda group: group.file):
            with self._open(name) as file:
                for group in own:
                    rows = file.read_row_group(group.index, columns=None if columns is None else list(columns))
                    self._check(rows)
                    yield rows

    def iter_batches(
        self,
        columns: Sequence[str] | None = None,
        batch_size: int = 1024,
        *,
        groups: Sequence[RowGroup] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Stream the rows in order, in batches: all of them, or those of some row groups.

        Raises:
            UserError: A file is damaged or missing, its row groups differ from the manifest, a row is invalid, or,
                among all rows, an image id is repeated, which is noticed at the end.
        """
        if groups is not None:
            with refusing_damage(self.uri):
                for rows in self.read_row_groups(groups, columns):
                    yield from rows.to_batches(max_chunksize=batch_size)
            return
        names = None if columns is None else list(columns)
        ids = [np.zeros(0, np.int64)]
        has_ids = self.kind in ("images", "detections") and (names is None or "image_id" in names)
        for name in self.files:
            with refusing_damage(self.uri), self._open(name) as file:
                for batch in file.iter_batches(batch_size=batch_size, columns=names):
                    self._check(batch)
                    if has_ids:
                        ids.append(image_ids_in(batch))
                    yield batch
        check_unique(np.concatenate(ids), self.uri)

    def read_rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Stream the rows from `start` to `stop` (exclusive), as far as there are any, one row group at a time.

        Raises as `read_row_groups` does.
        """
        groups = self.row_groups(start, stop)
        for group, content in zip(groups, self.read_row_groups(groups, columns), strict=True):
            low, high = max(start - group.first_row, 0), min(stop - group.first_row, group.num_rows)
            # In batches, since a binary column of more than 2 GiB does not fit into one array.
            yield from content.slice(low, high - low).to_batches()

    def _check(self, rows: pa.RecordBatch | pa.Table) -> None:
        check_rows(rows, self.kind, len(self.categories), self.uri)

    def rows_at(self, positions: Sequence[int]) -> Iterator[tuple[int, pa.StructScalar]]:
        """Yield the rows at some positions, in table order, reading only the row groups that contain them."""
        left = sorted(positions)
        if not left:
            return
        ends = np.cumsum(self.layout.num_rows)
        groups = self._groups(np.unique(np.searchsorted(ends, left, side="right")).tolist())
        for group, content in zip(groups, self.read_row_groups(groups), strict=True):
            rows = content.to_struct_array().combine_chunks()
            while left and left[0] < group.first_row + group.num_rows:
                position = left.pop(0)
                yield position, rows[position - group.first_row]

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[pq.ParquetFile]:
        """Context manager: open a file and compare its row groups, columns and token with the manifest."""
        with _open_part(self.uri, name) as file:
            found, stated = Layout.of({name: groups_of(file.metadata)}), self.layout.only(name)
            if not (
                np.array_equal(found.num_rows, stated.num_rows) and np.array_equal(found.num_bytes, stated.num_bytes)
            ):
                raise UserError(
                    f"{self.uri} is damaged: {name} has {_described(found)}, but its manifest states "
                    f"{_described(stated)}; run the command that writes it again"
                )
            self._check_origin(name, file)
            yield file

    def _check_origin(self, name: str, file: pq.ParquetFile) -> None:
        if not file.schema_arrow.equals(self.schema):
            raise UserError(f"{self.uri} is damaged: {name} has other columns than {self.files[0]}")
        token = self.manifest.get("token")
        expected = token.get(name) if isinstance(token, dict) else token
        if token_of(file.metadata.metadata) != expected:
            raise UserError(
                f"{self.uri} is damaged: {name} was written by another run than its manifest; run the command that "
                "writes it again"
            )

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the table into memory: all columns, or the given ones; raises as `iter_batches` does."""
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        return pa.Table.from_batches([batch.cast(schema) for batch in self.iter_batches(columns)], schema=schema)

    def to_pandas(self, columns: Sequence[str] | None = None) -> Any:
        """Read the table into a pandas data frame: all columns, or the given ones; raises as `iter_batches` does."""
        return self.read(columns).to_pandas()

    def show(self, n: int = 10) -> None:
        """Print the first rows in short form: images by their path, boxes counted by class."""
        print(table_text(*self._head(n)))

    def _repr_html_(self) -> str:
        return table_html(*self._head(10))

    def _head(self, n: int) -> tuple[list[tuple[str, ...]], str]:
        """Return the header and the first `n` rows as texts, and a note on the table."""
        names = [category.name for category in self.categories]
        batches = self.iter_batches(batch_size=max(1, n))
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        cells = [row_cells(row, names) for row in itertools.islice(rows, max(0, n))]
        return [tuple(self.schema.names), *cells], f"{self.kind}: {counted(self.num_rows, 'row')} in {self.uri}"


def _described(layout: Layout) -> str:
    num_bytes = int(layout.num_bytes.sum())
    return f"{layout.num_rows.sum()} rows in {len(layout.num_rows)} row groups, {num_bytes} bytes"


@contextlib.contextmanager
def _open_part(uri: str, name: str) -> Iterator[pq.ParquetFile]:
    """Context manager: open a file of a table, within limits of memory.

    Raises:
        UserError: The file is missing or damaged, or a row group claims more values than raydet writes.
    """
    try:
        with storage.open_input(storage.join(uri, name)) as source, pq.ParquetFile(source) as file:
            _check_row_groups(file.metadata, uri, name)
            yield file
    except FileNotFoundError:
        raise UserError(f"{uri} lacks the file {name}, which its manifest lists") from None


def _check_row_groups(footer: pq.FileMetaData, uri: str, name: str) -> None:
    for group in map(footer.row_group, range(footer.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        if group.total_byte_size > _MAX_ROW_GROUP_BYTES or any(
            column.num_values > _MAX_VALUES or column.total_uncompressed_size > _MAX_ROW_GROUP_BYTES
            for column in columns
        ):
            raise UserError(f"{uri} is damaged: a row group of {name} is larger than any that raydet writes")


def _read_schema(uri: str, name: str, kind: TableKind | tuple[TableKind, ...]) -> tuple[pa.Schema, dict[str, Any]]:
    """Read and check the schema of a file and the raydet metadata in it."""
    try:
        with _open_part(uri, name) as file:
            schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{uri} is damaged: {name} is not a complete Parquet file ({one_line(error)})") from None
    content = parse_metadata(schema, kind=kind, where=uri)
    check_types(schema, content["kind"], uri)
    return schema, content


@contextlib.contextmanager
def refusing_damage(uri: str) -> Iterator[None]:
    """Context manager: convert a failure to read a table's file to a UserError that names the table."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = one_line(error)
        raise UserError(f"{uri} is damaged: {reason}; run the command that writes it again") from None


def is_table(uri: str) -> bool:
    """Return True if the folder is a complete raydet table of any kind."""
    return storage.exists(storage.join(uri, MANIFEST_NAME))


def open_table(uri: str, kind: TableKind | tuple[TableKind, ...] = ANY_KIND) -> Table:
    """Open a table for reading, of any kind or of those given.

    Raises:
        UserError: The folder does not exist, is not a complete table, or has a different kind or schema version.
    """
    uri = storage.absolute_uri(uri)
    if not storage.exists(uri):
        raise UserError(f"no such table: {uri}")
    if not is_table(uri):
        if storage.exists(storage.join(uri, _EARLIER_MANIFEST_NAME)):
            raise UserError(f"{uri} was written by an earlier raydet; write the table again with this version")
        if storage.is_folder(uri):
            refuse_folder_of_tables(uri, kind)
        raise UserError(_no_table(uri))
    data = storage.read_limited(storage.join(uri, MANIFEST_NAME), MAX_JSON_BYTES)
    manifest, layout = parse_manifest(data, uri)
    del manifest["files"]
    schema, content = _read_schema(uri, layout.files[0], kind)
    fingerprint = hashlib.sha256(data).hexdigest()[:16]
    return Table(uri, content["kind"], schema, categories_of(content), manifest, layout, fingerprint)


def read_manifest(uri: str) -> dict[str, Any]:
    """Read the manifest of a table, with the row groups of its `files`, without opening these.

    Raises:
        UserError: The manifest is damaged or was written by another version.
        FileNotFoundError: The table is not complete.
    """
    return parse_manifest(storage.read_limited(storage.join(uri, MANIFEST_NAME), MAX_JSON_BYTES), uri)[0]


def refuse_folder_of_tables(uri: str, kind: TableKind | tuple[TableKind, ...]) -> None:
    """Refuse a folder that is no table itself but holds some, such as those of the splits.

    Raises:
        UserError: The folder holds tables of this kind.
    """
    tables = tables_in(uri, kind)
    if tables:
        shown = ", ".join(tables[:_MOST_SHOWN]) + (" …" if len(tables) > _MOST_SHOWN else "")
        shown = " and ".join(tables) if len(tables) == 2 else shown
        which = f"the table {shown}; name it" if len(tables) == 1 else f"the tables {shown}; name one of them"
        raise UserError(f"{uri} is not a table, but it holds {which}, such as {storage.join(uri, tables[0])}")


def tables_in(uri: str, kind: TableKind | tuple[TableKind, ...]) -> list[str]:
    """Return the names of the tables of a kind in a folder, including those of the splits of its folders."""
    names = storage.list_folders(uri)[:_MOST_FOLDERS]
    places = [place for name in names for place in (name, *(f"{name}/{split}" for split in SPLITS))]
    return [place for place in places if _is_of_kind(storage.join(uri, place), kind)]


def _is_of_kind(uri: str, kind: TableKind | tuple[TableKind, ...]) -> bool:
    try:
        return is_table(uri) and bool(open_table(uri, kind).uri)
    except UserError:
        return False


def _no_table(uri: str) -> str:
    """Explain why a path is no table."""
    if not storage.is_folder(uri):
        return f"{uri} is a file; a table is a folder, which `raydet prepare` writes for images"
    names = [name for name in storage.list_files(uri) if not name.startswith(("_", "."))]
    if names and not any(name.endswith(".parquet") for name in names):
        example = next((name for name in names if name.lower().endswith(_SOURCE_SUFFIXES)), names[0])
        return (
            f"{uri} is not a raydet table but a folder of other files, such as {example}; make a table of images and "
            "labels with `raydet prepare`"
        )
    return (
        f"{uri} is not a complete raydet table (no {MANIFEST_NAME}): it is another kind of folder, or the command "
        "that writes it did not finish; run that command again, or copy the folder with its hidden files"
    )


def write_manifest(
    uri: str,
    groups_by_file: Mapping[str, FileGroups],
    *,
    config_hash: str,
    token: str | Mapping[str, str] | None = None,
    **extra: Any,
) -> None:
    """Write the manifest, which marks a table as complete.

    Args:
        uri: The table.
        groups_by_file: Row groups of each file, as returned by `FileWriter`, `groups_of` and `read_footers`.
        config_hash: Hash of the configuration of the run.
        token: Token in the metadata of all files, or of each; by default `config_hash`.
        **extra: Further JSON-serialisable entries.
    """
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "config_hash": config_hash,
        "token": config_hash if token is None else token,
        "num_rows": sum(num_rows for groups in groups_by_file.values() for num_rows, _ in groups),
        **extra,
    }
    # One line per file, because a large table has many.
    files = ",\n".join(f"  {json.dumps(name)}: {json.dumps(groups)}" for name, groups in groups_by_file.items())
    text = f'{json.dumps(manifest, indent=1)[:-2]},\n "files": {{\n{files}\n }}\n}}\n'
    storage.write_bytes(storage.join(uri, MANIFEST_NAME), text.encode())


def read_footers(uri: str, names: Sequence[str]) -> Iterator[pq.FileMetaData | None]:
    """Read the footers of a folder's Parquet files in parallel, in the given order; None for other files.

    Needed for files whose row groups are no longer known, since an earlier process wrote them.
    """

    def read(name: str) -> pq.FileMetaData | None:
        try:
            with storage.open_input(storage.join(uri, name)) as source:
                return pq.read_metadata(source)
        except (pa.ArrowInvalid, UserError):
            return None

    return in_order(read, names)


class FileWriter:
    """Writer of one Parquet file, in row groups of at least `ROW_GROUP_BYTES`, except the last.

    Use it as a context manager, or call `close`. The file appears on closing; without rows no file is created.

    Attributes:
        num_rows: Number of rows written so far, without pending ones.
        num_bytes: Size of these rows in memory.
        row_groups: Row groups of the finished file.
    """

    def __init__(self, uri: str, schema: pa.Schema) -> None:
        self._uri = uri
        self._schema = schema
        self._output = contextlib.ExitStack()
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0
        self._writer: pq.ParquetWriter | None = None
        self.num_rows = self.num_bytes = 0
        self.row_groups: FileGroups = ()
        self._footers: list[pq.FileMetaData] = []

    def __enter__(self) -> Self:
        return self

    def write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows given as dictionaries by column name."""
        self.write(pa.RecordBatch.from_pylist(list(rows), schema=self._schema))

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch with the file's schema."""
        self._pending.append(batch)
        self._pending_bytes += batch.nbytes
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows as a row group, if there are any."""
        if not self._pending:
            return
        table = pa.Table.from_batches(self._pending, schema=self._schema)
        if self._writer is None:
            file = self._output.enter_context(storage.open_output(self._uri))
            options = _column_options(self._schema)
            self._writer = pq.ParquetWriter(file, self._schema, metadata_collector=self._footers, **options)
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self.num_rows += table.num_rows
        self.num_bytes += self._pending_bytes
        self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Finish the file, without pending rows."""
        with self._output:
            if self._writer is not None:
                self._writer.close()
                self.row_groups = groups_of(self._footers[0])
        self._writer = None

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is None:
            try:
                self.flush()
                self.close()
            except BaseException:
                self._discard(*sys.exc_info())
                raise
        else:
            self._discard(error_type, error, traceback)

    def _discard(self, *error: Any) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer.is_open = False  # or it would close again on garbage collection
        self._writer = None
        self._output.__exit__(*error)


def _column_options(schema: pa.Schema) -> dict[str, Any]:
    """Build options of `pq.ParquetWriter`: encoded images, which do not compress or repeat, are stored plainly."""
    if "image" not in schema.names:
        return {}
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    columns = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    paths = [columns.column(index).path for index in range(len(columns))]
    others = [path for path in paths if path != "image.bytes"]
    return {"compression": {path: "snappy" if path in others else "none" for path in paths}, "use_dictionary": others}


class TableWriter:
    """Writer of a table: Parquet files of limited size and, on success, the manifest.

    Use it as a context manager: an exception in the block leaves no manifest, so readers refuse the folder.
    """

    def __init__(self, uri: str, schema: pa.Schema, *, config_hash: str, file_bytes: int = 256 * 2**20) -> None:
        self.uri = storage.absolute_uri(uri)
        self._schema = with_token(schema, config_hash)
        self._config_hash = config_hash
        self._file_bytes = file_bytes
        self._files: dict[str, FileWriter] = {}
        self.extra: dict[str, Any] = {}

    def __enter__(self) -> Self:
        storage.make_folder(self.uri)
        return self

    def write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows given as dictionaries by column name."""
        self.write(pa.RecordBatch.from_pylist(list(rows), schema=self._schema))

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch with the table's schema."""
        newest = next(reversed(self._files.values()), None)
        if newest is None or newest.num_bytes >= self._file_bytes:
            if newest is not None:
                newest.close()
            name = f"part-{len(self._files):05d}.parquet"
            newest = self._files[name] = FileWriter(storage.join(self.uri, name), self._schema)
        newest.write(batch.replace_schema_metadata(self._schema.metadata))

    def flush(self) -> None:
        """Write the pending rows as a row group, however small."""
        if self._files:
            next(reversed(self._files.values())).flush()

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is None and not self._files:
            # A table without rows still needs a file for its schema.
            self.write(pa.RecordBatch.from_pylist([], schema=self._schema))
        for file in self._files.values():
            file.__exit__(error_type, error, traceback)
        if error_type is None:
            groups = {name: file.row_groups for name, file in self._files.items()}
            write_manifest(self.uri, groups, config_hash=self._config_hash, **self.extra)
