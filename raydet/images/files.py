"""Untrusted image files: recognition by name, listing of folders, bounded reading."""

import math
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath

import pyarrow as pa
from pyarrow import fs as pafs

from raydet.common.errors import UserError, one_line
from raydet.common.untrusted.opening import LocalRoots, NotAFileError, OutsideError
from raydet.images.remote_listing import files_below
from raydet.tables import storage
from raydet.tables.table import is_table, tables_in

_COMMON = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "tif", "tiff")
_RARE = ("avif", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm", "heic", "heif")
IMAGE_EXTENSIONS = frozenset(_COMMON + _RARE)
"""Extensions of image files; HEIC is included so that it is reported, although Pillow alone cannot read it."""
VIDEO_EXTENSIONS = frozenset(("mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "mts", "m2ts"))
"""Extensions of video files."""
LIST_SUFFIXES = (".txt", ".lst")
"""Extensions of list files, with one path per line."""
MAX_FILE_BYTES = 2**30
"""Larger files are refused unread: they do not fit into a binary column, and no image needs that size."""
MAX_LABEL_BYTES = 16 * 2**20
"""Larger files with the labels of one image are refused: each is parsed in memory, a box takes a hundred bytes."""
LEAVES_BY_LINK = "the file name leaves its folder through a symbolic link; --allow-root permits folders outside"
_MAX_LINKED_FOLDERS = 10_000
_MAX_ENDINGS_SHOWN = 5
_NO_PREPARATION = "commands that take images, such as predict and inspect, read a table as it is"


class ReadError(Exception):
    """Failure to read a single file; the message is one short, human-readable reason."""


class MissingFileError(ReadError):
    """Failure caused by a missing file."""


class SizeError(ReadError):
    """Failure caused by a file that is too large."""


def readable(text: str) -> str:
    """Make text valid UTF-8: escape lone surrogates and NUL, which file names and JSON may contain."""
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def refuse_size(num_bytes: int, max_bytes: int | None = None) -> None:
    """Refuse a file larger than `max_bytes`, by default `MAX_FILE_BYTES`.

    Raises:
        SizeError: The file is too large.
    """
    max_bytes = MAX_FILE_BYTES if max_bytes is None else max_bytes
    if num_bytes > max_bytes:
        limit = math.ceil(max_bytes / 1e6)
        raise SizeError(f"a file of {num_bytes / 1e6:,.0f} MB is over the limit of {limit:,} MB")


def read_file(filesystem: pafs.FileSystem, path: str, max_bytes: int | None = None) -> bytes:
    """Read a file of a store; `LocalRoots.read` reads local ones.

    Raises:
        ReadError: The file is too large.
        OSError: As raised by pyarrow.
    """
    if isinstance(filesystem, pafs.GcsFileSystem):
        # Google's client opens random-access files one at a time, but streams in parallel.
        with filesystem.open_input_stream(path, compression=None) as file:
            refuse_size(int(file.metadata()["size"]), max_bytes)
            data: bytes = file.readall()
    else:
        with filesystem.open_input_file(path) as file:
            refuse_size(file.size(), max_bytes)
            data = file.readall()
    return data


def refuse_name(path: str) -> str | None:
    """Return the reason why a path cannot be stored in a table; None if it can."""
    return "the file name is not valid text" if readable(path) != path else None


class ImageFolder:
    """A folder of images or label files, on disk or in object storage, opened once and read by many threads.

    Attributes:
        uri: Absolute path or URI of the folder.
        path: Path inside the folder's file system.
        is_local: True if the folder is on a local file system.
        roots: The folder and further folders that its links may lead to, if it is local.
    """

    def __init__(self, uri: str, *, what: str = "image", allow_root: Sequence[str] | None = None) -> None:
        """Open the folder.

        Args:
            uri: Path or URI of the folder.
            what: Kind of its files, in one word, for messages.
            allow_root: Further local folders that links in the folder may lead to.

        Raises:
            UserError: The folder does not exist or cannot be opened.
        """
        self._given_uri, self._what, self._allow_root = storage.absolute_uri(uri), what, tuple(allow_root or ())
        if storage.is_web(uri):
            raise UserError(
                f"{uri} is a web URL, and raydet cannot list folders on the web; copy it to a local folder or object "
                "store, or pass a list of URLs to `raydet prepare images`"
            )
        try:
            self._filesystem, self.path = storage.resolve(uri)
            kind = self._filesystem.get_file_info(self.path).type
        except UserError:
            raise
        except (OSError, ValueError) as error:  # a path with NUL is a ValueError
            raise UserError(f"cannot open the {what} folder {uri}: {one_line(error)}") from None
        self.is_local = isinstance(self._filesystem, pafs.LocalFileSystem)
        self.uri = self.path if self.is_local else uri.rstrip("/")
        self.roots = LocalRoots(self.path, *self._allow_root) if self.is_local else LocalRoots()
        self._subfolders_inside: dict[str, bool] = {}
        if kind == pafs.FileType.NotFound:
            raise UserError(f"no such {what} folder: {self.uri}")
        if kind != pafs.FileType.Directory:
            raise UserError(f"{self.uri} is a file; {what}s must name the folder that contains the {what} files")

    def __reduce__(self) -> tuple[Callable[[], "ImageFolder"], tuple[()]]:
        # Reopened in the receiving process: an S3 file system loses its retry strategy when pickled.
        return partial(ImageFolder, self._given_uri, what=self._what, allow_root=self._allow_root), ()

    def remote_files(self) -> Iterator[pa.LargeStringArray]:
        """Yield arrays of the files below a folder that is not local, as relative paths in ascending order."""
        return files_below(self._filesystem, self.path)

    def uri_of(self, path: str) -> str:
        """Return the absolute path or URI of a file in the folder."""
        return storage.join(self.uri, path)

    def size_of(self, path: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist, as no file of an impossible name does."""
        try:
            size: int | None = self._filesystem.get_file_info(f"{self.path}/{path}").size
        except (OSError, ValueError):
            if not self.is_local:
                raise
            return None
        return size

    def refuse_outside(self, path: str) -> str | None:
        """Return how a relative path leaves the folder, as a reason to refuse it; None if it stays inside."""
        if refuse_name(path):
            return refuse_name(path)
        if "://" in path or path.startswith("/") or path[1:3] == ":/":
            return "the file name is not relative to the image folder"
        if ".." in path.split("/"):
            return "the file name leaves the image folder through `..`"
        if self.is_local and not self._stays_inside(path):
            return LEAVES_BY_LINK
        return None

    def _stays_inside(self, path: str) -> bool:
        """Return True if a path without `..` stays in the folder after resolving links; cached per subfolder.

        `read` judges the file that it opens; this only tells early, without opening it.
        """
        full = f"{self.path}/{path}"
        if os.path.islink(full):  # noqa: PTH114 Path raises for names that are too long
            return self.roots.contain(os.path.realpath(full))
        subfolder = path.rpartition("/")[0]
        if subfolder not in self._subfolders_inside:
            self._subfolders_inside[subfolder] = self.roots.contain(os.path.realpath(f"{self.path}/{subfolder}"))
        return self._subfolders_inside[subfolder]

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """Read a file of at most `max_bytes` bytes, by default `MAX_FILE_BYTES`.

        Raises:
            ReadError: This file cannot be read.
            OSError: The remote storage failed, independently of this file.
        """
        full = f"{self.path}/{path}"
        try:
            if self.is_local:
                return self.roots.read(full, partial(refuse_size, max_bytes=max_bytes))
            return read_file(self._filesystem, full, max_bytes)
        except (OSError, ValueError) as error:
            reason = read_error(error)
            if reason is None and not self.is_local:
                raise
            raise reason or ReadError(f"cannot be read: {detail_of(error)}") from None


def read_error(error: Exception) -> ReadError | None:
    """Return the reason for rejecting a file, if an error concerns only this file on any storage, else None."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingFileError("no such file")
    if isinstance(error, OutsideError):
        return ReadError(LEAVES_BY_LINK)
    if isinstance(error, NotAFileError):
        return ReadError(str(error.strerror))
    if isinstance(error, PermissionError):
        return ReadError("no permission to read it")
    return None


def detail_of(error: Exception) -> str:
    """Return the reason for a read error on one line, without the file name."""
    return one_line(os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error)


def is_image_name(path: str) -> bool:
    """Return True if a file has the extension of an image."""
    return PurePosixPath(path).suffix[1:].lower() in IMAGE_EXTENSIONS


def is_video_name(path: str) -> bool:
    """Return True if a file has the extension of a video."""
    return PurePosixPath(path).suffix[1:].lower() in VIDEO_EXTENSIONS


def beside(folder: str, path: str) -> str:
    """Resolve a relative path of a list file in `folder`."""
    if "://" not in folder:
        return f"{folder}/{path}"
    # Object stores do not resolve `..`.
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(f'{place}/{path}')}"


def list_below(folder: ImageFolder) -> list[str]:
    """List all files below a folder as relative paths, following links.

    A link to a folder outside of the allowed ones is listed like a file. So are pipes, devices and dangling links:
    reading them gives the reason for rejecting them.

    Raises:
        UserError: A subfolder cannot be listed, or there are too many links between folders.
    """
    if folder.is_local:
        return [path for path, _ in _list_local(folder)]
    return [path for files in folder.remote_files() for path in files.to_pylist()]


def image_files_below(folder: ImageFolder, skipped: Counter[str] | None = None) -> list[str]:
    """List the image files below a folder, selected by extension and sorted by relative path.

    Links that lead outside the allowed folders are included, those to folders whatever their names.

    Args:
        folder: The folder.
        skipped: Counts the other files by extension.

    Raises:
        UserError: There is no image file, all are links that lead outside, or a subfolder cannot be listed.
    """
    others = Counter[str]() if skipped is None else skipped
    paths = images_below(folder, others)
    if not paths:
        raise no_image_below(folder, others.total())
    return paths


def images_below(folder: ImageFolder, skipped: Counter[str]) -> list[str]:
    """List the image files below a folder as `image_files_below` does; there may be none."""
    return _files_of_kind(folder, skipped, is_image_name, "image files")


def videos_below(folder: ImageFolder, skipped: Counter[str]) -> list[str]:
    """List the video files below a folder as `image_files_below` does for images; there may be none."""
    return _files_of_kind(folder, skipped, is_video_name, "videos")


def _files_of_kind(
    folder: ImageFolder, skipped: Counter[str], is_wanted: Callable[[str], bool], what: str
) -> list[str]:
    listed = _list_local(folder) if folder.is_local else ((path, False) for path in list_below(folder))
    paths, num_outside = [], 0
    for path, is_outside in listed:
        if is_wanted(path) or is_outside:
            paths.append(path)
            num_outside += is_outside
        else:
            skipped[PurePosixPath(path).suffix.lower() or "none"] += 1
    if paths and num_outside == len(paths):
        raise all_outside(folder, paths, what)
    return sorted(paths)


def skipped_detail(skipped: Counter[str]) -> str:
    """List the commonest extensions of skipped files with their counts."""
    shown = ", ".join(f"{ending} ({count:,})" for ending, count in skipped.most_common(_MAX_ENDINGS_SHOWN))
    return readable(shown + (", …" if len(skipped) > _MAX_ENDINGS_SHOWN else ""))


def all_outside(folder: ImageFolder, paths: Iterable[str], what: str) -> UserError:
    """Return the error for a folder of which all files are links that lead out of it; names the option for them."""
    paths = list(paths)
    targets = [os.path.realpath(folder.uri_of(path)) for path in paths[:1000]]
    places = {os.path.dirname(target) for target in targets}  # noqa: PTH120
    return UserError(
        f"all {len(paths):,} {what} below {folder.uri} are symbolic links that lead out of it, such as "
        f"{readable(paths[0])} to {readable(targets[0])}; to allow that, set --allow-root "
        f"{readable(os.path.commonpath(places))}"
    )


def no_image_below(folder: ImageFolder, num_files: int) -> UserError:
    """Return the error for a folder without images but with some other files, such as tables."""
    if is_table(folder.uri):
        return UserError(f"no image file below {folder.uri}: it is a table already; {_NO_PREPARATION}")
    if tables := tables_in(folder.uri, "images"):
        return UserError(f"no image file below {folder.uri}: it holds images tables ({tables[0]}); {_NO_PREPARATION}")
    return UserError(
        f"no image file below {folder.uri} ({num_files} other files); "
        f"image files end in {', '.join(sorted(IMAGE_EXTENSIONS))}"
    )


def _list_local(folder: ImageFolder) -> Iterator[tuple[str, bool]]:
    """Yield the files below a local folder, with True for links that lead outside, following other links but cycles."""
    num_linked = 0
    waiting = [("", os.path.realpath(folder.path))]
    while waiting:
        place, real = waiting.pop()
        here = f"{folder.path}/{place}"
        try:
            with os.scandir(here) as entries:
                found = list(entries)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"cannot list {readable(here.rstrip('/'))}: {reason}") from None
        for entry in found:
            path = place + entry.name
            if not entry.is_symlink():
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((f"{path}/", f"{real}/{entry.name}"))
                else:
                    yield path, False
                continue
            target = os.path.realpath(entry.path)
            is_inside = folder.roots.contain(target)
            if not is_inside or not os.path.isdir(target):  # noqa: PTH112 Path raises for names that are too long
                yield path, not is_inside
            elif not f"{real}/".startswith(f"{target.rstrip('/')}/"):
                num_linked += 1
                if num_linked > _MAX_LINKED_FOLDERS:
                    raise UserError(
                        f"more than {_MAX_LINKED_FOLDERS:,} symbolic links to folders below {folder.uri}; "
                        "name a folder without them"
                    )
                waiting.append((f"{path}/", target))
