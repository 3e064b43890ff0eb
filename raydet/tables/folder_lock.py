"""Locks against two runs writing one output: a kernel lock on file systems, a lease on object stores.

A file system with locks, including NFS, releases a lock when the process that holds it dies. Object stores have no
locks, so a run keeps a lease there: a small object that it renews every few seconds. A lease is alive while its content
changes, so the clocks of the machines need not agree.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydet.common.errors import RunError, UserError
from raydet.common.untrusted.documents import DocumentError, parse_json
from raydet.tables import storage

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_MAX_LOCK_BYTES = 2**16
_RETRY_INTERVAL_S = 0.5
_MAX_ATTEMPTS = 100
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LeaseTimes:
    """Timing of a lease, in seconds.

    Attributes:
        renew_s: Interval between renewals.
        watch_s: A lease unchanged for this long belongs to a dead run.
        settle_s: Two runs that start simultaneously both write a lease; after this time both see who owns it.
    """

    renew_s: float = 5.0
    watch_s: float = 20.0
    settle_s: float = 2.0


class Hold:
    """The exclusive right to write an output, valid inside `hold`."""

    def check(self) -> None:
        """Check that the output still belongs to this run.

        Raises:
            RunError: Another run has taken it.
        """


@contextlib.contextmanager
def hold(
    folder: str,
    name: str,
    *,
    out: str,
    command: str,
    notify: Callable[[str], None] = lambda _: None,
    wait_s: float = 0.0,
    times: LeaseTimes | None = None,
) -> Iterator[Hold]:
    """Context manager: keep other runs out of an output while the block runs; remove the lock file afterwards.

    Args:
        folder: Folder or URI for the lock file; created if missing.
        name: Name of the lock file; the lease in an object store has `.json` appended.
        out: Output as named in error messages.
        command: Running command, shown to a run that is refused.
        notify: Receives one line if acquiring the lock takes time.
        wait_s: Time to wait for another run to release a file-system lock before raising.
        times: Timing of a lease.

    Yields:
        The hold; long runs call its `check` periodically.

    Raises:
        UserError: Another run is writing the output, or the lock file is a link, device or other special file.
        OSError: The lock file cannot be written.
    """
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "command": command,
        "machine": _this_machine(),
    }
    if storage.is_local(folder):
        lock = _lock(Path(storage.resolve(folder)[1], name), out, me, wait_s)
        if lock is not None:
            try:
                yield Hold()
            finally:
                lock.release()
            return
    lease = _Lease(storage.join(folder, f"{name}.json"), out, me, times or LeaseTimes())
    try:
        lease.take(notify)
        yield lease
    finally:
        lease.release()


class _Lock:
    """A locked, open file."""

    def __init__(self, path: Path, descriptor: int, *, is_new_folder: bool) -> None:
        self._path, self._descriptor, self._is_new_folder = path, descriptor, is_new_folder

    def release(self) -> None:
        """Remove the file, then unlock it, so that a waiting run notices the removal."""
        with contextlib.suppress(OSError):
            if _is_same_file(self._path, self._descriptor):
                self._path.unlink()
                if self._is_new_folder:  # fails unless empty; a refused run leaves no folder behind
                    self._path.parent.rmdir()
        # Unlock explicitly: a forked child may hold a copy of the descriptor, and closing ours keeps the lock.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def _lock(path: Path, out: str, me: dict[str, Any], wait_s: float) -> _Lock | None:
    """Lock a local file; return None if its file system has no locks."""
    deadline, is_new_folder = time.monotonic() + wait_s, not path.parent.exists()
    while True:
        descriptor = _open_lock_file(path, out)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _parsed(os.pread(descriptor, _MAX_LOCK_BYTES, 0)) or {}
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise _in_use(out, other) from None
            time.sleep(_RETRY_INTERVAL_S)
            continue
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            raise
        lock = _Lock(path, descriptor, is_new_folder=is_new_folder)
        if not _is_same_file(path, descriptor):  # the previous owner has just removed it
            lock.release()
            continue
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(me, indent=1).encode(), 0)
        except OSError:
            lock.release()
            raise
        return lock


def _open_lock_file(path: Path, out: str) -> int:
    for _ in range(_MAX_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Python opens files non-inheritable, so child processes do not keep the lock.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except (FileExistsError, FileNotFoundError):
            if path.parent.is_file():
                raise
            continue  # another run has just removed the folder
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _no_lock_file(path, out) from None
            raise
        if _is_plain(descriptor):
            return descriptor
        os.close(descriptor)
        raise _no_lock_file(path, out)
    raise FileNotFoundError(errno.ENOENT, "cannot create the folder", str(path.parent))


def _is_plain(descriptor: int) -> bool:
    """Return True for a regular file with one name; False for devices, pipes and hard links."""
    state = os.fstat(descriptor)
    return stat.S_ISREG(state.st_mode) and state.st_nlink < 2


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


class _Lease(Hold):
    """A hold that must be renewed: the object names its owner and counts the renewals."""

    def __init__(self, uri: str, out: str, me: dict[str, Any], times: LeaseTimes) -> None:
        self._uri, self._out, self._times = uri, out, times
        self._content = {"token": uuid.uuid4().hex, **me, "renewals": 0}
        self._stop, self._taken_by = threading.Event(), ""
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self, notify: Callable[[str], None]) -> None:
        """Acquire the lease and start renewing it.

        Raises:
            UserError: Another run is alive.
        """
        other = self._read()
        if other is not None and not _is_dead_here(other):
            notify(f"{self._out} may be in use by {_who(other)}; watching it for up to {self._times.watch_s:.0f} s")
            self._watch(other)
        self._write()
        time.sleep(self._times.settle_s)
        winner = self._read()
        if not self._is_mine(winner):
            raise _in_use(self._out, winner or {})
        self._thread.start()

    def check(self) -> None:
        if self._taken_by:
            raise RunError(
                f"{self._taken_by} has taken over the output {self._out}, so this run stopped: it was paused or "
                f"disconnected from the store for over {self._times.watch_s:.0f} s; the files it wrote are complete"
            )

    def release(self) -> None:
        """Release the output, if it still belongs to this run."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._times.watch_s)
        try:
            if self._is_mine(self._read()):
                storage.delete_file(self._uri)
        except OSError as error:
            _LOG.warning("cannot remove %s: %s", self._uri, error)

    def _watch(self, other: dict[str, Any]) -> None:
        deadline = time.monotonic() + self._times.watch_s
        while time.monotonic() < deadline:
            time.sleep(self._times.watch_s / 20)
            now = self._read()
            if now is None:
                return
            if now != other:
                raise _in_use(self._out, now)

    def _keep(self) -> None:
        while not self._stop.wait(self._times.renew_s):
            try:
                found = self._read()
                if not self._is_mine(found):
                    self._taken_by = _who(found) if found else "another run, now finished,"
                    return
                self._content["renewals"] += 1
                self._write()
            except Exception as error:
                # The next renewal may succeed, and it notices if another run has taken the lease meanwhile.
                _LOG.warning("cannot renew %s: %s", self._uri, error)

    def _is_mine(self, content: dict[str, Any] | None) -> bool:
        return content is not None and content.get("token") == self._content["token"]

    def _read(self) -> dict[str, Any] | None:
        try:
            return _parsed(storage.read_bytes(self._uri))
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        storage.write_bytes(self._uri, json.dumps(self._content, indent=1).encode())


def _this_machine() -> list[str]:
    """Return host, boot and PID namespace; processes with equal values can look each other up by process id."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        names.append(str(Path("/proc/self/ns/pid").readlink()))
    return names


def _is_dead_here(lease: dict[str, Any]) -> bool:
    if lease.get("machine") != _this_machine():
        return False
    try:
        os.kill(int(lease["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _in_use(out: str, other: dict[str, Any]) -> UserError:
    return UserError(f"--out {out} is in use by {_who(other)}; wait for it to finish, stop it, or choose another --out")


def _no_lock_file(path: Path, out: str) -> UserError:
    return UserError(
        f"--out {out}: {path} is a link or special file where raydet needs its lock file; remove it, or choose another "
        "--out"
    )


def _who(other: dict[str, Any]) -> str:
    names = {name: other.get(name, "?") for name in ("command", "host", "pid", "since")}
    if "pid" not in other:
        return "another run"
    return "another run ({command} on {host}, process {pid}, since {since})".format(**names)


def _parsed(data: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; return None for other content, such as a file still being written."""
    try:
        content = parse_json(data, max_bytes=_MAX_LOCK_BYTES)
    except DocumentError:
        return None
    return content if isinstance(content, dict) else None
