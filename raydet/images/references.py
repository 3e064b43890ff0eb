"""References to files, or to parts of files → bytes."""

import errno
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from raydet.common.errors import UserError
from raydet.images.decode import DecodeError
from raydet.images.files import ReadError, detail_of, read_file, refuse_size
from raydet.tables import storage

_OPEN_FILES = 16
_ENVIRONMENT_ERRORS = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
}


class Reference(NamedTuple):
    """Location of an image's bytes: a complete file, or `size` bytes at `offset` of a tar file.

    Attributes:
        uri: Absolute path or URI. After the bucket it is literal: blanks, `?`, `#` and `%` belong to the name. None if
            the name is not valid text, or leaves the folder or tar file in which it was found.
        offset: Start of the bytes in a tar file; None for a complete file.
        size: Number of bytes in a tar file; None for a complete file.
    """

    uri: str | None
    offset: int | None = None
    size: int | None = None


class FileReader:
    """Thread-safe reader of references; it keeps file systems and the most recent tar files open.

    Args:
        missing: Error message for a missing file.
    """

    def __init__(self, *, missing: str = "the file no longer exists") -> None:
        self._missing = missing
        self._filesystems: dict[str, tuple[pafs.FileSystem, str]] = {}
        # An evicted file is closed when the last thread that reads from it is done.
        self._shared_file = lru_cache(maxsize=_OPEN_FILES)(self.open)

    def open(self, uri: str) -> pa.NativeFile:
        """Open a file for random access.

        Raises:
            ReadError: The scheme is unknown.
            OSError: As raised by pyarrow.
        """
        filesystem, path = self._locate(uri)
        return filesystem.open_input_file(path)

    def read(self, reference: Reference) -> bytes:
        """Read the bytes of a reference.

        Raises:
            ReadError: The bytes cannot be read, and a retry would not help.
            OSError: The storage failed, independently of this file.
        """
        uri, offset, size = reference
        if uri is None:
            raise ReadError("the file name is not valid text or leaves its folder")
        try:
            if offset is None or size is None:
                return read_file(*self._locate(uri))
            refuse_size(size)
            data: bytes = self._shared_file(uri).read_at(size, offset)
        except FileNotFoundError:
            raise ReadError(self._missing) from None
        except PermissionError:
            raise ReadError("no permission to read it") from None
        except ValueError as error:
            raise ReadError(f"cannot be read: {detail_of(error)}") from None
        except OSError as error:
            if not self._is_about_the_file(error, uri):
                raise
            raise ReadError(f"cannot be read: {detail_of(error)}") from None
        if len(data) < size:
            raise ReadError("the tar file is shorter than when it was listed")
        return data

    def _locate(self, uri: str) -> tuple[pafs.FileSystem, str]:
        scheme, separator, rest = uri.partition("://")
        if not separator:
            return pafs.LocalFileSystem(), uri
        if scheme == "file":
            return pafs.LocalFileSystem(), unquote(rest)
        # Only the root is parsed as a URI: a complete URI may not contain blanks, and `%` and `?` are special in it.
        authority, _, name = rest.partition("/")
        root = f"{scheme}://{authority}"
        if root not in self._filesystems:
            try:
                self._filesystems[root] = storage.resolve(root)
            except UserError as error:
                raise ReadError(str(error)) from None
        filesystem, base = self._filesystems[root]
        return filesystem, f"{base}/{name}"

    def _is_about_the_file(self, error: OSError, uri: str) -> bool:
        is_local = uri.partition("://")[0] == "file" or "://" not in uri
        return is_local and error.errno not in _ENVIRONMENT_ERRORS


def read_reference(uri: str) -> bytes:
    """Read a file by its absolute path or URI; raises as `FileReader.read` does."""
    return FileReader().read(Reference(uri))


def image_bytes(image: Mapping[str, Any]) -> bytes:
    """Return the encoded image of a table's row: its stored bytes, or the content of the file at its path.

    Raises:
        DecodeError: The file cannot be read.
    """
    if image["bytes"] is not None:
        return bytes(image["bytes"])
    try:
        return read_reference(image["path"])
    except ReadError as error:
        raise DecodeError(str(error)) from None
    except OSError as error:
        raise DecodeError(f"the file cannot be read: {error.strerror or error}") from None
