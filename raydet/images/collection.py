"""Collections of images to score: a table, a folder, a list of paths, tar files or a video, in a fixed order.

An images table is its own index. The images of other collections are listed once, in a small Parquet file; a resumed
run reads that file, so it sees the same images in the same order even if files were added meanwhile. Reading requires
pyarrow, but neither Ray nor torch.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydet.common.errors import UserError
from raydet.common.redaction import refuse_password
from raydet.common.threads import in_order
from raydet.common.untrusted.opening import ANYWHERE, LocalRoots
from raydet.images.files import ReadError, SizeError
from raydet.images.listing import LISTING_SCHEMA, Listing, is_pattern, is_video, list_images, list_videos
from raydet.images.references import FileReader, Reference
from raydet.images.video.index import FRAME_FIELDS, ListedFrame, read_frames, with_frames
from raydet.images.windows.index import PICTURE_FIELDS, ListedPicture, WindowSize, with_sizes
from raydet.tables import storage
from raydet.tables.columns import bytes_of, numbers_of
from raydet.tables.table import Table, is_table, open_table

_INDEX_FILE = ".inputs"
"""Without the ending of the table's files: in DuckDB, `*.parquet` matches hidden files too."""
_EARLIER_INDEX_FILE = ".inputs.parquet"
INDEX_GROUP_ROWS = 2**16
"""Rows per row group of an index, the minimum that a read loads."""
_ID_FIELD = pa.field("image_id", pa.int64())
_INDEX_KEY = b"raydet_index"
_MOST_BYTES_AHEAD = 16 * 2**20
"""Larger files are read one at a time."""
_TABLE_COLUMNS = ("image_id", "image", "width", "height")


@dataclass(frozen=True)
class ImageRow:
    """One encoded image.

    Attributes:
        image_id: Id in the table, or the row number from 0.
        path: In a table, the stated path; in a folder, relative to the folder; in a list, the line; in a tar file, path
            of the shard and name of the member; in a video, name of the video and number of the frame.
        data: Encoded image; None if it cannot be read.
        error: Short reason for missing data; otherwise None.
        size_hw: Height and width in pixels as stated by the table; None if unknown.
        extra: Values of the collection's `extra_fields`.
    """

    image_id: int
    path: str
    data: bytes | None
    error: str | None
    size_hw: tuple[int, int] | None
    extra: tuple[object, ...] = ()


@dataclass(frozen=True)
class Collection(ABC):
    """A sequence of images by position; contains no pixels and can be pickled to any worker.

    Attributes:
        kind: Kind of source.
        num_rows: Number of images.
        fingerprint: 16 hex digits that change with the collection: hash of a table's manifest, or of the paths and
            references of all images. File contents are not hashed.
    """

    kind: Literal["table", "folder", "list", "tar", "video", "windowed"]
    num_rows: int
    fingerprint: str

    @property
    @abstractmethod
    def id_space(self) -> str | None:
        """Identifier of the image ids' id space: the table's, or this listing's; None if unknown."""

    @property
    def extra_fields(self) -> tuple[pa.Field, ...]:
        """Further columns of a detections table of these images."""
        return ()

    def first(self, limit: int | None) -> Self:
        """Return the collection of the first `limit` images, which keeps the fingerprint; None means all."""
        return self if limit is None else replace(self, num_rows=min(limit, self.num_rows))

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[ImageRow]:
        """Yield the rows from position `start` to `stop` (exclusive) in order, reading lazily.

        Raises:
            OSError: The storage failed. Failures of single images are reported in their rows instead.
        """


@dataclass(frozen=True)
class TableCollection(Collection):
    """Collection of the rows of an images table.

    Attributes:
        table: The images table.
    """

    table: Table

    @classmethod
    def of(cls, table: Table) -> Self:
        """Create a collection from an opened images table.

        Raises:
            UserError: The table has no rows.
        """
        if table.num_rows == 0:
            raise UserError(f"the images table {table.uri} has no rows, so there is no image to score")
        return cls("table", table.num_rows, table.fingerprint, table)

    @property
    def id_space(self) -> str | None:
        """See `Collection.id_space`."""
        found: str | None = self.table.manifest.get("id_space")
        return found

    def read(self, start: int, stop: int) -> Iterator[ImageRow]:
        """Read rows as `Collection.read` does, loading only the required row groups, one at a time."""
        reader = FileReader()
        for rows in self.table.read_rows(start, stop, _TABLE_COLUMNS):
            yield from _table_rows(rows, reader)


