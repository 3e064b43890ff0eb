"""Embeddings in a detections table → normalised vectors, block by block."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.errors import UserError
from raydet.tables.columns import Integers, image_ids_in, numbers_of
from raydet.tables.kept.columns import IMAGE_EMBEDDING_COLUMN, KeptVectors
from raydet.tables.table import RowGroup, Table

Vectors = npt.NDArray[np.float32]
"""Vectors of length 1, [N, D]; those without a direction are 0."""


def embedding_dimension(table: Table) -> int | None:
    """Return the length of the embeddings in a detections table; None if it has none."""
    kept = KeptVectors.of_table(table.schema, table.uri)
    return None if kept is None else kept.dimension


def required_dimension(table: Table) -> int:
    """Return the length of the embeddings in a detections table.

    Raises:
        UserError: It has none.
    """
    dimension = embedding_dimension(table)
    if dimension is None:
        raise UserError(f"{table.uri} has no embeddings; score the images again with `raydet predict --keep embedding`")
    return dimension


def normalised(halves: npt.NDArray[np.float16]) -> Vectors:
    """Convert vectors [N, D] to single precision and length 1."""
    vectors: Vectors = halves.astype(np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    vectors /= np.where(lengths > 0, lengths, np.float32(1))
    return vectors


def rows_of(column: pa.FixedSizeListArray, dimension: int) -> npt.NDArray[np.float16]:
    """Return the vectors of a column that are not null, [N, D]."""
    return numbers_of(column.flatten()).reshape(-1, dimension)


class ImageVectors:
    """The embeddings of a table's images, in a temporary file, so that memory does not grow with their number.

    Attributes:
        image_ids: int64 [N], in the order of the table; images that could not be read are left out.
    """

    def __init__(self, table: Table, groups: Sequence[RowGroup] | None = None) -> None:
        """Copy the embeddings of all images, or those of some row groups; raises as `required_dimension` does."""
        self._dimension = dimension = required_dimension(table)
        self._file = tempfile.TemporaryFile(prefix="raydet-")  # noqa: SIM115
        ids = [np.zeros(0, np.int64)]
        for batch in table.iter_batches(["image_id", IMAGE_EMBEDDING_COLUMN], groups=groups):
            column = batch.column(IMAGE_EMBEDDING_COLUMN)
            ids.append(image_ids_in(batch)[numbers_of(column.is_valid())])
            self._file.write(rows_of(column, dimension).tobytes())
        self._file.flush()
        self.image_ids: Integers = np.concatenate(ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def block(self, start: int, stop: int) -> Vectors:
        """Return the vectors of some images."""
        row_bytes = 2 * self._dimension
        data = os.pread(self._file.fileno(), (stop - start) * row_bytes, start * row_bytes)
        return normalised(np.frombuffer(data, np.float16).reshape(-1, self._dimension))

    def blocks(self, num_rows: int, stop: int | None = None) -> Iterator[tuple[int, Vectors]]:
        """Yield the vectors of all images, or of those before `stop`, in blocks, each with its first position."""
        end = len(self.image_ids) if stop is None else stop
        for start in range(0, end, num_rows):
            yield start, self.block(start, min(start + num_rows, end))
