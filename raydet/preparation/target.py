"""Where `prepare` writes: the tables below OUT, and what a killed run left of them."""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydet.tables import storage
from raydet.tables.output_folder import RUN_FILE, OutputFolder
from raydet.tables.table import FINDINGS_FOLDER, MANIFEST_NAME, REJECTED_FOLDER, is_table

_OWN_FILE = re.compile(rf"part-\d{{5,}}\.parquet|{re.escape(MANIFEST_NAME)}|_shared-[-\w]+")


@dataclass(frozen=True)
class Target:
    """Where a run writes to.

    Attributes:
        folder: OUT.
        splits: Folders of the tables below OUT; none where OUT itself is the table. The first becomes whole last, and
            so tells whether all are.
    """

    folder: OutputFolder
    splits: tuple[str, ...] = ()

    @property
    def out(self) -> str:
        """Absolute path or URI of OUT."""
        return self.folder.uri

    @property
    def mark(self) -> str:
        """URI of a file that is there from the beginning of the run to its end."""
        return self.folder.uri_of(RUN_FILE)

    @property
    def tables(self) -> dict[str, str]:
        """The tables by the names of their splits, or the only one by no name."""
        return {split: self.folder.uri_of(split) for split in self.splits} or {"": self.out}

    @property
    def folders(self) -> tuple[str, ...]:
        """Subfolders of OUT that the run writes."""
        return (REJECTED_FOLDER, FINDINGS_FOLDER, *self.splits)

    def manifest(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Reads the manifest of the table that becomes whole last; returns None if OUT is free to be written.

        Raises:
            UserError: OUT holds tables of another configuration, or files that raydet did not write.
        """
        self.folder.admit(identity, folders=self.folders, is_disposable=not self._is_whole())
        if not self._is_whole():
            return None
        last = next(iter(self.tables.values()))
        manifest: dict[str, Any] = json.loads(storage.read_bytes(storage.join(last, MANIFEST_NAME)))
        return manifest

    def begin(self, identity: dict[str, Any]) -> None:
        """Removes what an earlier run left, and writes the record of this one."""
        self.clean()
        self.folder.begin(identity, folders=self.folders)

    def clean(self) -> None:
        """Removes what a run left in OUT, its record last, and the folders in which nothing else is."""
        record = self.folder.record()
        if record is None:
            return
        for folder in ((), *((name,) for name in record.folders)):
            for name in self.folder.list_files(*folder):
                if _OWN_FILE.fullmatch(name) or storage.is_partial(name):
                    self.folder.delete_file(*folder, name)
            if folder and storage.is_local(self.out):
                with contextlib.suppress(OSError):
                    Path(storage.resolve(self.folder.uri_of(*folder))[1]).rmdir()
        self.folder.forget()

    def _is_whole(self) -> bool:
        """Returns True when the run in OUT has written all its tables, whichever run that is."""
        record = self.folder.record()
        if record is None:
            return False
        splits = [name for name in record.folders if name not in (REJECTED_FOLDER, FINDINGS_FOLDER)]
        return is_table(self.folder.uri_of(*splits[:1]))
