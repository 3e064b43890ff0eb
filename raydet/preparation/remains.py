"""What `prepare` may find in the folder it is to write to: nothing, a whole table, what a killed run left, or others'.

A run that is killed leaves no manifest, so that no reader takes its files for a table; the next one removes them and
starts over. What is not raydet's is never touched.
"""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydet.common.errors import UserError
from raydet.tables import storage
from raydet.tables.table import FINDINGS_FOLDER, MANIFEST_NAME, REJECTED_FOLDER, is_table

MARK_NAME = "_preparing.json"
"""Lies in OUT while a table is being written: what a killed run leaves can be told from the user's own files."""

_MARK = re.escape(MARK_NAME)
_MANIFEST = re.escape(MANIFEST_NAME)
_REMAINS_BEFORE_MARK = re.compile(rf"\.{_MARK}\.\d+\.partial")
_REMAINS = re.compile(
    rf"{_MARK}|(\w+/)?(part-\d{{5,}}\.parquet|\.({_MARK}|{_MANIFEST})\.\d+\.partial)|\w+/{_MANIFEST}|_shared-[-\w]+"
)


@dataclass(frozen=True)
class Target:
    """Where a run writes to.

    Attributes:
        out: Absolute path or URI.
        splits: The folders of the tables below `out`; none where `out` itself is the table. The first becomes whole
            last, and so tells whether all are.
    """

    out: str
    splits: tuple[str, ...] = ()

    @property
    def tables(self) -> dict[str, str]:
        """The tables by the names of their splits, or the only one by no name."""
        return {split: storage.join(self.out, split) for split in self.splits} or {"": self.out}

    def manifest(self, config_hash: str) -> dict[str, Any] | None:
        """The manifest of the table that becomes whole last, if it is there.

        Raises:
            UserError: There is a table that another configuration made, or there are files that are not raydet's.
        """
        last = next(iter(self.tables.values()))
        if is_table(last):
            manifest: dict[str, Any] = json.loads(storage.read_bytes(storage.join(last, MANIFEST_NAME)))
            if manifest.get("config_hash") != config_hash or "prepare" not in manifest:
                raise UserError(f"{last} already holds another table; choose another --out or remove it")
            return manifest
        others = [self.out, storage.join(self.out, REJECTED_FOLDER)]
        if not storage.exists(storage.join(self.out, MARK_NAME)) and any(map(is_table, others)):
            raise UserError(f"{self.out} already holds another table; choose another --out or remove it")
        self._remains()
        return None

    def mark(self, config_hash: str) -> None:
        """Removes what an earlier run left, and says that this folder is being written.

        Raises:
            UserError: It cannot be written to.
        """
        self.clean()
        content = {"config_hash": config_hash, "splits": self.splits}
        try:
            storage.write_bytes(storage.join(self.out, MARK_NAME), json.dumps(content).encode())
        except OSError as error:
            raise UserError(f"cannot write to {self.out}: {error.strerror or error}") from None

    def unmark(self) -> None:
        """Says that all is written."""
        storage.delete_file(storage.join(self.out, MARK_NAME))

    def clean(self) -> None:
        """Removes what a run left in OUT, and its folders where nothing else is in them."""
        filesystem, path = storage.resolve(self.out)
        folders = self._folders()
        for name in self._remains():
            filesystem.delete_file(f"{path}/{name}")
        for folder in (*(f"{path}/{folder}" for folder in folders), path):
            if storage.is_local(self.out):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()

    def _folders(self) -> list[str]:
        """The folders below OUT that the run that left its mark there may have written."""
        mark = storage.join(self.out, MARK_NAME)
        splits = json.loads(storage.read_bytes(mark)).get("splits", []) if storage.exists(mark) else []
        return [REJECTED_FOLDER, FINDINGS_FOLDER, *splits]

    def _remains(self) -> list[str]:
        """What a killed run left in OUT, as paths relative to it, the mark last.

        Raises:
            UserError: There are files that `prepare` did not write.
        """
        try:
            names = storage.list_files(self.out)
            folders = self._folders()
            for folder in dict.fromkeys([*folders, *self.splits]):
                names += [f"{folder}/{name}" for name in storage.list_files(storage.join(self.out, folder))]
        except NotADirectoryError:
            raise UserError(f"{self.out} is a file; --out must name a folder") from None
        ours = _REMAINS if MARK_NAME in names else _REMAINS_BEFORE_MARK
        others = [
            name for name in names if not ours.fullmatch(name) or ("/" in name and name.split("/")[0] not in folders)
        ]
        if others:
            raise UserError(f"{self.out} holds files that are not raydet's, such as {others[0]}; choose another --out")
        return sorted(names, key=lambda name: name == MARK_NAME)
