"""Names of local files → open descriptors of regular files inside the folders that the user allowed.

Names in a data set come from strangers: a name can lead to a pipe, a device, a file outside the data set, or nowhere.
The descriptor that was opened is judged, not its name, so exchanging a link between check and use gains nothing.
"""

import errno
import io
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_NONBLOCK", 0)
_PATH_FLAGS = getattr(os, "O_PATH", 0) | getattr(os, "O_CLOEXEC", 0)
_DESCRIPTORS = "/proc/self/fd"
_CAN_LOOK_FIRST = hasattr(os, "O_PATH") and Path(_DESCRIPTORS).is_dir()
"""True if a descriptor can be judged before the file is opened, which can have effects (Linux)."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


class OutsideError(OSError):
    """The name leads to a file outside the allowed folders."""


class NotAFileError(OSError):
    """The name leads to something other than a regular file."""


class LocalRoots:
    """The folders in which files may lie after all links are resolved; thread-safe and picklable.

    Attributes:
        folders: Absolute paths; empty if files may lie anywhere.
    """

    def __init__(self, *folders: str) -> None:
        self.folders = folders
        self._real = tuple(os.path.realpath(os.path.expanduser(folder)) for folder in folders)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalRoots) and other.folders == self.folders

    def __hash__(self) -> int:
        return hash(self.folders)

    def __reduce__(self) -> tuple[Callable[[], "LocalRoots"], tuple[()]]:
        return partial(LocalRoots, *self.folders), ()

    def contain(self, real_path: str) -> bool:
        """Return True if a path without links lies in one of the folders, or is one of them."""
        return not self._real or any(
            real_path == root or real_path.startswith(root.rstrip("/") + "/") for root in self._real
        )

    def open(self, path: str) -> "LocalFile":
        """Open a regular file, without waiting for anything.

        Raises:
            OutsideError: The file is not in one of the folders.
            NotAFileError: The path leads to a folder, pipe, socket or device.
            OSError: The file cannot be opened; names that no file can have count too.
        """
        descriptor, size = self.descriptor_of(path)
        return LocalFile(descriptor, size)

    def read(self, path: str, refuse_size: Callable[[int], None]) -> bytes:
        """Read a whole file, as it was when it was opened; raises as `open` does.

        `refuse_size` raises if the size in bytes is too large; it is called before anything is read.
        """
        descriptor, size = self.descriptor_of(path)
        try:
            refuse_size(size)
            return _read_at(descriptor, size, 0)
        finally:
            os.close(descriptor)

    def descriptor_of(self, path: str, *, follows_links: bool = True) -> tuple[int, int]:
        """Return the descriptor, which the caller closes, and the size in bytes of a file that may be read.

        Raises as `open` does; without `follows_links`, a link counts as something other than a file.
        """
        flags = (_PATH_FLAGS if _CAN_LOOK_FIRST else _FLAGS) | (0 if follows_links else os.O_NOFOLLOW)
        try:
            looked_at = os.open(path, flags)
        except ValueError:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        except OSError as error:
            if follows_links or error.errno != errno.ELOOP:
                raise
            raise NotAFileError(errno.EINVAL, f"it is {_KINDS[stat.S_IFLNK]}, not a file") from None
        is_open = False
        try:
            size = self._judge(path, looked_at)
            is_open = not _CAN_LOOK_FIRST
            return looked_at if is_open else os.open(f"{_DESCRIPTORS}/{looked_at}", _FLAGS), size
        except OSError as error:
            error.filename = path  # not that of the descriptor
            raise
        finally:
            if not is_open:
                os.close(looked_at)

    def _judge(self, path: str, descriptor: int) -> int:
        """Return the size of an open file in bytes, if it may be read."""
        status = os.fstat(descriptor)
        if self._real and not self.contain(_real_path_of(path, descriptor, status)):
            raise OutsideError(errno.EPERM, "it is outside its folder")
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise NotAFileError(errno.EINVAL, f"it is {kind}, not a file")
        return status.st_size


ANYWHERE = LocalRoots()
"""For files that the user named: regular ones, wherever they are."""


class LocalFile(io.RawIOBase):
    """An open regular file, with the interface of a pyarrow file; positional reads are thread-safe.

    A file that grows while it is read has the size that it had when it was opened; files of `/proc` state none and are
    therefore empty.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        super().__init__()
        self._descriptor, self._size, self._place = descriptor, size, 0

    def size(self) -> int:
        """Return the size in bytes at the time of opening."""
        return self._size

    def read_at(self, num_bytes: int, offset: int) -> bytes:
        """Return up to `num_bytes` bytes from an offset, fewer at the end of the file."""
        return _read_at(self._descriptor, min(num_bytes, self._size - offset), offset)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the place of the next read."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readall(self) -> bytes:
        """Return the rest of the file."""
        data = self.read_at(self._size, self._place)
        self._place += len(data)
        return data

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Read into a buffer from the current place."""
        data = self.read_at(len(buffer), self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file; a second call has no effect."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _read_at(descriptor: int, num_bytes: int, offset: int) -> bytes:
    if num_bytes <= 0:
        return b""
    data = os.pread(descriptor, num_bytes, offset)
    if len(data) == num_bytes:
        return data
    parts, place = [data], len(data)
    while parts[-1] and place < num_bytes:
        parts.append(os.pread(descriptor, num_bytes - place, offset + place))
        place += len(parts[-1])
    return b"".join(parts)


def _real_path_of(path: str, descriptor: int, status: os.stat_result) -> str:
    """Return the path of an open file without links.

    Raises:
        OutsideError: The path led to another file meanwhile.
    """
    if _CAN_LOOK_FIRST:
        return os.readlink(f"{_DESCRIPTORS}/{descriptor}")  # noqa: PTH115 half the time of Path
    real = os.path.realpath(path)
    if not os.path.samestat(status, os.lstat(real)):
        raise OutsideError(errno.EPERM, "its path changed while it was opened")
    return real


def refusal_in_folder(folder: str, *, is_opened: Callable[[str], bool] = lambda _: True) -> str | None:
    """Return the first file below a local folder that other libraries must not open, with the reason; None if none.

    `is_opened` returns False for the name of a file that they do not open.
    """
    paths = (str(Path(place, name)) for place, _, names in os.walk(folder) for name in names if is_opened(name))
    return next((f"{path!r} {reason}" for path in paths if (reason := refusal_of_name(path)) is not None), None)


def refusal_of_name(path: str) -> str | None:
    """Return why a program that opens a local path by name must not do so, as the end of a sentence; None if it may.

    For readers of other libraries: they would wait for a pipe, and open devices.
    """
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else f"is {_KINDS.get(stat.S_IFMT(mode), 'special')}"
