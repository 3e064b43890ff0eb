"""Where images tables come from: one small module a format, each yielding the same records."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
from pyarrow import fs as pafs

from raydet import storage
from raydet.errors import UserError
from raydet.schema import Category
from raydet.sources.spill import Spilled

MAX_FILE_BYTES = 2**30
"""Larger files are refused unread: one would not fit into a column of bytes, and no picture needs it."""


class ReadError(Exception):
    """This one file cannot be read; the message is one short reason that a person understands."""


class MissingFileError(ReadError):
    """There is no such file."""


@dataclass(frozen=True)
class Finding:
    """Something odd in a data set: a row of the table of findings.

    Attributes:
        kind: What, in words that are the same for all of its kind.
        path: The image or the file of annotations, relative to its folder; None where it is about none.
        image_id: As in the images table, where it is known.
        annotation_id: Likewise, of a single box.
        count: How often.
        detail: What this one was, and what became of it.
    """

    kind: str
    path: str | None = None
    image_id: int | None = None
    annotation_id: int | None = None
    count: int = 1
    detail: str | None = None


class FindingLog(Counter[str]):
    """How often each kind of finding occurs, by its kind, and each of them in `rows`, which are on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Spilled[Finding] = Spilled(Finding)

    def note(self, finding: Finding) -> None:
        """Adds a finding; one that occurs zero times is none."""
        if finding.count:
            self[finding.kind] += finding.count
            self.rows.append(finding)


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
        content_hash: Of its bytes, if they have been read and found to be a picture before; None otherwise.
        locator: What the source's images are read by where that is not the path; None where it is.
    """

    image_id: int
    path: str
    objects: SourceObjects | None = None
    size_hw: tuple[int, int] | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    refusal: str | None = None
    content_hash: bytes | None = None
    locator: str | None = None


class Records(Iterable[SourceImage]):
    """The records of a source, made anew each time they are gone through."""

    def __init__(self, make: Callable[[], Iterator[SourceImage]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[SourceImage]:
        return self._make()


@dataclass(frozen=True)
class Source:
    """A data set before it is a table.

    Attributes:
        images: One record for each image found, in the order of the rows; to be gone through more than once.
        num_images: How many these are.
        categories: The classes, in the order of their indices.
        extra_fields: Arrow fields of the records' `extra` values.
        findings: What was odd in the annotations.
    """

    images: Iterable[SourceImage]
    num_images: int
    categories: tuple[Category, ...] = ()
    extra_fields: tuple[pa.Field, ...] = ()
    findings: FindingLog = field(default_factory=FindingLog)


def readable(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates and NUL, which file names and JSON may contain, become escapes."""
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def refuse_size(num_bytes: int, max_bytes: int | None = None) -> None:
    """Refuses a file by its size; the limit is `MAX_FILE_BYTES` unless another is given.

    Raises:
        ReadError: It is too large.
    """
    max_bytes = MAX_FILE_BYTES if max_bytes is None else max_bytes
    if num_bytes > max_bytes:
        limit = math.ceil(max_bytes / 1e6)
        raise ReadError(f"a file of {num_bytes / 1e6:,.0f} MB is over the limit of {limit:,} MB")


def read_file(filesystem: pafs.FileSystem, path: str) -> bytes:
    """Reads one file.

    Raises:
        ReadError: It is too large.
        OSError: As pyarrow raises it.
    """
    if isinstance(filesystem, pafs.GcsFileSystem):
        # Its client opens files for reading at any place one after the other, and streams side by side.
        with filesystem.open_input_stream(path, compression=None) as file:
            refuse_size(int(file.metadata()["size"]))
            data: bytes = file.readall()
    else:
        with filesystem.open_input_file(path) as file:
            refuse_size(file.size())
            data = file.readall()
    return data


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
        self._given_uri, self._what = storage.absolute_uri(uri), what
        if storage.is_web(uri):
            raise UserError(
                f"{uri} is on the web, where no folder can be listed; copy it to a folder or store, or give "
                "`raydet prepare images` a list of addresses"
            )
        try:
            self._filesystem, self.path = storage.resolve(uri)
            kind = self._filesystem.get_file_info(self.path).type
        except OSError as error:
            raise UserError(f"cannot open the {what} folder {uri}: {' '.join(str(error).split())}") from None
        self.is_local = isinstance(self._filesystem, pafs.LocalFileSystem)
        self.uri = self.path if self.is_local else uri.rstrip("/")
        self._subfolders_inside: dict[str, bool] = {}
        if kind == pafs.FileType.NotFound:
            raise UserError(f"no such {what} folder: {self.uri}")
        if kind != pafs.FileType.Directory:
            raise UserError(f"{self.uri} is a file; {what}s must name the folder or URI that holds the {what} files")

    def __reduce__(self) -> tuple[Callable[[], "ImageFolder"], tuple[()]]:
        # Opened anew in the process that it is sent to: S3's file system would arrive without its patience.
        return partial(ImageFolder, self._given_uri, what=self._what), ()

    def uri_of(self, path: str) -> str:
        """The absolute path or URI of a file in it."""
        return storage.join(self.uri, path)

    def size_of(self, path: str) -> int | None:
        """Bytes of a file in it; None where there is none."""
        size: int | None = self._filesystem.get_file_info(f"{self.path}/{path}").size
        return size

    def refuse_outside(self, path: str) -> str | None:
        """Why a relative path must not be followed because it leads out of the folder; None where it stays inside."""
        if refuse_name(path):
            return refuse_name(path)
        if "://" in path or path.startswith("/") or path[1:3] == ":/":
            return "the file name is not relative to the image folder"
        if ".." in path.split("/"):
            return "the file name climbs out of the image folder"
        if self.is_local and not self._stays_inside(path):
            return "the file name leads out of the image folder through a symbolic link"
        return None

    def _stays_inside(self, path: str) -> bool:
        """Whether a path without `..` stays in the folder when links are followed; asks once for each subfolder."""
        full = f"{self.path}/{path}"
        if Path(full).is_symlink():
            return self._is_inside(os.path.realpath(full))
        subfolder = path.rpartition("/")[0]
        if subfolder not in self._subfolders_inside:
            self._subfolders_inside[subfolder] = self._is_inside(os.path.realpath(f"{self.path}/{subfolder}"))
        return self._subfolders_inside[subfolder]

    def _is_inside(self, real_path: str) -> bool:
        return Path(real_path).is_relative_to(os.path.realpath(self.path))

    def read(self, path: str) -> bytes:
        """Reads one file.

        Raises:
            ReadError: This file cannot be read.
            OSError: The remote storage fails, which says nothing about this file.
        """
        try:
            return read_file(self._filesystem, f"{self.path}/{path}")
        except FileNotFoundError:
            raise MissingFileError("no such file") from None
        except PermissionError:
            raise ReadError("no permission to read it") from None
        except (OSError, ValueError) as error:
            if not self.is_local:
                raise
            detail = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise ReadError(f"cannot be read: {' '.join(detail.split())}") from None
