"""Guard of output folders: exclusive access, ownership of existing files, and resuming.

`open_folder` locks a folder for one run and yields an `OutputFolder`, which the command passes on. `OutputFolder.admit`
refuses files that raydet did not write and results of another run. `new_output.py` guards folders and files that appear
only when complete.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from raydet.common.errors import UserError
from raydet.common.redaction import without_secrets
from raydet.common.untrusted.documents import DocumentError
from raydet.common.version import __version__
from raydet.tables import storage
from raydet.tables.folder_lock import Hold, LeaseTimes, hold
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.output_errors import one_line_errors, refuse_place

LOCK_FILE = ".lock"
RUN_FILE = ".run.json"
_LOG_FOLDER = "log"
_RECORD_SCHEMA = 2
_FOLDER_NAME = re.compile(r"\w[\w.-]*")
_OF_ADAPTERS = "adapter_fingerprints"
_FINGERPRINTS = {
    "checkpoint_fingerprint": "the checkpoint's weights or settings have changed since",
    "model_fingerprint": "the model's weights or settings have changed since",
    _OF_ADAPTERS: "the weights or settings of an adapter have changed since",
    "operating_point_fingerprint": "the checkpoint's operating point has changed since",
    "data_fingerprint": "the images have changed since",
    "examples_fingerprint": "the pictures of --examples have changed since",
    "detections_fingerprint": "the detections have changed since",
    "other_fingerprint": "the detections of --other have changed since",
    "labelled_fingerprint": "the images of --labelled-data have changed since",
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Identity of the run in a folder: the content of OUT/.run.json.

    Attributes:
        command: Command that writes the folder.
        identity: All settings that determine the result, by name, without passwords and keys.
        plan: Decisions made at the start that a resumed run must keep.
        folders: Subfolders that the run writes.
        raydet: raydet version that started the run.
        schema: Version of this record.
    """

    command: str
    identity: dict[str, Any]
    plan: dict[str, Any] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    raydet: str = __version__
    schema: int = _RECORD_SCHEMA


class OutputFolder:
    """A folder that only this run may write, inside the block of `open_folder`.

    Pickling keeps the location; the lock stays with the process that holds it.

    Attributes:
        uri: Absolute path or URI.
        command: Command that writes the folder.
    """

    def __init__(self, uri: str, command: str, held: Hold | None = None) -> None:
        """Refer to a folder without locking it; `open_folder` also locks it."""
        self.uri = uri
        self.command = command
        self._held = held or Hold()

    def __reduce__(self) -> tuple[type["OutputFolder"], tuple[str, str]]:
        return OutputFolder, (self.uri, self.command)

    def uri_of(self, *names: str) -> str:
        """Return the URI of a file or subfolder."""
        return storage.join(self.uri, *names)

    def exists(self, *names: str) -> bool:
        """Return True if the file or subfolder exists."""
        return storage.exists(self.uri_of(*names))

    def read_bytes(self, *names: str) -> bytes:
        """Read a file of the folder."""
        return storage.read_bytes(self.uri_of(*names))

    def write_bytes(self, data: bytes, *names: str) -> None:
        """Write a file of the folder atomically."""
        storage.write_bytes(self.uri_of(*names), data)

    def delete_file(self, *names: str) -> None:
        """Remove a file of the folder, if it exists."""
        storage.delete_file(self.uri_of(*names))

    def list_files(self, *names: str) -> list[str]:
        """List the files of the folder or of a subfolder; an absent one has none."""
        return storage.list_files(self.uri_of(*names))

    def delete_table(self, name: str) -> None:
        """Remove the table in a subfolder; first its manifest, without which no reader takes the rest for a table."""
        for file in sorted(self.list_files(name), key=lambda file: file != MANIFEST_NAME):
            if file == MANIFEST_NAME or re.fullmatch(r"part-\d+\.parquet", file):
                self.delete_file(name, file)

    def check(self) -> None:
        """Check that the folder still belongs to this run.

        Raises:
            RunError: Another run has taken it.
        """
        self._held.check()

    def record(self, part: str | None = None) -> RunRecord | None:
        """Read the record of the run in the folder, or of one of several runs; return None if it has not started.

        Raises:
            UserError: The record is damaged or was written by an incompatible version of raydet.
        """
        return _read_record(self.uri, _record_name(part))

    def refuse_foreign(self, folders: Sequence[str] = ()) -> list[RunRecord]:
        """Refuse files that raydet did not write, and return the records of the runs, that of the whole folder first.

        These are all files in a folder without a run record, except those whose names start with `_` or `.`, and all
        files in the given subfolders that no recorded run writes.

        Raises:
            UserError: There is such a file, or a subfolder or log is a symbolic link.
        """
        self._refuse_links(folders)
        own = self.record()
        records = [] if own is None else [own]
        if own is not None and set(folders) <= set(own.folders):
            return records  # avoids listing all files, which may be many
        names = self.list_files()
        parts = [name for name in names if name.startswith(".run-") and name.endswith(".json")]
        records += [record for name in parts if (record := _read_record(self.uri, name))]
        foreign = [name for name in names if not name.startswith(("_", "."))] if not records else []
        for folder in folders:
            if not any(folder in record.folders for record in records):
                names = storage.list_files(self.uri_of(folder), recursive=True)
                foreign += [f"{folder}/{name}" for name in names]
        if foreign:
            raise UserError(
                f"--out {self.uri} contains files that raydet did not write, such as {foreign[0]}; choose another --out"
            )
        return records

    def admit(
        self,
        identity: dict[str, Any],
        *,
        folders: Sequence[str] = (),
        part: str | None = None,
        is_disposable: bool = False,
        remedy: str = "choose another --out",
    ) -> RunRecord | None:
        """Refuse foreign files and results of another run; remove partial files of a killed run.

        Args:
            identity: All settings that determine the result, by name; must be JSON-serialisable.
            folders: Subfolders that this run writes.
            part: Name of the run, for a folder that several runs share.
            is_disposable: An earlier run of this command has no results worth keeping, so other settings may
                replace it.
            remedy: Advice for the user if the folder contains another run.

        Returns:
            The record of the run to resume; None if a new run may start.

        Raises:
            UserError: The folder contains another run (the message lists the differences), or files that raydet did
                not write.
        """
        records = self.refuse_foreign(folders)
        # Any run excludes a run of the whole folder, even one that shares the folder with others.
        earlier = next(iter(records), None) if part is None else self.record(part)
        if earlier is not None:
            changes = [] if is_disposable else _changes(earlier.identity, _plain(identity))
            if earlier.command != self.command:
                changes, remedy = [f"command: {earlier.command} → {self.command}"], "choose another --out"
            else:
                remedy += ", or use the same settings to resume it"
            if changes:
                raise UserError(f"--out {self.uri} already holds another run ({'; '.join(changes)}); {remedy}")
        if storage.is_local(self.uri):  # object stores have no partial files
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
        """Write the record of a new run; call `admit` first."""
        record = RunRecord(command=self.command, identity=_plain(identity), plan=plan or {}, folders=tuple(folders))
        self.write_bytes(json.dumps(asdict(record), indent=1).encode(), _record_name(part))

    def forget(self, part: str | None = None) -> None:
        """Remove the record of a run without results."""
        self.delete_file(_record_name(part))

    def _refuse_links(self, folders: Sequence[str]) -> None:
        """Refuse symbolic links where raydet writes in place: subfolders, and logs opened for appending."""
        if not storage.is_local(self.uri):
            return
        root = Path(storage.resolve(self.uri)[1])
        paths = [root / name for name in (*folders, _LOG_FOLDER)]
        if not paths[-1].is_symlink() and paths[-1].is_dir():
            paths += paths[-1].iterdir()
        for path in paths:
            if path.is_symlink():
                raise UserError(
                    f"--out {self.uri} contains a link where raydet writes, {path.relative_to(root)}; remove it, or "
                    "choose another --out"
                )


