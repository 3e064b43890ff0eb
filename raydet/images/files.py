"""Files of a stranger's data: which are images, what a folder holds, and their bytes, or why not."""

import math
import os
import posixpath
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from pyarrow import fs as pafs

from raydet.common.errors import UserError, one_line
from raydet.tables import storage

_COMMON = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "tif", "tiff")
_RARE = ("avif", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm", "heic", "heif")
IMAGE_EXTENSIONS = frozenset(_COMMON + _RARE)
"""Files named so count as found; HEIC is among them to be reported, since Pillow alone does not read it."""
LIST_SUFFIXES = (".txt", ".lst")
"""Of files that list images, a path a line."""
MAX_FILE_BYTES = 2**30
"""Larger files are refused unread: one would not fit into a column of bytes, and no picture needs it."""


class ReadError(Exception):
    """This one file cannot be read; the message is one short reason that a person understands."""


class MissingFileError(ReadError):
    """There is no such file."""


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
            raise UserError(f"cannot open the {what} folder {uri}: {one_line(error)}") from None
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
            raise ReadError(f"cannot be read: {detail_of(error)}") from None


def detail_of(error: Exception) -> str:
    """Say on one line why a file cannot be read, without its name."""
    return one_line(os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error)


def is_image_name(path: str) -> bool:
    """Whether a file is named as an image is."""
    return PurePosixPath(path).suffix[1:].lower() in IMAGE_EXTENSIONS


def beside(folder: str, path: str) -> str:
    """What a relative path in a list means, for a list in this folder."""
    if "://" not in folder:
        return f"{folder}/{path}"
    # In object storage `..` is a name like any other.
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(f'{place}/{path}')}"


def list_below(folder: ImageFolder) -> list[str]:
    """All files below a folder, relative to it, also those to which links lead.

    Raises:
        UserError: A subfolder cannot be listed.
    """
    return _list_local(folder.path) if folder.is_local else storage.list_files(folder.uri, recursive=True)


def image_files_below(folder: ImageFolder) -> list[str]:
    """The image files below a folder, sorted by their relative path; other files are left out by their extension.

    Raises:
        UserError: There is no image file, or a subfolder cannot be listed.
    """
    files = list_below(folder)
    paths = sorted(path for path in files if is_image_name(path))
    if not paths:
        raise UserError(
            f"no image file below {folder.uri} (but {len(files)} others); "
            f"image files end in {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return paths


def _list_local(root: str) -> list[str]:
    """Files below a local folder; links are followed, but not in circles, and dangling ones are listed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}")

    found = []
    for name, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        folder = Path(name)
        here = folder.resolve()
        subfolders[:] = [name for name in subfolders if not _leads_back(folder / name, here)]
        paths = [folder / name for name in files]
        found += [str(path.relative_to(root)) for path in paths if path.is_file() or path.is_symlink()]
    return found


def _leads_back(path: Path, here: Path) -> bool:
    """Whether a path is a link to the folder `here` or to one that contains it."""
    return path.is_symlink() and here.is_relative_to(path.resolve())
