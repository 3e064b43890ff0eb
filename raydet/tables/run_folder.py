"""The output folder of a long run: one run at a time writes into it, and only the same run goes on with it.

`hold` keeps others out while a run is at work. `open_run` says what the run is: the first one writes it down, with its
plan, and a later one must be the same. What is done are the files that are there.

On a file system that can lock files, which NFS can, the lock is the kernel's and is gone with its process, however that
ends. An object store has no locks: there a run keeps a lease, a small object that it renews every few seconds. The
clocks of the machines need not agree, as a lease is watched for whether it moves.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raydet.common.errors import RunError, UserError
from raydet.common.redaction import without_secrets
from raydet.common.version import __version__
from raydet.tables import storage

RUN_FILE = "_run.json"
LOCK_FILE = "_lock"
LEASE_FILE = "_lock.json"
RENEW_EVERY_S = 5.0
WATCH_S = 20.0
"""A lease that has not moved for so long is a dead run's."""
SETTLE_S = 2.0
"""Two runs that start at once both write their lease; after this time both see whose it is."""

_RUN_SCHEMA = 1
_PART_NAME = re.compile(r"part-(\d{7,})\.parquet")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_FINGERPRINTS = {
    "checkpoint_fingerprint": "the checkpoint's weights or settings have changed since",
    "data_fingerprint": "the images have changed since",
}
_LOG = logging.getLogger(__name__)


class Hold:
    """The right to write into a folder, while `hold` lasts."""

    def check(self) -> None:
        """Makes sure that the folder is still this run's.

        Raises:
            RunError: Another run has taken it.
        """


