"""Where images tables come from: one small module a format, each yielding the same records."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from raydet import storage
from raydet.errors import UserError
from raydet.schema import Category

MAX_FILE_BYTES = 2**30
"""Larger files are refused unread: one would not fit into a column of bytes, and no picture needs it."""

_NUM_THREADS = 16
_ITEMS_AT_ONCE = 4096

Item = TypeVar("Item")
Result = TypeVar("Result")


class ReadError(Exception):
    """This one file cannot be read; the message is one short reason that a person understands."""


class MissingFileError(ReadError):
    """There is no such file."""


@dataclass(frozen=True)
class SourceObjects:
    """The boxes of one image as its source has them: not yet clipped, possibly without area.

    Attributes:
        ids: The source's own ids, [N].
        boxes_xywh: Absolute pixels (left, top, width, height), [N, 4].
        categories: Indices from 0 into the source's categories, [N].
        areas: Square pixels of the objects, [N].
        iscrowd: Whether the box stands for a crowd, [N].
        is_normalised: Boxes and areas are in parts of the upright image instead, whose size is not known yet.
    """

    ids: list[int] = field(default_factory=list)
    boxes_xywh: list[tuple[float, float, float, float]] = field(default_factory=list)
    categories: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    iscrowd: list[bool] = field(default_factory=list)
    is_normalised: bool = False


@dataclass(frozen=True)
class SourceImage:
    """One image as its source names it.

    Attributes:
        image_id: Unique, 0 ≤ id < 2⁵³.
        path: Relative to the source's folder, with `/`.
        objects: Its boxes; None where the source has no labels.
        size_hw: Height and width that the source states, which may be wrong; None where it states none.
        extra: Values of the source's extra columns.
        refusal: Why this image must not be read; None where it may.
    """

    image_id: int
    path: str
    objects: SourceObjects | None = None
    size_hw: tuple[int, int] | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    refusal: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set before it is a table.

    Attributes:
        images: One record for each image found, in the order of the rows.
        num_images: How many these are.
        categories: The classes, in the order of their indices.
        extra_fields: Arrow fields of the records' `extra` values.
        findings: What was odd in the annotations, in words, and how often.
    """

    images: Iterable[SourceImage]
    num_images: int
    categories: tuple[Category, ...] = ()
    extra_fields: tuple[pa.Field, ...] = ()
    findings: Mapping[str, int] = field(default_factory=dict)


def readable(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates and NUL, which file names and JSON may contain, become escapes."""
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def refuse_name(path: str) -> str | None:
    """Why a path cannot stand in a table; None where it can."""
    return "the file name is not valid text" if readable(path) != path else None


def read_class_names(classes: Sequence[str]) -> list[str]:
    """The names of classes as the option `classes` has them: the names, or one .txt file with a name a line.

    Raises:
        UserError: There is no such file, it holds no text, or no name or one twice is given.
    """
    names = [name.strip() for name in classes]
    if len(names) == 1 and names[0].endswith(".txt"):
        try:
            text = storage.read_bytes(names[0]).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the classes in {names[0]}: {' '.join(str(error).split())}") from None
        names = [line.strip() for line in text.splitlines() if line.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names or not all(names) or repeated:
        raise UserError(f"classes must be names that differ, got {repeated[0] if repeated else classes!r}")
    return [readable(name) for name in names]


def in_threads(items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Does the same to each item, some side by side since remote storage answers late; results in the items' order."""
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="labels") as pool:
        for start in range(0, len(items), _ITEMS_AT_ONCE):
            yield from pool.map(work, items[start : start + _ITEMS_AT_ONCE])


class ImageFolder:
    """A folder of images or of their labels, on disk or in object storage, opened once and read by many threads.

    Attributes:
        uri: Its absolute path or URI.
        path: Its path inside its file system.
        is_local: Whether it is on this machine's own disks.
    """

    def __init__(self, uri: str, *, what: str = "image") -> None:
        """Opens the folder.

        Args:
            uri: Where it is.
            what: Its files, in one word, for messages.

        Raises:
            UserError: There is no such folder.
        """
        self._filesystem, self.path = storage.resolve(uri)
        self.is_local = isinstance(self._filesystem, pafs.LocalFileSystem)
        self.uri = self.path if self.is_local else uri.rstrip("/")
        kind = self._filesystem.get_file_info(self.path).type
        if kind == pafs.FileType.NotFound:
            raise UserError(f"no such {what} folder: {self.uri}")
        if kind != pafs.FileType.Directory:
            raise UserError(f"{self.uri} is a file; {what}s must name the folder or URI that holds the {what} files")

    def uri_of(self, path: str) -> str:
        """The absolute path or URI of a file in it."""
        return storage.join(self.uri, path)

    def refuse_outside(self, path: str) -> str | None:
        """Why a relative path must not be followed because it leads out of the folder; None where it stays inside."""
        if refuse_name(path):
            return refuse_name(path)
        if "://" in path or path.startswith("/") or path[1:3] == ":/":
            return "the file name is not relative to the image folder"
        if ".." in path.split("/"):
            return "the file name climbs out of the image folder"
        if self.is_local:
            root = Path(os.path.realpath(self.path))
            if not Path(os.path.realpath(root / path)).is_relative_to(root):
                return "the file name leads out of the image folder through a symbolic link"
        return None

    def read(self, path: str) -> bytes:
        """Reads one file.

        Raises:
            ReadError: This file cannot be read.
            OSError: The remote storage fails, which says nothing about this file.
        """
        try:
            with self._filesystem.open_input_file(f"{self.path}/{path}") as stream:
                num_bytes = stream.size()
                if num_bytes > MAX_FILE_BYTES:
                    limit = math.ceil(MAX_FILE_BYTES / 1e6)
                    raise ReadError(f"a file of {num_bytes / 1e6:,.0f} MB is over the limit of {limit:,} MB")
                data: bytes = stream.readall()
                return data
        except FileNotFoundError:
            raise MissingFileError("no such file") from None
        except PermissionError:
            raise ReadError("no permission to read it") from None
        except (OSError, ValueError) as error:
            if not self.is_local:
                raise
            detail = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise ReadError(f"cannot be read: {' '.join(detail.split())}") from None
