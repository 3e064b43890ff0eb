"""The guard of everything that a command writes: who may write, what is there already, and whether it may be resumed.

`open_folder` locks a folder for one run and yields an `OutputFolder`, which the command hands on. Its `admit` refuses
files that raydet did not write and the results of another run. `new_output.py` has the same for a folder or file that
appears at once and complete.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from raydet.common.errors import UserError
from raydet.common.redaction import without_secrets
from raydet.common.version import __version__
from raydet.tables import storage
from raydet.tables.folder_lock import Hold, LeaseTimes, hold
from raydet.tables.output_errors import one_line_errors, refuse_place

LOCK_FILE = "_lock"
RUN_FILE = "_run.json"
_LOG_FOLDER = "log"
_RECORD_SCHEMA = 2
_FINGERPRINTS = {
    "checkpoint_fingerprint": "the checkpoint's weights or settings have changed since",
    "data_fingerprint": "the images have changed since",
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What the run in a folder is: the content of OUT/_run.json.

    Attributes:
        command: Command that writes the folder.
        identity: Everything that decides what comes out, by name, without passwords and keys.
        plan: How the run does its work, as decided when it began.
        folders: Subfolders whose content the run writes.
        raydet: Version that began the run.
        schema: Version of this record.
    """

    command: str
    identity: dict[str, Any]
    plan: dict[str, Any] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    raydet: str = __version__
    schema: int = _RECORD_SCHEMA


class OutputFolder:
    """A folder that this run alone may write, while the `with` block of `open_folder` lasts.

    Pickling keeps the place and leaves the lock with the process that holds it.

    Attributes:
        uri: Absolute path or URI.
        command: Command that writes it.
    """

    def __init__(self, uri: str, command: str, held: Hold | None = None) -> None:
        """Names the folder; `open_folder` also locks it."""
        self.uri = uri
        self.command = command
        self._held = held or Hold()

    def __reduce__(self) -> tuple[type["OutputFolder"], tuple[str, str]]:
        return OutputFolder, (self.uri, self.command)

    def uri_of(self, *names: str) -> str:
        """Returns the URI of something in the folder."""
        return storage.join(self.uri, *names)

    def exists(self, *names: str) -> bool:
        """Returns True where a file or folder of that name is there."""
        return storage.exists(self.uri_of(*names))

    def read_bytes(self, *names: str) -> bytes:
        """Reads one whole file of the folder."""
        return storage.read_bytes(self.uri_of(*names))

    def write_bytes(self, data: bytes, *names: str) -> None:
        """Writes one file of the folder, whole or not at all."""
        storage.write_bytes(self.uri_of(*names), data)

    def delete_file(self, *names: str) -> None:
        """Removes a file of the folder; an absent one is fine."""
        storage.delete_file(self.uri_of(*names))

    def list_files(self, *names: str) -> list[str]:
        """Lists the files of the folder, or of a subfolder; an absent one has none."""
        return storage.list_files(self.uri_of(*names))

    def check(self) -> None:
        """Makes sure that the folder still belongs to this run.

        Raises:
            RunError: Another run has taken it.
        """
        self._held.check()

    def record(self, part: str | None = None) -> RunRecord | None:
        """Reads what the run in the folder is; returns None where none has begun.

        Args:
            part: Name of the run, in a folder that several runs share.

        Raises:
            UserError: The record is damaged or of another version of raydet.
        """
        return _read_record(self.uri, _record_name(part))

    def refuse_foreign(self, folders: Sequence[str] = ()) -> None:
        """Refuses files that raydet did not write: any in a folder without a run, and those in new subfolders.

        Files of OUT whose names begin with `_` or `.` do not count.

        Args:
            folders: Subfolders whose content this run writes.

        Raises:
            UserError: There is such a file, or a link in the place of a subfolder or log.
        """
        self._refuse_links(folders)
        own = self.record()
        if own is not None and set(folders) <= set(own.folders):
            return  # without a list of all files, which may be long
        names = self.list_files()
        records = [record for name in names if _is_record(name) and (record := _read_record(self.uri, name))]
        foreign = [name for name in names if not name.startswith(("_", "."))] if not records else []
        for folder in folders:
            if not any(folder in record.folders for record in records):
                names = storage.list_files(self.uri_of(folder), recursive=True)
                foreign += [f"{folder}/{name}" for name in names]
        if foreign:
            raise UserError(
                f"--out {self.uri} holds files that raydet did not write, such as {foreign[0]}; choose another --out"
            )

    def admit(
        self,
        identity: dict[str, Any],
        *,
        folders: Sequence[str] = (),
        part: str | None = None,
        is_disposable: bool = False,
        remedy: str = "choose another --out",
    ) -> RunRecord | None:
        """Refuses foreign files and another run, and removes unfinished files that a killed run left.

        Args:
            identity: Everything that decides what comes out, by name; JSON must be able to hold it.
            folders: Subfolders whose content this run writes.
            part: Name of the run, in a folder that several runs share.
            is_disposable: An earlier run of this command has left nothing that other settings could spoil.
            remedy: Advice for the case that the folder holds another run.

        Returns:
            The record of the run to resume; None where a new one may begin.

        Raises:
            UserError: The folder holds another run, with each difference, or files that raydet did not write.
        """
        self.refuse_foreign(folders)
        earlier = self.record(part)
        if earlier is not None:
            changes = [] if is_disposable else _changes(earlier.identity, _plain(identity))
            if earlier.command != self.command:
                changes = [f"command: {earlier.command} → {self.command}"]
            if changes:
                raise UserError(
                    f"--out {self.uri} already holds another run ({'; '.join(changes)}); {remedy}, or the same "
                    "settings to resume it"
                )
        if storage.is_local(self.uri):  # object stores have no unfinished files
            for place in (*((folder,) for folder in folders), *([()] if part is None else [])):
                for name in self.list_files(*place):
                    if storage.is_partial(name):
                        self.delete_file(*place, name)
        return None if is_disposable else earlier

    def begin(
        self,
        identity: dict[str, Any],
        *,
        plan: dict[str, Any] | None = None,
        folders: Sequence[str] = (),
        part: str | None = None,
    ) -> None:
        """Writes the record of a new run; `admit` comes before it."""
        record = RunRecord(command=self.command, identity=_plain(identity), plan=plan or {}, folders=tuple(folders))
        self.write_bytes(json.dumps(asdict(record), indent=1).encode(), _record_name(part))

    def forget(self, part: str | None = None) -> None:
        """Removes the record of a run that has left nothing."""
        self.delete_file(_record_name(part))

    def _refuse_links(self, folders: Sequence[str]) -> None:
        """Refuses links in the places that are not replaced as a whole: subfolders, and logs that grow."""
        if not storage.is_local(self.uri):
            return
        root = Path(storage.resolve(self.uri)[1])
        paths = [root / name for name in (*folders, _LOG_FOLDER)]
        if not paths[-1].is_symlink() and paths[-1].is_dir():
            paths += paths[-1].iterdir()
        for path in paths:
            if path.is_symlink():
                raise UserError(
                    f"--out {self.uri} holds a link where raydet writes, {path.relative_to(root)}; remove it, or "
                    "choose another --out"
                )