@contextlib.contextmanager
def open_folder(
    out: str,
    *,
    command: str,
    notify: Callable[[str], None] = lambda _: None,
    wait_s: float = 0.0,
    times: LeaseTimes | None = None,
) -> Iterator[OutputFolder]:
    """Context manager: lock an output folder for one run, and convert write failures to one-line errors.

    A missing folder is created; a local one is removed again if it stays empty. For the other arguments see `hold`.

    Raises:
        UserError: Another run is writing the folder, it is a file, or its name is invalid.
        RunError: The disk is full, or there is no permission to write the folder.
    """
    out = storage.absolute_uri(out)
    with one_line_errors(out):
        refuse_place(out, pafs.FileType.File, "is a file; --out must name a folder")
        with hold(out, LOCK_FILE, out=out, command=command, notify=notify, wait_s=wait_s, times=times) as held:
            yield OutputFolder(out, command, held)


def token_of_run(run_identity: dict[str, Any]) -> str:
    """Return 16 hex digits that the files of a run carry, so that those of other runs never count as its own."""
    content = json.dumps(_plain(run_identity), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _record_name(part: str | None) -> str:
    return RUN_FILE if part is None else f".run-{part}.json"


def _read_record(folder: str, name: str) -> RunRecord | None:
    uri = storage.join(folder, name)
    try:
        content = storage.read_json(uri)
    except FileNotFoundError:
        return None
    except DocumentError as error:
        raise UserError(f"the run record {uri} is damaged ({error}); choose another --out") from None
    if not isinstance(content, dict) or content.get("schema") != _RECORD_SCHEMA:
        raise UserError(f"--out {folder} holds a run of an incompatible version of raydet; choose another --out")
    try:
        record = RunRecord(**{**content, "folders": tuple(content["folders"])})
        is_sound = isinstance(record.identity, dict) and isinstance(record.plan, dict)
        if not is_sound or not isinstance(record.command, str) or not all(map(_FOLDER_NAME.fullmatch, record.folders)):
            raise TypeError("a value has the wrong type")
    except (KeyError, TypeError) as error:
        raise UserError(f"the run record {uri} is damaged ({error}); choose another --out") from None
    return record


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(without_secrets(identity)))
    return plain


def _shown(name: str) -> str:
    """Spell an option as on the command line; `source` and dotted names such as `train.epochs` are not options."""
    return name if name == "source" or "." in name else f"--{name.replace('_', '-')}"


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [*now, *(name for name in earlier if name not in now)]
    if earlier.get("source") != now.get("source"):
        names = ["source"]  # whose options are others
    changed = [name for name in names if earlier.get(name) != now.get(name)]
    if changed != [_OF_ADAPTERS] and not _has_changed_entry(earlier.get(_OF_ADAPTERS), now.get(_OF_ADAPTERS)):
        changed = [name for name in changed if name != _OF_ADAPTERS]  # only others were named
    return [_FINGERPRINTS.get(name) or f"{_shown(name)}: {earlier.get(name)} → {now.get(name)}" for name in changed]


def _has_changed_entry(earlier: dict[str, str] | None, now: dict[str, str] | None) -> bool:
    earlier, now = earlier or {}, now or {}
    return any(earlier[name] != now[name] for name in earlier.keys() & now.keys())
