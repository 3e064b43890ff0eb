"""Tar files → offset and size of each image; only headers are read.

A shard that ends early, or lacks a header where one is expected, is refused entirely: the images after that position
would be lost silently.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from raydet.common.errors import UserError
from raydet.common.untrusted.opening import LocalFile
from raydet.images.files import is_image_name, readable

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
_BLOCK_BYTES = 512
_MAX_RECORD_BYTES = 2**20
"""Limit of a record that holds a long name; file systems allow 4 KiB."""
_MAX_RECORDS = 16
_MAX_DIGITS = 20
_RECORDS = frozenset([b"x", b"g", b"X", b"L", b"K", b"N"])
"""Members that describe the following one, and pax's global header, whose values are ignored."""
_REGULAR = frozenset([b"0", b"\0", b"7"])
_WITHOUT_DATA = frozenset([b"1", b"2", b"3", b"4", b"5", b"6"])


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


def image_members(file: pa.NativeFile | LocalFile, name: str) -> list[Member]:
    """List the images in a tar file, in file order; a repeated name is listed each time.

    Images are recognised by extension, as in a folder. Folders, links and sparse files are skipped.

    Args:
        file: The tar file, seekable.
        name: Name of the tar file for messages.

    Raises:
        UserError: The file is compressed, damaged, truncated, or not a tar file.
    """
    num_bytes = file.size()
    walk = _Walk(_Buffered(file, num_bytes), num_bytes)
    try:
        members = [member for member in walk.members() if is_image_name(member.name)]
    except _DamageError as error:
        if any(file.read_at(8, 0).startswith(start) for start in _COMPRESSED_STARTS):
            raise UserError(_compressed(name)) from None
        raise UserError(f"{name} is damaged or not a tar file: {error}") from None
    _check_end(file, name, walk.place, num_bytes)
    return [Member(_clean(member.name), member.offset, member.size) for member in members]


class _DamageError(Exception):
    """A header that cannot be believed."""