@dataclass(frozen=True)
class IndexedCollection(Collection):
    """Collection of the images listed in an index.

    Attributes:
        index: URI of the index, or its content if it is not stored.
        roots: Folders in which local files must lie: that of a listed folder, with those that the user allows.
        num_skipped: Number of files in a folder that were skipped because of their extension.
    """

    index: str | bytes
    roots: LocalRoots = ANYWHERE
    num_skipped: int = 0

    @property
    def id_space(self) -> str:
        """See `Collection.id_space`."""
        return self.fingerprint

    def read(self, start: int, stop: int) -> Iterator[ImageRow]:
        """Read rows as `Collection.read` does, prefetching files in parallel to hide storage latency."""
        yield from _read_ahead(self.reader(), self.references(start, stop))

    def reader(self) -> FileReader:
        """Return a reader of the files that are listed."""
        # Unlike files found by listing, files named in a list may never have existed.
        missing = {"missing": "no such file"} if self.kind == "list" else {}
        return FileReader(roots=self.roots, **missing)

    def references(self, start: int, stop: int) -> Iterator[tuple[ImageRow, Reference]]:
        """Yield the rows from position `start` to `stop` (exclusive) without their data, and where it is."""
        with _open_parquet(self.index) as file:
            for rows in _overlapping(file, start, stop, [_ID_FIELD.name, *LISTING_SCHEMA.names]):
                for image_id, path, *reference in zip(*(column.to_pylist() for column in rows.columns), strict=True):
                    yield ImageRow(image_id, path, None, None, None), Reference(*reference)


@dataclass(frozen=True)
class WindowedCollection(IndexedCollection):
    """Collection of pictures that may be too large to be decoded whole; the index states the size of each."""

    @property
    def extra_fields(self) -> tuple[pa.Field, ...]:
        """See `Collection.extra_fields`."""
        return PICTURE_FIELDS

    def read(self, start: int, stop: int) -> Iterator[ImageRow]:
        """Read rows as `Collection.read` does: complete files, for readers that show small pictures."""
        for row, picture in zip(super().read(start, stop), self.pictures(start, stop), strict=True):
            yield replace(row, extra=(picture.crs, picture.transform))

    def pictures(self, start: int, stop: int) -> Iterator[ListedPicture]:
        """Yield the rows of the index from position `start` to `stop` (exclusive)."""
        with _open_parquet(self.index) as file:
            for rows in _overlapping(file, start, stop, ListedPicture._fields):
                yield from map(ListedPicture, *(column.to_pylist() for column in rows.columns))


@dataclass(frozen=True)
class VideoCollection(Collection):
    """Collection of the frames of videos that are listed in an index.

    Attributes:
        index: URI of the index, or its content if it is not stored.
        roots: Folders in which the files must lie; anywhere, unless `--data` was a local folder.
        num_missing: Number of frames that the video's header states, but which the file does not have.
    """

    index: str | bytes
    roots: LocalRoots = ANYWHERE
    num_missing: int = 0

    @property
    def id_space(self) -> str:
        """See `Collection.id_space`."""
        return self.fingerprint

    @property
    def extra_fields(self) -> tuple[pa.Field, ...]:
        """See `Collection.extra_fields`."""
        return FRAME_FIELDS

    def read(self, start: int, stop: int) -> Iterator[ImageRow]:
        """Read rows as `Collection.read` does, decoding from the key frame before the first one."""
        reader = FileReader(missing="no such file", roots=self.roots)
        for row, data, error in read_frames(self._frames(start, stop), reader):
            yield ImageRow(row.image_id, row.path, data, error, None, (row.frame, row.time_s))

    def _frames(self, start: int, stop: int) -> Iterator[ListedFrame]:
        with _open_parquet(self.index) as file:
            for rows in _overlapping(file, start, stop, ListedFrame._fields):
                yield from map(ListedFrame, *(column.to_pylist() for column in rows.columns))


def index_in(folder: str) -> str:
    """Return the URI of the index in the folder of a run that scores images, also of one by an earlier version."""
    earlier = storage.join(folder, _EARLIER_INDEX_FILE)
    return earlier if storage.exists(earlier) else storage.join(folder, _INDEX_FILE)


