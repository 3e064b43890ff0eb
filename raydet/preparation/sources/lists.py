"""A list of images without labels: a text file with a path or URL per line, or a CSV file with such a column.

The conventions are those of `predict`'s lists: UTF-8; blank lines and lines that start with `#` are ignored; relative
paths start at the list's folder; each line is an image, in order, repetitions included. The list itself may be on the
web; a folder there cannot be listed.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from urllib.parse import urljoin

import pyarrow as pa
from pyarrow import csv as pa_csv

from raydet.common.errors import UserError, one_line
from raydet.common.redaction import name_of_url, refuse_password
from raydet.common.untrusted.text import TextError, decode_text
from raydet.images.files import LIST_SUFFIXES, MAX_FILE_BYTES, ImageFolder, ReadError, beside, readable, refuse_name
from raydet.preparation.sources.source import SOURCE_ID, Source, SourceImage
from raydet.preparation.sources.web import WebReader, address_of
from raydet.tables import storage
from raydet.tables.schema import build_schema

CSV_COLUMNS = ("url", "uri", "path", "file_name", "filename", "image")
"""The first of these columns in a CSV file, in any case, names the images; other columns are carried through."""


def is_list(uri: str) -> bool:
    """Return True if the suffix of a URI marks a list of images; a web URL always is one, as the web has no folders."""
    if storage.is_web(uri):
        return True
    return uri.lower().endswith((*LIST_SUFFIXES, ".csv")) and not os.path.isdir(uri)  # noqa: PTH112 long names


class ImageList:
    """Reader for the files that a list names, local or remote; thread-safe.

    Attributes:
        uri: Absolute path or URI of the list.
    """

    def __init__(self, uri: str, *, web: WebReader | None = None) -> None:
        """Make a reader without opening anything."""
        self.uri = uri if storage.is_web(uri) else storage.absolute_uri(uri)
        self._web = web or WebReader()
        self._roots: dict[str, ImageFolder] = {}

    def __reduce__(self) -> tuple[Callable[[], "ImageList"], tuple[()]]:
        # The receiving process opens the folders itself.
        return partial(ImageList, self.uri, web=self._web), ()

    def name_hosts(self, roots: Iterable[str]) -> None:
        """Let servers redirect to these hosts (`scheme://host`) although they may be on this machine or its networks.

        They are the hosts that the list names.
        """
        named = set()
        for root in roots:
            with contextlib.suppress(ValueError):  # the address of an image that will be rejected
                named.add(address_of(root).origin)
        self._web = dataclasses.replace(self._web, named=frozenset(named))

    def uri_of(self, path: str) -> str:
        """Return the absolute path or URI of a line of the list."""
        if storage.is_web(self.uri):
            return urljoin(self.uri, path)
        if "://" in path or path.startswith("/"):
            return path
        return beside(self.uri.rpartition("/")[0], path)

    def check_root(self, uri: str) -> None:
        """Open the bucket of a URI; local files and web URLs need nothing.

        Raises:
            UserError: The scheme is unknown, or there is no such bucket.
        """
        if not storage.is_web(uri):
            self._root_of(uri)

    def read(self, path: str) -> bytes:
        """Read the file that a line names.

        Raises:
            ReadError: This file cannot be read.
            OSError: The remote storage failed, for reasons that do not concern this file. A failing web server raises a
                ReadError instead.
        """
        uri = self.uri_of(path)
        if storage.is_web(uri):
            return self._web.read(uri)
        folder, name = self._root_of(uri)
        return folder.read(name)

    def _root_of(self, uri: str) -> tuple[ImageFolder, str]:
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme == "file":
            root, name = "/", storage.resolve(uri)[1].lstrip("/")
        else:
            bucket, _, name = rest.partition("/")
            root = f"{scheme}://{bucket}"
        if root not in self._roots:
            self._roots[root] = ImageFolder(root)
        return self._roots[root], name


def read_list(images: ImageList, *, for_reference: bool = False) -> Source:
    """Read a list of images.

    Args:
        images: The list.
        for_reference: True if the table will refer to the images, which must therefore be files.

    Returns:
        One record per line, whose id is the index of the image; the column `source_id` holds the line, a URL
        without its query (see `name_of_url`). The files themselves are not opened.

    Raises:
        UserError: The list cannot be read, is not text, or names no image, a folder or an unknown scheme.
    """
    name = (images.uri.partition("?")[0] if storage.is_web(images.uri) else images.uri).lower()
    if not name.endswith((*LIST_SUFFIXES, ".csv")):
        hint = "name a list of URLs" if storage.is_web(images.uri) else "name a folder, or a list of paths or URLs"
        raise UserError(f"{images.uri} is not a list: {hint} ({', '.join(LIST_SUFFIXES)} or .csv)")
    data = _read_bytes(images.uri)
    columns = _read_csv(data, images.uri) if name.endswith(".csv") else None
    paths = _lines(data, images.uri) if columns is None else columns["source_id"].to_pylist()
    if not paths:
        raise UserError(f"{images.uri} is an empty list: it names no images; write one path or URL per line")
    images.name_hosts(_check(paths, images, for_reference))
    fields = SOURCE_ID if columns is None else tuple(columns.schema)

    def records() -> Iterator[SourceImage]:
        for number, (path, extra) in enumerate(zip(paths, _extras(columns, paths), strict=True)):
            # The query of a URL may hold a signature, which gives access to everyone who can read the table.
            shown = _stored_name(path) if storage.is_web(images.uri_of(path)) else path
            yield SourceImage(
                number, shown, extra={**extra, "source_id": shown}, refusal=refuse_name(path), locator=path
            )

    return Source(records, num_images=len(paths), extra_fields=fields)


def _stored_name(path: str) -> str:
    """Return the stored name of a line that is a URL, or is relative to the URL of its list."""
    if storage.is_web(path):
        return name_of_url(path)
    return name_of_url(f"http://host/{path}").removeprefix("http://host/") if "?" in path else path


def _read_bytes(uri: str) -> bytes:
    try:
        return WebReader().read(uri) if storage.is_web(uri) else storage.read_bytes(uri, max_bytes=MAX_FILE_BYTES)
    except ReadError as error:
        raise UserError(f"cannot read {uri}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"no such list: {uri}") from None
    except OSError as error:
        raise UserError(f"cannot read the list {uri}: {one_line(error)}") from None


def _lines(data: bytes, uri: str) -> list[str]:
    try:
        lines = decode_text(data).split("\n")
    except TextError as error:
        raise UserError(f"{uri} is {error}; save the list as UTF-8, one path or URL per line") from None
    named = (line.strip() for line in lines)
    return [readable(line) for line in named if line and not line.startswith("#")]


def _read_csv(data: bytes, uri: str) -> pa.Table:
    """Read the column of images as `source_id`, and the other columns that a table can hold."""
    try:
        table = pa_csv.read_csv(pa.BufferReader(decode_text(data).encode()))
    except (pa.ArrowInvalid, pa.ArrowKeyError, TextError) as error:
        raise UserError(f"{uri} is not a CSV file with a header: {one_line(error)}") from None
    by_name = {name.lower(): name for name in reversed(table.column_names)}
    chosen = next((by_name[name] for name in CSV_COLUMNS if name in by_name), None)
    if chosen is None:
        raise UserError(
            f"{uri} has none of the columns {', '.join(CSV_COLUMNS)}; it has {', '.join(table.column_names)}"
        )
    if table.column_names.count(chosen) > 1:
        raise UserError(f"{uri} has the column {chosen} twice")
    paths = table[chosen].cast(pa.string())
    if paths.null_count or "" in paths.unique().to_pylist():
        raise UserError(f"the column {chosen} of {uri} has rows without an image; each row must name one")
    taken = {*build_schema("images").names, "source_id", chosen}
    others = [name for name in table.column_names if name not in taken and table.column_names.count(name) == 1]
    columns = {"source_id": paths}
    for name in others:
        column = table[name]
        columns[name] = column.cast(pa.string()) if pa.types.is_null(column.type) else column
    return pa.table(columns)


def _extras(columns: pa.Table | None, paths: list[str]) -> Iterable[dict[str, object]]:
    if columns is None:
        return ({"source_id": path} for path in paths)
    return (row for batch in columns.to_batches(max_chunksize=1024) for row in batch.to_pylist())


def _check(paths: list[str], images: ImageList, for_reference: bool) -> list[str]:
    """Refuse folders, unknown schemes and missing buckets before anything is read; return the web servers named."""
    seen: set[str] = set()
    for number, path in enumerate(paths, start=1):
        if path.endswith("/"):
            raise UserError(f"image {number} of {images.uri} is a folder: {path}; a list names image files")
        uri = images.uri_of(path)
        if for_reference and storage.is_web(uri):
            raise UserError(
                f"image {number} of {images.uri} is a web URL: {path}; --image-storage reference requires files or "
                "objects of a store, since every later step reads the images again"
            )
        if storage.is_web(images.uri) and not storage.is_web(uri):
            raise UserError(
                f"image {number} of {images.uri} is not a web URL: {path}; a list on the web can only name URLs"
            )
        if "@" in uri or (for_reference and "?" in uri):
            refuse_password(uri, what=f"image {number} of {images.uri}")
        root = "/".join(uri.split("/")[:3]) if "://" in uri else ""
        if root not in seen:
            seen.add(root)
            try:
                images.check_root(uri)
            except (UserError, OSError) as error:
                raise UserError(f"image {number} of {images.uri}: {one_line(error)}") from None
    return [root for root in seen if storage.is_web(root)]
