"""The column of a detections table for `predict --keep thumbnail`: each image shrunk to 8 × 8 pixels."""

import pyarrow as pa

from raydet.common.errors import UserError
from raydet.tables.schema import THUMBNAIL_COLUMN, THUMBNAIL_TYPE

THUMBNAIL_FIELD = pa.field(THUMBNAIL_COLUMN, THUMBNAIL_TYPE)


def check_thumbnails(batch: pa.RecordBatch, where: str) -> None:
    """Check the thumbnails in rows of a detections table, if they have any.

    Raises:
        UserError: A pixel is null.
    """
    if THUMBNAIL_COLUMN in batch.schema.names and batch.column(THUMBNAIL_COLUMN).flatten().null_count:
        raise UserError(f"{where} is damaged: {THUMBNAIL_COLUMN} has pixels that are null")
