"""Target of `prepare`: the tables below OUT, and removal of the files of a killed run."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.output_folder import RUN_FILE, OutputFolder
from raydet.tables.table import FINDINGS_FOLDER, REJECTED_FOLDER, is_table, read_manifest

_OWN_FILE = re.compile(rf"part-\d{{5,}}\.parquet|{re.escape(MANIFEST_NAME)}|\.shared-[-\w]+")


@dataclass(frozen=True)
class Target:
    """Output of a run.

    Attributes:
        splits: Subfolders of OUT that hold the tables; empty if OUT itself is the table. The first is completed last,
            so it shows whether all are complete.
    """

    folder: OutputFolder
    splits: tuple[str, ...] = ()

    @property
    def out(self) -> str:
        """Absolute path or URI of OUT."""
        return self.folder.uri

    @property
    def mark(self) -> str:
        """URI of a file that exists from the start of the run to its end."""
        return self.folder.uri_of(RUN_FILE)

    @property
    def tables(self) -> dict[str, str]:
        """URIs of the tables by split name; a single table has the name `""`."""
        return {split: self.folder.uri_of(split) for split in self.splits} or {"": self.out}

    @property
    def folders(self) -> tuple[str, ...]:
        """Subfolders of OUT that the run writes."""
        return (REJECTED_FOLDER, FINDINGS_FOLDER, *self.splits)

    def manifest(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Read the manifest of the table that is completed last; return None if OUT is free to be written.

        Raises:
            UserError: OUT contains tables of another configuration, or files that raydet did not write.
        """
        is_complete = self._is_complete()
        self.folder.admit(identity, folders=self.folders, is_disposable=not is_complete)
        if not is_complete:
            return None
        last = next(iter(self.tables.values()))
        return read_manifest(last)

    def begin(self, identity: dict[str, Any]) -> None:
        """Remove the files of an earlier run and write the record of this one."""
        self.clean()
        self.folder.begin(identity, folders=self.folders)

    def clean(self) -> None:
        """Remove the files of a run in OUT, its record last, and the folders that are then empty."""
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

    def _is_complete(self) -> bool:
        """Return True if the run recorded in OUT, of any configuration, has completed all its tables."""
        record = self.folder.record()
        if record is None:
            return False
        splits = [name for name in record.folders if name not in (REJECTED_FOLDER, FINDINGS_FOLDER)]
        return is_table(self.folder.uri_of(*splits[:1]))
