"""The rows of an images or a detections table, for all that is exported from them."""

import posixpath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.errors import UserError
from raydet.tables.table import Table

ROWS_AT_ONCE = 256
Numbers = npt.NDArray[Any]


def refuse(bad: Numbers, image_ids: Numbers, what: str, where: str) -> None:
    """Refuses a table in which any box is bad.

    Args:
        bad: Which boxes, [N].
        image_ids: Of each box, [N].
        what: The bad thing that they have.
        where: The table.

    Raises:
        UserError: There is one.
    """
    if bad.any():
        raise UserError(f"{where}: {bad.sum()} boxes have {what}, such as one in image {image_ids[bad][0]}")


def refuse_categories(table: Table, image_ids: Numbers, indices: Numbers) -> None:
    """Refuses a table in which a box has a class that the table does not know.

    Raises:
        UserError: There is one.
    """
    unknown = (indices < 0) | (indices >= len(table.categories))
    refuse(unknown, image_ids, f"a category that is not one of the table's {len(table.categories)}", table.uri)


def refuse_boxes(table: Table, image_ids: Numbers, boxes_xywh: Numbers) -> None:
    """Refuses a table in which a box, [N, 4], has a number that is not finite.

    Raises:
        UserError: There is one.
    """
    refuse(np.logical_not(np.isfinite(boxes_xywh).all(axis=1)), image_ids, "a number that is not finite", table.uri)


def common_folder(table: Table) -> str | None:
    """The folder, with its final slash, that all paths begin with where they are whole; None for relative ones."""
    first: str | None = None
    last = ""
    is_images = table.kind == "images"
    for batch in table.iter_batches(["image.path" if is_images else "path"], ROWS_AT_ONCE):
        # What the first and the last by name have in common, all between them have too.
        ends = pc.min_max(pc.struct_field(batch.column("image"), "path") if is_images else batch.column("path"))
        if ends["min"].is_valid:
            first = ends["min"].as_py() if first is None else min(first, ends["min"].as_py())
            last = max(last, ends["max"].as_py())
    if first is None or not all(path.startswith("/") or "://" in path for path in (first, last)):
        return None
    folder = posixpath.commonprefix([first, last]).rpartition("/")[0] + "/"
    return None if folder.endswith("//") else folder


def as_text(numbers: Numbers) -> pa.StringArray:
    """Numbers as JSON: Arrow writes the shortest digits that read back to the same float64."""
    return pc.cast(pa.array(numbers), pa.string())
