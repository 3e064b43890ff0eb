"""The column of a detections table for `predict --keep thumbnail`: each image shrunk to 8 × 8 pixels."""

import pyarrow as pa

from raydet.common.errors import UserError

THUMBNAIL_COLUMN = "thumbnail"
THUMBNAIL_SHAPE = (8, 8, 3)
THUMBNAIL_TYPE = pa.list_(pa.uint8(), 8 * 8 * 3)
"""Red, green and blue of each pixel, row by row."""
THUMBNAIL_FIELD = pa.field(THUMBNAIL_COLUMN, THUMBNAIL_TYPE)


def check_thumbnail_type(schema: pa.Schema, where: str) -> None:
    """Check the type of the thumbnails in a detections table, if it has any.

    Raises:
        UserError: It is another one, or there are several such columns.
    """
    places = schema.get_all_field_indices(THUMBNAIL_COLUMN)
    if len(places) > 1:
        raise UserError(f"{where} is damaged: it must have one column {THUMBNAIL_COLUMN}")
    if places and schema.field(places[0]).type != THUMBNAIL_TYPE:
        raise UserError(
            f"{where} is damaged: the column {THUMBNAIL_COLUMN} has the type {schema.field(places[0]).type}, "
            f"expected {THUMBNAIL_TYPE}"
        )


def check_thumbnails(batch: pa.RecordBatch, where: str) -> None:
    """Check the thumbnails in rows of a detections table, if they have any.

    Raises:
        UserError: A pixel is null.
    """
    if THUMBNAIL_COLUMN in batch.schema.names and batch.column(THUMBNAIL_COLUMN).flatten().null_count:
        raise UserError(f"{where} is damaged: {THUMBNAIL_COLUMN} has pixels that are null")
