"""Batches of an images table as flat arrays, with one entry per image or per box."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.boxes import Boxes
from raydet.common.errors import UserError
from raydet.common.redaction import without_secrets
from raydet.tables.columns import Flags, Floats, Integers, flatten, numbers_of
from raydet.tables.table import Table
from raydet.training.feeding.mixture import Mixture

_BATCH_ROWS = 4096
_COLUMNS = ("image_id", "image.path", "width", "height", "objects")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some images with all their boxes.

    Attributes:
        table: URI of their table.
        first: Position of the first image in the table, or in the mixture.
        image_ids: int64 [N].
        paths: Image paths, an Arrow array of N strings.
        sizes_wh: Width and height in pixels, float64 [N, 2].
        num_boxes: Number of boxes of each image, int64 [N].
        owners: Index of each box's image among these images, int64 [M], ascending.
        numbers: Index of each box in its image, int64 [M].
        boxes_xywh: Absolute pixels, [M, 4].
        categories: Class indices, int64 [M].
        areas: Object areas from the labels in square pixels, float64 [M].
        iscrowd: bool [M].
    """

    table: str
    first: int
    image_ids: Integers
    paths: pa.Array
    sizes_wh: Floats
    num_boxes: Integers
    owners: Integers
    numbers: Integers
    boxes_xywh: Boxes
    categories: Integers
    areas: Floats
    iscrowd: Flags


def stream_mixture(mixture: Mixture) -> Iterator[Rows]:
    """Yield the rows of all tables of a mixture, with its classes; raises as `stream_rows` does."""
    first = 0
    for source in mixture.sources:
        class_map = np.asarray(source.class_map, np.int64)
        for rows in stream_rows(source.table):
            yield replace(rows, first=first + rows.first, categories=class_map[rows.categories])
        first += source.table.num_rows


def stream_rows(table: Table, *, batch_rows: int = _BATCH_ROWS) -> Iterator[Rows]:
    """Yield the rows of a table in order, without image bytes.

    Raises:
        UserError: The class of a box is not in the table's list of classes.
    """
    first = 0
    for batch in table.iter_batches(_COLUMNS, batch_size=batch_rows):
        rows = _rows(batch, first, table.uri)
        wrong = rows.categories[(rows.categories < 0) | (rows.categories >= len(table.categories))]
        if wrong.size:
            raise UserError(
                f"{table.uri} has a box of class {wrong[0]}, but its classes are 0 to {len(table.categories) - 1}; "
                "write the table again with `raydet prepare`"
            )
        yield rows
        first += batch.num_rows


def _rows(batch: pa.RecordBatch, first: int, where: str) -> Rows:
    num_boxes, columns = flatten(batch, "objects", ("bbox", "category", "area", "iscrowd"), where)
    owners = np.repeat(np.arange(len(num_boxes)), num_boxes)
    starts = np.cumsum(num_boxes) - num_boxes
    return Rows(
        table=without_secrets(where),
        first=first,
        image_ids=batch.column("image_id").to_numpy(),
        paths=pc.fill_null(pc.struct_field(batch.column("image"), "path"), ""),
        sizes_wh=np.stack([numbers_of(batch.column(name)) for name in ("width", "height")], axis=1).astype(np.float64),
        num_boxes=num_boxes,
        owners=owners,
        numbers=np.arange(len(owners)) - starts[owners],
        boxes_xywh=columns["bbox"],
        categories=columns["category"],
        areas=columns["area"],
        iscrowd=columns["iscrowd"],
    )