@contextlib.contextmanager
def open_folder(
    out: str,
    *,
    command: str,
    tell: Callable[[str], None] = lambda _: None,
    wait_s: float = 0.0,
    times: LeaseTimes | None = None,
) -> Iterator[OutputFolder]:
    """Locks an output folder for one run, and turns what goes wrong with writing it into one line.

    Args:
        out: Folder or URI; it is created. A local one that was created and stays empty is removed again.
        command: Command at work.
        tell: Receives one line when it takes time to start.
        wait_s: Time to wait for another run on a file system to end before it counts as an error.
        times: Times of the lease that keeps others out of an object store.

    Raises:
        UserError: Another run is writing into the folder, it is a file, or its name is not usable.
        RunError: The disk is full, or the folder may not be written.
    """
    out = storage.absolute_uri(out)
    with one_line_errors(out):
        refuse_place(out, pafs.FileType.File, "is a file; --out must name a folder")
        with hold(out, LOCK_FILE, out=out, command=command, tell=tell, wait_s=wait_s, times=times) as held:
            yield OutputFolder(out, command, held)


def _record_name(part: str | None) -> str:
    return RUN_FILE if part is None else f"_run-{part}.json"


def _is_record(name: str) -> bool:
    return name == RUN_FILE or (name.startswith("_run-") and name.endswith(".json"))


def _read_record(folder: str, name: str) -> RunRecord | None:
    uri = storage.join(folder, name)
    try:
        content = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{uri}, which says what the run in this folder is, is damaged ({error})") from None
    if not isinstance(content, dict) or content.get("schema") != _RECORD_SCHEMA:
        raise UserError(f"--out {folder} holds a run of another version of raydet; choose another --out")
    try:
        return RunRecord(**{**content, "folders": tuple(content["folders"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{uri}, which says what the run in this folder is, is damaged ({error})") from None


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(without_secrets(identity)))
    return plain


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [*now, *(name for name in earlier if name not in now)]
    return [
        _FINGERPRINTS.get(name) or f"{name}: {earlier.get(name)} → {now.get(name)}"
        for name in names
        if earlier.get(name) != now.get(name)
    ]