class _Lease(Hold):
    """A right that must be renewed: the object says whose it is and how often it was renewed."""

    def __init__(self, out: str, me: dict[str, Any]) -> None:
        self._out, self._uri = out, storage.join(out, LEASE_FILE)
        self._content = {"token": uuid.uuid4().hex, **me, "renewals": 0}
        self._stop, self._taken_by = threading.Event(), ""
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self, tell: Callable[[str], None]) -> None:
        """Makes the lease this run's and starts to renew it; `UserError` where another run is alive."""
        other = _read_json(self._uri)
        if other is not None and not _is_dead_here(other):
            tell(f"{self._out} may be in use by {_who(other)}: watching it for up to {WATCH_S:.0f} s")
            self._watch(other)
        self._write()
        time.sleep(SETTLE_S)
        winner = _read_json(self._uri)
        if not self._is_mine(winner):
            raise _in_use(self._out, winner or {})
        self._thread.start()

    def check(self) -> None:
        if self._taken_by:
            raise RunError(
                f"the output folder {self._out} was taken by {self._taken_by}, so this run has stopped: it must have "
                f"been paused, or cut off from the store, for more than {WATCH_S:.0f} s; what it wrote is whole"
            )

    def release(self) -> None:
        """Gives the folder back, if it is still this run's."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=WATCH_S)
        try:
            if self._is_mine(_read_json(self._uri)):
                storage.delete_file(self._uri)
        except OSError as error:
            _LOG.warning("cannot remove %s: %s", self._uri, error)

    def _watch(self, other: dict[str, Any]) -> None:
        deadline = time.monotonic() + WATCH_S
        while time.monotonic() < deadline:
            time.sleep(WATCH_S / 20)
            now = _read_json(self._uri)
            if now is None:
                return
            if now != other:
                raise _in_use(self._out, now)

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_EVERY_S):
            try:
                found = _read_json(self._uri)
                if not self._is_mine(found):
                    self._taken_by = _who(found) if found else "another run, which has ended"
                    return
                self._content["renewals"] += 1
                self._write()
            except Exception as error:
                # The next one may succeed; if another run takes the lease in the meantime, that is seen then.
                _LOG.warning("cannot renew %s: %s", self._uri, error)

    def _is_mine(self, content: dict[str, Any] | None) -> bool:
        return content is not None and content.get("token") == self._content["token"]

    def _write(self) -> None:
        storage.write_bytes(self._uri, json.dumps(self._content, indent=1).encode())


@contextlib.contextmanager
def hold(out: str, *, what: str, tell: Callable[[str], None] = lambda _: None) -> Iterator[Hold]:
    """Keeps other runs out of a folder for the time of a `with`.

    Args:
        out: Folder or URI; it is made if it is not there.
        what: The command at work, for whom it keeps out.
        tell: Is told, in one line, why starting takes time.

    Yields:
        The hold, to be asked with `check` now and then.

    Raises:
        UserError: Another run is writing into the folder, or it cannot be written.
    """
    out = storage.absolute_uri(out)
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "command": what,
        "machine": _this_machine(),
    }
    if storage.is_local(out):
        lock = _lock(Path(storage.resolve(out)[1]), me)
        if lock is not None:
            try:
                yield Hold()
            finally:
                lock.unlink()
            return
    lease = _Lease(out, me)
    try:
        lease.take(tell)
        yield lease
    finally:
        lease.release()


class _Lock:
    """An open, locked file."""

    def __init__(self, path: Path, descriptor: int, *, is_new_folder: bool) -> None:
        self._path, self._descriptor, self._is_new_folder = path, descriptor, is_new_folder

    def unlink(self) -> None:
        """Removes the file before it is unlocked, so that who waits for it sees that this one is no more."""
        with contextlib.suppress(OSError):
            if _is_same_file(self._path, self._descriptor):
                self._path.unlink()
                if self._is_new_folder:  # and still empty, or this fails: a run that found a mistake leaves nothing
                    self._path.parent.rmdir()
        # Unlocked by name: a forked child may have a copy of the descriptor, and closing one leaves the lock.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def _lock(folder: Path, me: dict[str, Any]) -> _Lock | None:
    """Locks a local folder; None where its file system has no locks."""
    path, is_new_folder = folder / LOCK_FILE, not folder.exists()
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Not inherited by processes that are started: Python opens files so.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = _read_json(str(path)) or {}
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            if isinstance(error, BlockingIOError):
                raise _in_use(str(folder), other) from None
            raise
        if _is_same_file(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(me, indent=1).encode())
            return _Lock(path, descriptor, is_new_folder=is_new_folder)
        os.close(descriptor)  # The run that held it has just ended and removed it.


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _this_machine() -> list[str]:
    """Processes that read the same here can look each other up by their ids: host, boot, container."""
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
    return UserError(
        f"--out {out} is in use by {_who(other)}; wait until that is done, end it, or choose another folder"
    )


def _who(other: dict[str, Any]) -> str:
    if "pid" not in other:
        return "another run"
    return f"another run ({other['command']} on {other['host']}, process {other['pid']}, since {other['since']})"


def _read_json(uri: str) -> dict[str, Any] | None:
    """None where there is nothing that can be read: not there, or just being written."""
    try:
        content = json.loads(storage.read_bytes(uri))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def check_folder(out: str, *, what: str) -> None:
    """Refuses a folder with files of others, before anything is written into it.

    Args:
        out: Folder or URI; it need not be there.
        what: That it is to hold, such as "detections".

    Raises:
        UserError: It has files, and they are not those of a run. Names that begin with `_` or `.` do not count.
    """
    if storage.exists(storage.join(out, RUN_FILE)):
        return
    foreign = [name for name in storage.list_files(out) if not name.startswith(("_", "."))]
    if foreign:
        raise UserError(
            f"--out {out} holds files that are no {what} of raydet, such as {foreign[0]}; choose another folder"
        )


def open_run(out: str, identity: dict[str, Any], *, plan: dict[str, Any], what: str) -> dict[str, Any]:
    """Starts the run of a folder, or goes on with it; to be called while the folder is held.

    Args:
        out: Folder or URI.
        identity: All that decides what comes out, by name; JSON must be able to hold it. Passwords and
            keys in it are neither compared nor kept.
        plan: How a new run would do its work.
        what: That the folder is to hold, such as "detections".

    Returns:
        The plan that holds: of the first run in this folder, or the one given if this is the first.

    Raises:
        UserError: The folder holds another run, naming each difference, or files of others.
    """
    check_folder(out, what=what)
    now: dict[str, Any] = json.loads(json.dumps(without_secrets(identity)))
    earlier = _read_run(out)
    if earlier is None:
        record = {"schema": _RUN_SCHEMA, "raydet": __version__, "what": what, "identity": now, "plan": plan}
        storage.write_bytes(storage.join(out, RUN_FILE), json.dumps(record, indent=1).encode())
        return plan
    changes = _changes({"what": earlier["what"], **earlier["identity"]}, {"what": what, **now})
    if changes:
        raise UserError(
            f"--out {out} already holds another run ({'; '.join(changes)}); choose another folder, or the same "
            "settings to go on with it"
        )
    stored: dict[str, Any] = earlier["plan"]
    return stored


def stored_plan(out: str) -> dict[str, Any] | None:
    """The plan of the run in a folder; None where none has been started.

    Raises:
        UserError: The record of the run cannot be read.
    """
    earlier = _read_run(out)
    return None if earlier is None else earlier["plan"]


def _read_run(out: str) -> dict[str, Any] | None:
    uri = storage.join(out, RUN_FILE)
    try:
        record = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{uri}, which says what the run in this folder is, is damaged ({error}); choose another folder"
        ) from None
    if not isinstance(record, dict) or record.get("schema") != _RUN_SCHEMA:
        raise UserError(f"--out {out} holds a run of another version of raydet; choose another folder")
    return record


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [*now, *(name for name in earlier if name not in now)]
    return [
        _FINGERPRINTS.get(name) or f"{name}: {earlier.get(name)} → {now.get(name)}"
        for name in names
        if earlier.get(name) != now.get(name)
    ]


def part_name(chunk: int) -> str:
    """The file that a chunk of the work becomes."""
    return f"part-{chunk:07d}.parquet"


def done_chunks(out: str) -> set[int]:
    """The chunks whose file is there; files come into being whole."""
    matches = map(_PART_NAME.fullmatch, storage.list_files(out))
    return {int(match[1]) for match in matches if match}
