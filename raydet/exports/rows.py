"""Rows of an images or detections table: validation and conversion shared by the exports."""

import posixpath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.errors import UserError
from raydet.tables import storage
from raydet.tables.table import Table, open_table

ROWS_AT_ONCE = 256
Numbers = npt.NDArray[Any]


def refuse(bad: Numbers, image_ids: Numbers, what: str, where: str) -> None:
    """Refuse the table `where` if any box has an invalid value; `bad`, bool [N], and `image_ids`, [N], are by box.

    Raises:
        UserError: Any box is invalid.
    """
    if bad.any():
        raise UserError(f"{where}: {bad.sum()} boxes have {what}, for instance in image {image_ids[bad][0]}")


def refuse_categories(table: Table, image_ids: Numbers, indices: Numbers) -> None:
    """Refuse a table with a category index outside its categories; `image_ids` and `indices` are int64 [N].

    Raises:
        UserError: An index is out of range.
    """
    unknown = (indices < 0) | (indices >= len(table.categories))
    refuse(unknown, image_ids, f"a category index outside the table's {len(table.categories)} categories", table.uri)


def refuse_boxes(table: Table, image_ids: Numbers, boxes_xywh: Numbers) -> None:
    """Refuse a table with a coordinate that is not finite; `image_ids` is [N], `boxes_xywh` [N, 4].

    Raises:
        UserError: A coordinate is not finite.
    """
    refuse(np.logical_not(np.isfinite(boxes_xywh).all(axis=1)), image_ids, "a number that is not finite", table.uri)


def open_scored(uri: str, score_threshold: float) -> Table:
    """Open an images or detections table; only the latter has scores.

    Raises:
        UserError: There is no such table, or it has no scores but `score_threshold` is set.
    """
    table = open_table(storage.absolute_uri(uri), ("images", "detections"))
    if table.kind == "images" and score_threshold > 0:
        raise UserError(f"{table.uri} is an images table, which has no scores; omit --score-threshold")
    return table


def common_folder(table: Table) -> str | None:
    """Return the common folder of all absolute paths, with a trailing slash; None for relative paths."""
    first: str | None = None
    last = ""
    is_images = table.kind == "images"
    for batch in table.iter_batches(["image.path" if is_images else "path"], ROWS_AT_ONCE):
        # A common prefix of the first and the last path in sorted order is common to all.
        ends = pc.min_max(pc.struct_field(batch.column("image"), "path") if is_images else batch.column("path"))
        if ends["min"].is_valid:
            first = ends["min"].as_py() if first is None else min(first, ends["min"].as_py())
            last = max(last, ends["max"].as_py())
    if first is None or not all(path.startswith("/") or "://" in path for path in (first, last)):
        return None
    folder = posixpath.commonprefix([first, last]).rpartition("/")[0] + "/"
    return None if folder.endswith("//") else folder


def as_text(numbers: Numbers) -> pa.StringArray:
    """Format numbers as JSON; Arrow writes the shortest digits that read back to the same float64."""
    return pc.cast(pa.array(numbers), pa.string())


def filled(template: str, *columns: pa.StringArray) -> pa.StringArray:
    """Fill a template for each row; each `%` stands for the value of the next column."""
    first, *others = template.split("%")
    parts = [part for pair in zip(columns, others, strict=True) for part in pair]
    return pc.binary_join_element_wise(first, *parts, "")