def open_collection(
    data: str,
    *,
    index_uri: str | None,
    allow_root: Sequence[str] | None = None,
    fps: float | None = None,
    windows: WindowSize | None = None,
) -> Collection:
    """Open a collection of images to score.

    Args:
        data: Path or URI of an images table; a folder of images, including subfolders; a list file (`.txt` or `.lst`,
            UTF-8, one path or URI per line, relative to the folder of the list; blank lines and lines that start with
            `#` are ignored); a `.tar`; or a folder of tar files without images. Or a pattern of tar files, with `*`,
            `?`, `[…]`, `{a,b}` and `{000..012}`. Or a video or, with `fps`, a folder or a list of videos. A folder with
            both a table and images counts as a table.
        index_uri: Location of the index, which is written if missing; None keeps the index in the returned object.
            Unused for a table.
        allow_root: Further local folders that links in a folder of images may lead to.
        fps: Frames of videos per second, see `chosen_frames`; None for all. An index that exists decides.
        windows: Windows in which the pictures, TIFF files, are to be read; the data may then also be a single picture.
            None for whole images. An index that exists decides.

    Raises:
        UserError: The data does not exist or contains no image, a tar file is damaged or compressed, the existing
            index belongs to other data, or a URI for the index contains a password. Nothing is written then.
    """
    uri = storage.absolute_uri(data).rstrip("/") or "/"
    if uri.startswith("file://") and not is_pattern(uri):
        uri = storage.resolve(uri)[1]
    try:
        if not is_pattern(uri):
            if not storage.exists(uri):
                raise UserError(
                    f"no such path: {uri}; --data must name a table, a folder of images, a list, tar files or a video"
                )
            if is_table(uri):
                if fps is not None:
                    raise UserError(f"--fps needs videos as --data; {uri} is an images table")
                if windows is not None:
                    raise UserError(f"--windowed needs TIFF files as --data; {uri} is an images table")
                return TableCollection.of(open_table(uri, "images"))
        refuse_password(uri, what="--data")
        if index_uri is None:
            sink = pa.BufferOutputStream()
            _write_index(_listed(uri, allow_root, fps, windows), uri, sink)
            return _indexed(sink.getvalue().to_pybytes(), uri, allow_root)
        if not storage.exists(index_uri):
            listing = _listed(uri, allow_root, fps, windows)
            with storage.open_output(index_uri, sync=True) as file:
                _write_index(listing, uri, file)
        return _indexed(storage.absolute_uri(index_uri), uri, allow_root)
    except PermissionError as error:
        raise UserError(f"cannot read {error.filename or uri}: no permission") from None


def _listed(uri: str, allow_root: Sequence[str] | None, fps: float | None, windows: WindowSize | None) -> Listing:
    reader = FileReader(missing="no such file", roots=_roots_of(uri, allow_root))
    if fps is not None or is_video(uri):
        if windows is not None:
            raise UserError(f"--windowed needs TIFF files as --data; {uri} is a video")
        return with_frames(list_videos(uri, allow_root), reader, fps)
    listing = list_images(uri, allow_root, takes_file=windows is not None)
    return listing if windows is None else with_sizes(listing, reader, windows)


def _roots_of(uri: str, allow_root: Sequence[str] | None) -> LocalRoots:
    return LocalRoots(uri, *(allow_root or ())) if Path(uri).is_dir() else ANYWHERE


def _write_index(listing: Listing, uri: str, file: pa.NativeFile | BinaryIO) -> None:
    """Write the index: a Parquet file of all images, with their fingerprint in its metadata.

    Only one row group is in memory at a time.
    """
    digest = hashlib.sha256(listing.kind.encode())
    num_rows = 0
    schema = pa.schema([_ID_FIELD, *listing.schema])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for rows in _row_groups(listing.batches):
            ids = pa.array(np.arange(num_rows, num_rows + rows.num_rows))
            writer.write_table(pa.Table.from_arrays([ids, *rows.columns], schema=schema))
            for column in rows.columns:
                _add_to_digest(digest, column)
            num_rows += rows.num_rows
        content = {
            "kind": listing.kind,
            "data": uri,
            "fingerprint": digest.hexdigest()[:16],
            "skipped": listing.skipped.total(),
        }
        writer.add_key_value_metadata({_INDEX_KEY: json.dumps(content).encode()})


def _row_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Cut batches of any size into row groups of `INDEX_GROUP_ROWS` rows, except the last."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(own.num_rows for own in pending) >= INDEX_GROUP_ROWS:
            rows = pa.Table.from_batches(pending).combine_chunks()
            while rows.num_rows >= INDEX_GROUP_ROWS:
                yield rows.slice(0, INDEX_GROUP_ROWS)
                rows = rows.slice(INDEX_GROUP_ROWS)
            pending = rows.to_batches()
    if pending:
        yield pa.Table.from_batches(pending)


