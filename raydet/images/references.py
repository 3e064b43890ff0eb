"""References to files, or to parts of files → bytes."""

import errno
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from raydet.common.errors import UserError
from raydet.common.untrusted.opening import ANYWHERE, LocalFile, LocalRoots
from raydet.images.decode import DecodeError
from raydet.images.files import MissingFileError, ReadError, detail_of, read_error, read_file, refuse_size
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


_NO_NAME = "the file name is not valid text or leaves its folder"


class FileReader:
    """Thread-safe reader of references; it keeps file systems and the most recent tar files open.

    Args:
        missing: Error message for a missing file.
        roots: Folders in which local files must lie.
    """

    def __init__(self, *, missing: str = "the file no longer exists", roots: LocalRoots = ANYWHERE) -> None:
        self._missing, self._roots = missing, roots
        self._filesystems: dict[str, tuple[pafs.FileSystem, str]] = {}
        # An evicted file is closed when the last thread that reads from it is done.
        self._shared_file = lru_cache(maxsize=_OPEN_FILES)(self.open)

    def open(self, uri: str) -> pa.NativeFile | LocalFile:
        """Open a file for random access.

        Raises:
            ReadError: The scheme is unknown.
            OSError: As raised by pyarrow or `LocalRoots.open`.
        """
        filesystem, path = self._locate(uri)
        return self._roots.open(path) if filesystem is None else filesystem.open_input_file(path)

    def open_file(self, uri: str | None) -> pa.NativeFile | LocalFile:
        """Open a file for random access.

        Args:
            uri: Path or URI; None for a name that no file can have.

        Raises:
            ReadError: The file cannot be opened, and a retry would not help.
            OSError: The storage failed, independently of this file.
        """
        if uri is None:
            raise ReadError(_NO_NAME)
        try:
            return self.open(uri)
        except OSError as error:
            reason = self.reason_of(error, uri)
            if reason is None:
                raise
            raise reason from None

    def read(self, reference: Reference, *, max_bytes: int | None = None) -> bytes:
        """Read the bytes of a reference, at most `max_bytes`, by default `MAX_FILE_BYTES`.

        Raises:
            SizeError: There are more bytes.
            ReadError: The bytes cannot be read, and a retry would not help.
            OSError: The storage failed, independently of this file.
        """
        uri, offset, size = reference
        if uri is None:
            raise ReadError(_NO_NAME)
        try:
            if offset is None or size is None:
                filesystem, path = self._locate(uri)
                if filesystem is None:
                    return self._roots.read(path, partial(refuse_size, max_bytes=max_bytes))
                return read_file(filesystem, path, max_bytes)
            refuse_size(size, max_bytes)
            data: bytes = self._shared_file(uri).read_at(size, offset)
        except (OSError, ValueError) as error:
            reason = self.reason_of(error, uri)
            if reason is None:
                raise
            raise reason from None
        if len(data) < size:
            raise ReadError("the tar file is shorter than when it was listed")
        return data

    def reason_of(self, error: Exception, uri: str) -> ReadError | None:
        """Return the reason for rejecting a file, if an error concerns only this file; None if the storage failed."""
        reason = read_error(error)
        if isinstance(reason, MissingFileError):
            return MissingFileError(self._missing)
        if reason is None and isinstance(error, OSError) and not self._is_about_the_file(error, uri):
            return None
        return reason or ReadError(f"cannot be read: {detail_of(error)}")

    def _locate(self, uri: str) -> tuple[pafs.FileSystem | None, str]:
        """Return the file system, None for the local one, and the path inside it."""
        scheme, separator, rest = uri.partition("://")
        if not separator:
            return None, uri
        if scheme == "file":
            return None, unquote(rest)
        if storage.is_web(uri):
            raise ReadError("a web URL: only `raydet prepare images` and `raydet prepare hub` read from the web")
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
