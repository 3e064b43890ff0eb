"""Untrusted image files: recognition by name, listing of folders, bounded reading."""

import math
import os
import posixpath
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs as pafs

from raydet.common.errors import UserError, one_line
from raydet.images.remote_listing import files_below
from raydet.tables import storage

_COMMON = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "tif", "tiff")
_RARE = ("avif", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm", "heic", "heif")
IMAGE_EXTENSIONS = frozenset(_COMMON + _RARE)
"""Extensions of image files; HEIC is included so that it is reported, although Pillow alone cannot read it."""
LIST_SUFFIXES = (".txt", ".lst")
"""Extensions of list files, with one path per line."""
MAX_FILE_BYTES = 2**30
"""Larger files are refused unread: they do not fit into a binary column, and no image needs that size."""


class ReadError(Exception):
    """Failure to read a single file; the message is one short, human-readable reason."""


class MissingFileError(ReadError):
    """Failure caused by a missing file."""


def readable(text: str) -> str:
    """Make text valid UTF-8: escape lone surrogates and NUL, which file names and JSON may contain."""
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def refuse_size(num_bytes: int, max_bytes: int | None = None) -> None:
    """Refuse a file larger than `max_bytes`, by default `MAX_FILE_BYTES`.

    Raises:
        ReadError: The file is too large.
    """
    max_bytes = MAX_FILE_BYTES if max_bytes is None else max_bytes
    if num_bytes > max_bytes:
        limit = math.ceil(max_bytes / 1e6)
        raise ReadError(f"a file of {num_bytes / 1e6:,.0f} MB is over the limit of {limit:,} MB")


def read_file(filesystem: pafs.FileSystem, path: str) -> bytes:
    """Read a file.

    Raises:
        ReadError: The file is too large.
        OSError: As raised by pyarrow.
    """
    if isinstance(filesystem, pafs.GcsFileSystem):
        # Google's client opens random-access files one at a time, but streams in parallel.
        with filesystem.open_input_stream(path, compression=None) as file:
            refuse_size(int(file.metadata()["size"]))
            data: bytes = file.readall()
    else:
        with filesystem.open_input_file(path) as file:
            refuse_size(file.size())
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
    """

    def __init__(self, uri: str, *, what: str = "image") -> None:
        """Open the folder.

        Args:
            uri: Path or URI of the folder.
            what: Kind of its files, in one word, for messages.

        Raises:
            UserError: The folder does not exist or cannot be opened.
        """
        self._given_uri, self._what = storage.absolute_uri(uri), what
        if storage.is_web(uri):
            raise UserError(
                f"{uri} is a web URL, and raydet cannot list folders on the web; copy it to a local folder or object "
                "store, or pass a list of URLs to `raydet prepare images`"
            )
        try:
            self._filesystem, self.path = storage.resolve(uri)
            kind = self._filesystem.get_file_info(self.path).type
        except OSError as error:
            raise UserError(f"cannot open the {what} folder {uri}: {one_line(error)}") from None
        self.is_local = isinstance(self._filesystem, pafs.LocalFileSystem)
        self.uri = self.path if self.is_local else uri.rstrip("/")
        self._subfolders_inside: dict[str, bool] = {}
        if kind == pafs.FileType.NotFound:
            raise UserError(f"no such {what} folder: {self.uri}")
        if kind != pafs.FileType.Directory:
            raise UserError(f"{self.uri} is a file; {what}s must name the folder that contains the {what} files")

    def __reduce__(self) -> tuple[Callable[[], "ImageFolder"], tuple[()]]:
        # Reopened in the receiving process: an S3 file system loses its retry strategy when pickled.
        return partial(ImageFolder, self._given_uri, what=self._what), ()

    def remote_files(self) -> Iterator[pa.LargeStringArray]:
        """Yield arrays of the files below a folder that is not local, as relative paths in ascending order."""
        return files_below(self._filesystem, self.path)

    def uri_of(self, path: str) -> str:
        """Return the absolute path or URI of a file in the folder."""
        return storage.join(self.uri, path)

    def size_of(self, path: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""
        size: int | None = self._filesystem.get_file_info(f"{self.path}/{path}").size
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
            return "the file name leaves the image folder through a symbolic link"
        return None

    def _stays_inside(self, path: str) -> bool:
        """Return True if a path without `..` stays in the folder after resolving links; cached per subfolder."""
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
        """Read a file.

        Raises:
            ReadError: This file cannot be read.
            OSError: The remote storage failed, independently of this file.
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
            raise ReadError(f"cannot be read: {detail_of(error)}") from None


def detail_of(error: Exception) -> str:
    """Return the reason for a read error on one line, without the file name."""
    return one_line(os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error)


def is_image_name(path: str) -> bool:
    """Return True if a file has the extension of an image."""
    return PurePosixPath(path).suffix[1:].lower() in IMAGE_EXTENSIONS


def beside(folder: str, path: str) -> str:
    """Resolve a relative path of a list file in `folder`."""
    if "://" not in folder:
        return f"{folder}/{path}"
    # Object stores do not resolve `..`.
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(f'{place}/{path}')}"


def list_below(folder: ImageFolder) -> list[str]:
    """List all files below a folder as relative paths, following links.

    Raises:
        UserError: A subfolder cannot be listed.
    """
    if folder.is_local:
        return _list_local(folder.path)
    return [path for files in folder.remote_files() for path in files.to_pylist()]


def image_files_below(folder: ImageFolder) -> list[str]:
    """List the image files below a folder, selected by extension and sorted by relative path.

    Raises:
        UserError: There is no image file, or a subfolder cannot be listed.
    """
    files = list_below(folder)
    paths = sorted(path for path in files if is_image_name(path))
    if not paths:
        raise no_image_below(folder, len(files))
    return paths


def no_image_below(folder: ImageFolder, num_files: int) -> UserError:
    """Return the error for a folder without images but with some other files."""
    return UserError(
        f"no image file below {folder.uri} ({num_files} other files); "
        f"image files end in {', '.join(sorted(IMAGE_EXTENSIONS))}"
    )


def _list_local(root: str) -> list[str]:
    """List the files below a local folder, following links except cycles; dangling links are included."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}")

    found = []
    for name, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        folder = Path(name)
        here = folder.resolve()
        subfolders[:] = [name for name in subfolders if not _is_cycle(folder / name, here)]
        paths = [folder / name for name in files]
        found += [str(path.relative_to(root)) for path in paths if path.is_file() or path.is_symlink()]
    return found


def _is_cycle(path: Path, here: Path) -> bool:
    """Return True if a path is a link to the folder `here` or to one of its parents."""
    return path.is_symlink() and here.is_relative_to(path.resolve())