def _add_to_digest(digest: Any, column: pa.ChunkedArray) -> None:
    """Hash a column of texts or numbers, independently of its chunks; lengths make texts unambiguous."""
    array = column.combine_chunks()
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        digest.update(numbers_of(array).tobytes())
        return
    if pa.types.is_list(array.type):
        _add_to_digest(digest, pa.chunked_array([pc.list_value_length(array)]))
        _add_to_digest(digest, pa.chunked_array([array.flatten()]))
        return
    digest.update(numbers_of(pc.binary_length(array)).tobytes())
    texts = pc.fill_null(array, "").cast(pa.large_string())
    ends = np.frombuffer(texts.buffers()[1], np.int64, count=len(texts) + 1, offset=8 * texts.offset)
    digest.update((texts.buffers()[2] or pa.py_buffer(b"")).slice(int(ends[0]), int(ends[-1] - ends[0])))


def _indexed(index: str | bytes, uri: str, allow_root: Sequence[str] | None) -> IndexedCollection | VideoCollection:
    where = "the index" if isinstance(index, bytes) else index
    try:
        with _open_parquet(index) as file:
            metadata = file.metadata
            content = json.loads((metadata.metadata or {})[_INDEX_KEY])
    except (pa.ArrowInvalid, KeyError):
        raise UserError(f"{where} is not an index of images, or is damaged; choose another output folder") from None
    if content["data"] != uri:
        raise UserError(
            f"{where} lists the images of {content['data']}, not those of {uri}; choose another output folder"
        )
    roots = _roots_of(uri, allow_root)
    if content["kind"] == "video":
        return VideoCollection("video", metadata.num_rows, content["fingerprint"], index, roots, content["skipped"])
    kind = WindowedCollection if content["kind"] == "windowed" else IndexedCollection
    return kind(content["kind"], metadata.num_rows, content["fingerprint"], index, roots, content.get("skipped", 0))


@contextmanager
def _open_parquet(source: str | bytes) -> Iterator[pq.ParquetFile]:
    if isinstance(source, bytes):
        with pq.ParquetFile(pa.BufferReader(source)) as file:
            yield file
        return
    filesystem, path = storage.resolve(source)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        yield file


def _overlapping(file: pq.ParquetFile, start: int, stop: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows from `start` to `stop` of a Parquet file, loading one overlapping row group at a time."""
    first = 0
    for group in range(file.metadata.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        low, high = max(start - first, 0), min(stop - first, num_rows)
        if low < high:
            # In batches, since a binary column of more than 2 GiB does not fit into one array.
            yield from file.read_row_group(group, columns=list(columns)).slice(low, high - low).to_batches()
        first += num_rows


def _table_rows(rows: pa.RecordBatch, reader: FileReader) -> Iterator[ImageRow]:
    contents, paths = (pc.struct_field(rows["image"], name) for name in ("bytes", "path"))
    found = _with_bytes(rows, contents, paths)
    if contents.null_count == 0:
        yield from (row for row, _ in found)
    else:
        yield from _read_ahead(reader, found)


def _with_bytes(rows: pa.RecordBatch, contents: pa.Array, paths: pa.Array) -> Iterator[tuple[ImageRow, Reference]]:
    ids, heights, widths = (numbers_of(rows[name]).tolist() for name in ("image_id", "height", "width"))
    is_valid = numbers_of(contents.is_valid())
    data, starts = bytes_of(contents)
    for number, path in enumerate(paths.to_pylist()):
        height, width = heights[number], widths[number]
        row = ImageRow(
            image_id=ids[number],
            path=path or "",
            data=bytes(data[starts[number] : starts[number + 1]]) if is_valid[number] else None,
            error=None if path or is_valid[number] else "the table has neither bytes nor a path for this image",
            size_hw=(height, width) if height and width else None,
        )
        yield row, Reference(path)


def _read_ahead(reader: FileReader, rows: Iterator[tuple[ImageRow, Reference]]) -> Iterator[ImageRow]:
    """Yield the rows with their data, or with the reason for missing data; only small files are read ahead."""

    def fill(item: tuple[ImageRow, Reference]) -> tuple[ImageRow, Reference]:
        return _filled(*item, reader, _MOST_BYTES_AHEAD), item[1]

    for row, reference in in_order(fill, rows):
        yield _filled(row, reference, reader)


def _filled(row: ImageRow, reference: Reference, reader: FileReader, most_bytes: int | None = None) -> ImageRow:
    """Return the row with its data, or with the reason; unchanged if the file has more than `most_bytes`."""
    if row.data is not None or row.error is not None:
        return row
    try:
        return replace(row, data=reader.read(reference, max_bytes=most_bytes))
    except ReadError as error:
        return row if isinstance(error, SizeError) and most_bytes is not None else replace(row, error=str(error))