class _Buffered:
    """Reader of small pieces of a file in ascending order, with a buffer of `_READ_BYTES`."""

    def __init__(self, file: pa.NativeFile | LocalFile, num_bytes: int) -> None:
        self._file, self._num_bytes = file, num_bytes
        self._start, self._buffer = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from an offset, fewer at the end of the file."""
        size = min(size, self._num_bytes - offset)
        at = offset - self._start
        if at < 0 or at + size > len(self._buffer):
            self._start, at = offset, 0
            self._buffer = self._file.read_at(min(max(size, _READ_BYTES), self._num_bytes - offset), offset)
        return self._buffer[at : at + size]


class _Walk:
    """Walk over the headers of a tar file (V7, ustar, pax and GNU), forward only.

    raydet reads headers itself: Python's `tarfile` seeks backward for negative sizes and holds name records of any
    size in memory.

    Attributes:
        place: Offset of the next header; after the walk, of the end marker or of what is there instead.
    """

    def __init__(self, source: _Buffered, num_bytes: int) -> None:
        self._source, self._num_bytes, self.place = source, num_bytes, 0

    def members(self) -> Iterator[Member]:
        """Yield the regular files.

        Raises:
            _DamageError: A header or record cannot be believed.
        """
        pax: dict[bytes, bytes] = {}
        long_name: bytes | None = None
        num_records = 0
        while (header := self._header()) is not None:
            kind, size = header[156:157], _number(header[124:136])
            if kind in _RECORDS:
                num_records += 1
                if num_records > _MAX_RECORDS:
                    raise _DamageError(f"more than {_MAX_RECORDS} records before one file, at byte {self.place:,}")
                content = self._record(size)
                if kind == b"x":
                    pax |= _pax_values(content)
                elif kind == b"L":
                    long_name = content.split(b"\0", 1)[0]
                continue
            if b"size" in pax:
                size = _decimal(pax[b"size"])
            is_sparse = kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in pax)
            start = self.place
            if kind == b"S":
                start = self._after_sparse_map(header)
            name = pax.get(b"path", long_name) or _name_of(header)
            if kind not in _WITHOUT_DATA and not (kind == b"\0" and name.endswith(b"/")):
                self._skip(start, size)
                if kind in _REGULAR and not is_sparse:
                    yield Member(name.decode(errors="surrogateescape"), start, size)
            pax, long_name, num_records = {}, None, 0
        if pax or long_name is not None:
            raise _DamageError(f"a name without a file at byte {self.place:,}")

    def _header(self) -> bytes | None:
        """Return the next header and move behind it; None where there is none, without moving."""
        header = self._source.read(self.place, _BLOCK_BYTES)
        if len(header) < _BLOCK_BYTES and not self.place:
            raise _DamageError(f"it has only {len(header)} bytes")
        if len(header) < _BLOCK_BYTES or not any(header):
            return None
        stated, unsigned = header[148:156], sum(header) - sum(header[148:156]) + 8 * 0x20
        signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
        if _number(stated) not in (unsigned, signed):
            if self.place:
                return None  # `_check_end` tells what is there instead
            raise _DamageError("its first 512 bytes are not a header")
        self.place += _BLOCK_BYTES
        return header

    def _record(self, size: int) -> bytes:
        """Return the content of a record that belongs to the following file, and move behind it."""
        if size > _MAX_RECORD_BYTES:
            raise _DamageError(f"a name record of {size:,} bytes at byte {self.place:,}")
        start = self.place
        self._skip(start, size)
        return self._source.read(start, size)

    def _skip(self, start: int, size: int) -> None:
        """Move behind the data of a member, which is padded to whole blocks."""
        if not 0 <= size <= self._num_bytes - start:
            raise _DamageError(f"a member of {size:,} bytes at byte {start:,}, where the file has {self._num_bytes:,}")
        self.place = start + -(-size // _BLOCK_BYTES) * _BLOCK_BYTES

    def _after_sparse_map(self, header: bytes) -> int:
        """Return the place behind the map of an old GNU sparse file."""
        place, is_continued = self.place, header[482]
        while is_continued:
            block = self._source.read(place, _BLOCK_BYTES)
            if len(block) < _BLOCK_BYTES:
                raise _DamageError(f"a sparse file without data at byte {place:,}")
            place, is_continued = place + _BLOCK_BYTES, block[504]
        return place


def _name_of(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _number(digits: bytes) -> int:
    """Read a number of a header: octal digits, or base 256 if the first bit is set."""
    if digits[0] & 0x80:
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:]) if digits[0] != 0xFF else -1
    text = digits.split(b"\0", 1)[0].strip()
    if not all(byte in b"01234567" for byte in text):
        raise _DamageError("a header with an invalid number")
    return int(text or b"0", 8)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > _MAX_DIGITS:
        raise _DamageError("a record with an invalid number")
    return int(text)


def _pax_values(content: bytes) -> dict[bytes, bytes]:
    """Return the values in a pax record, of lines `LENGTH KEY=VALUE`."""
    values: dict[bytes, bytes] = {}
    place = 0
    while place < len(content) and content[place]:
        digits, blank, _ = content[place : place + _MAX_DIGITS].partition(b" ")
        size = _decimal(digits) if blank else 0
        key, mark, value = content[place + len(digits) + 1 : place + size].partition(b"=")
        if not mark or not value.endswith(b"\n") or place + size > len(content):
            raise _DamageError("a pax record that cannot be read")
        values[key] = value[:-1]
        place += size
    return values


def _check_end(file: pa.NativeFile | LocalFile, name: str, end: int, num_bytes: int) -> None:
    """Check the end of the archive, since anything but a header ends the walk."""
    tail = file.read_at(min(num_bytes - end, _MAX_PADDING_BYTES), end) if end < num_bytes else b""
    if len(tail) < _BLOCK_BYTES:
        end = min(end, num_bytes)
        raise UserError(f"{name} is truncated: it has no end marker after its {end:,} bytes; copy or create it again")
    if any(tail[:_BLOCK_BYTES]):
        raise UserError(f"{name} is damaged: expected a header at byte {end:,}; copy or create it again")
    if any(tail) or num_bytes - end > _MAX_PADDING_BYTES:
        raise UserError(
            f"{name} continues after its end marker at byte {end:,}: it may be a concatenation of several tar files; "
            "store them separately"
        )


def _clean(name: str) -> str:
    return readable(name.removeprefix("./"))


def _compressed(name: str) -> str:
    return f"{name} is a compressed tar, which does not support random access; unpack it, or store it as a plain .tar"
