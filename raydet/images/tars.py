"""Tar files → offset and size of each image; only headers are read.

A shard that ends early, or lacks a header where one is expected, is refused entirely: the images after that position
would be lost silently.
"""

import io
import tarfile
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow as pa

from raydet.common.errors import UserError, one_line
from raydet.images.files import IMAGE_EXTENSIONS, readable

COMPRESSED_SUFFIXES = (
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tbz2",
    ".tbz",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".tzst",
    ".tar.lz4",
)
_COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_READ_BYTES = 32 * 2**10
"""Size of a request to remote storage: covers the headers of several small members, but little of a large one."""
_MAX_PADDING_BYTES = 2**20
"""Limit of the zeros at the end; writers pad a tar to a multiple of their record size, by default 10 KiB."""


class Member(NamedTuple):
    """An image in a tar file: name, offset of its bytes in the file, and their number."""

    name: str
    offset: int
    size: int

    @property
    def leaves_folder(self) -> bool:
        """True if unpacking would write outside the target folder; raydet never unpacks."""
        return self.name.startswith("/") or ".." in self.name.split("/")


def refuse_compressed(name: str) -> None:
    """Refuse a compressed tar by its name.

    Raises:
        UserError: The name ends like that of a compressed tar.
    """
    if name.lower().endswith(COMPRESSED_SUFFIXES):
        raise UserError(_compressed(name))


def image_members(file: pa.NativeFile, name: str) -> list[Member]:
    """List the images in a tar file, in file order.

    Images are recognised by extension, as in a folder. Folders, links and sparse files are skipped.

    Args:
        file: The tar file, seekable.
        name: Name of the tar file for messages.

    Raises:
        UserError: The file is compressed, damaged, truncated, or not a tar file.
    """
    num_bytes = file.size()
    members = []
    try:
        stream = io.BufferedReader(_SeekableFile(file, num_bytes), _READ_BYTES)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile would keep all headers in memory, a kilobyte each.
                tar.members.clear()  # type: ignore[attr-defined]
                if member.isreg() and not member.issparse() and _is_image(member.name):
                    members.append(Member(_clean(member.name), member.offset_data, member.size))
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if any(file.read_at(8, 0).startswith(start) for start in _COMPRESSED_STARTS):
            raise UserError(_compressed(name)) from None
        raise UserError(f"{name} is damaged or not a tar file: {one_line(error)}") from None
    _check_end(file, name, end, num_bytes)
    return members


class _SeekableFile(io.RawIOBase):
    """Adapter from a pyarrow file to the interface of tarfile; seeking past the end is allowed."""

    def __init__(self, file: pa.NativeFile, num_bytes: int) -> None:
        self._file, self._num_bytes, self._place = file, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._num_bytes}[whence]
        return self._place

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        num_bytes = min(len(buffer), self._num_bytes - self._place)
        if num_bytes <= 0:
            return 0
        data = self._file.read_at(num_bytes, self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _check_end(file: pa.NativeFile, name: str, end: int, num_bytes: int) -> None:
    """Check the end of the archive, since tarfile takes anything but a header for the end."""
    tail = file.read_at(min(num_bytes - end, _MAX_PADDING_BYTES), end) if end < num_bytes else b""
    if len(tail) < tarfile.BLOCKSIZE:
        raise UserError(f"{name} is truncated: it has no end marker after its {end:,} bytes; copy or create it again")
    if any(tail[: tarfile.BLOCKSIZE]):
        raise UserError(f"{name} is damaged: expected a header at byte {end:,}; copy or create it again")
    if any(tail) or num_bytes - end > _MAX_PADDING_BYTES:
        raise UserError(
            f"{name} continues after its end marker at byte {end:,}: it may be a concatenation of several tar files; "
            "store them separately"
        )


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix[1:].lower() in IMAGE_EXTENSIONS


def _clean(name: str) -> str:
    return readable(name.removeprefix("./"))


def _compressed(name: str) -> str:
    return f"{name} is a compressed tar, which does not support random access; unpack it, or store it as a plain .tar"
