"""Tar files → where each image in them begins and how long it is; only the headers are read.

A shard that ends early, or in which something else stands where a header belongs, is refused as a whole: whatever
comes after that place would be left out without a word.
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
"""One request of remote storage: holds the headers of several small members, and is no longer than a large one."""
_MAX_PADDING_BYTES = 2**20
"""Writers fill a tar up with zeros to a multiple of their record, by default 10 KiB."""


class Member(NamedTuple):
    """An image in a tar file: its name, where its bytes begin in the file, and how many they are."""

    name: str
    offset: int
    size: int

    @property
    def leads_out(self) -> bool:
        """Whether whoever unpacks it would write elsewhere than below the folder; here nothing is ever unpacked."""
        return self.name.startswith("/") or ".." in self.name.split("/")


def refuse_compressed(name: str) -> None:
    """Refuses a compressed tar by its name.

    Raises:
        UserError: It is named as one.
    """
    if name.lower().endswith(COMPRESSED_SUFFIXES):
        raise UserError(_compressed(name))


def image_members(file: pa.NativeFile, name: str) -> list[Member]:
    """Lists the images in a tar file, in the order in which they stand in it.

    Members count as images by their extension, as files in a folder do. Folders, links and sparse files are left out.

    Args:
        file: The tar file, seekable.
        name: What messages call it.

    Raises:
        UserError: It is compressed, damaged, cut off, or no tar file.
    """
    num_bytes = file.size()
    members = []
    try:
        stream = io.BufferedReader(_Stream(file, num_bytes), _READ_BYTES)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # It would keep all of them, a kilobyte each.
                tar.members.clear()  # type: ignore[attr-defined]
                if member.isreg() and not member.issparse() and _is_image(member.name):
                    members.append(Member(_clean(member.name), member.offset_data, member.size))
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if any(file.read_at(8, 0).startswith(start) for start in _COMPRESSED_STARTS):
            raise UserError(_compressed(name)) from None
        raise UserError(f"{name} is damaged or no tar file: {one_line(error)}") from None
    _check_end(file, name, end, num_bytes)
    return members


class _Stream(io.RawIOBase):
    """A file of pyarrow's as tarfile wants it: one may go beyond its end, where there is nothing to read."""

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
    """tarfile takes anything but a header for the end."""
    tail = file.read_at(min(num_bytes - end, _MAX_PADDING_BYTES), end) if end < num_bytes else b""
    if len(tail) < tarfile.BLOCKSIZE:
        raise UserError(f"{name} is cut off: it has no end mark after its {end:,} bytes; copy or make it again")
    if any(tail[: tarfile.BLOCKSIZE]):
        raise UserError(f"{name} is damaged: there is no header at byte {end:,}, where one must be")
    if any(tail) or num_bytes - end > _MAX_PADDING_BYTES:
        raise UserError(
            f"{name} goes on after its end mark at byte {end:,}: it seems to be several tar files put together; "
            "keep them apart"
        )


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix[1:].lower() in IMAGE_EXTENSIONS


def _clean(name: str) -> str:
    return readable(name.removeprefix("./"))


def _compressed(name: str) -> str:
    return f"{name} is a compressed tar, which cannot be read by range; unpack it, or store it as a plain .tar"
