"""The folder of a detections table → the collection that was scored, and the files that the paths in it name."""

import contextlib
from collections.abc import Callable
from functools import partial

from raydet.common.errors import UserError
from raydet.images.collection import Collection, index_in, open_collection
from raydet.images.files import beside
from raydet.tables import storage
from raydet.tables.output_folder import OutputFolder
from raydet.tables.table import Table


def scored_collection(table: Table) -> Collection | None:
    """Open the images that the run of `predict` in the folder of a table scored; None if it records none.

    Raises:
        UserError: They are missing, or the record is damaged.
        OSError: The storage failed.
    """
    data = _data_of(table)
    return None if data is None else _open(table, data)


def file_finder(table: Table) -> Callable[[str], str]:
    """Return a function from a path in a detections table to its file, or to the path if that names no file."""
    with contextlib.suppress(UserError, OSError):
        data = _data_of(table)
        if data is not None:
            kind = _open(table, data).kind
            if kind == "folder":
                return partial(storage.join, data)
            if kind == "list":
                return partial(_of_list, data.rpartition("/")[0])
    return str


def _open(table: Table, data: str) -> Collection:
    index = index_in(table.uri)
    return open_collection(data, index_uri=index if storage.exists(index) else None)


def _of_list(folder: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else beside(folder, path)


def _data_of(table: Table) -> str | None:
    record = OutputFolder(table.uri, "predict").record()
    data = None if record is None else record.identity.get("data")
    return data if isinstance(data, str) else None
