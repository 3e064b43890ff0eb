"""A reference to a file, or to a part of one → its bytes."""

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
_NOT_THE_FILES_FAULT = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
}


class Reference(NamedTuple):
    """Where an image's bytes are: a whole file, or `size` bytes from `offset` on (of a tar file).

    `uri` is an absolute path or a URI. What follows the bucket is taken as it stands: blanks, `?`, `#` and `%` belong
    to the name. It is None where there is no way to say it, since the name is no valid text, and where the file must
    not be read, since its name leads out of the folder or tar file that it was found in.
    """

    uri: str | None
    offset: int | None = None
    size: int | None = None


class FileReader:
    """Reads references; safe among threads. File systems and the last few tar files stay open while it lives.

    Args:
        missing: The reason for a file that is not there.
    """

    def __init__(self, *, missing: str = "the file is not there any more") -> None:
        self._missing = missing
        self._filesystems: dict[str, tuple[pafs.FileSystem, str]] = {}
        # A file that falls out is closed as soon as no thread reads from it any more.
        self._shared_file = lru_cache(maxsize=_OPEN_FILES)(self.open)

    def open(self, uri: str) -> pa.NativeFile:
        """Opens a file for reading at any place in it.

        Raises:
            ReadError: No file system is known for the scheme.
            OSError: As pyarrow raises it.
        """
        filesystem, path = self._locate(uri)
        return filesystem.open_input_file(path)

    def read(self, reference: Reference) -> bytes:
        """Reads the bytes behind a reference.

        Raises:
            ReadError: They cannot be read, and will not be the next time.
            OSError: The storage fails, which says nothing about this file.
        """
        uri, offset, size = reference
        if uri is None:
            raise ReadError("the file name is not valid text or leads out of its folder")
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
            raise ReadError("the tar file has become shorter than it was when it was listed")
        return data

    def _locate(self, uri: str) -> tuple[pafs.FileSystem, str]:
        scheme, separator, rest = uri.partition("://")
        if not separator:
            return pafs.LocalFileSystem(), uri
        if scheme == "file":
            return pafs.LocalFileSystem(), unquote(rest)
        # Only the root is read as a URI: in a whole one, blanks are refused and `%` and `?` have a meaning.
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
        return is_local and error.errno not in _NOT_THE_FILES_FAULT


def read_reference(uri: str) -> bytes:
    """Reads one whole file by its absolute path or URI; raises as `FileReader.read` does."""
    return FileReader().read(Reference(uri))


def image_bytes(image: Mapping[str, Any]) -> bytes:
    """The encoded image of a table's row: the bytes that it holds, or those that its path leads to.

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
