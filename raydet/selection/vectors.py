"""Embeddings or thumbnails in a detections table → normalised vectors, block by block."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.errors import UserError
from raydet.config import SelectConfig
from raydet.config.inspecting import Compare
from raydet.tables.columns import Integers, image_ids_in, numbers_of
from raydet.tables.kept.columns import IMAGE_EMBEDDING_COLUMN, KeptVectors
from raydet.tables.schema import THUMBNAIL_COLUMN, THUMBNAIL_SHAPE, THUMBNAIL_TYPE
from raydet.tables.table import RowGroup, Table

Vectors = npt.NDArray[np.float32]
"""Vectors of length 1, [N, D]; those without a direction are 0."""

SAME_PICTURE = 0.95
"""Similarity of two thumbnails from which on they show the same picture, by docs/benchmarks.md."""
_ROUNDING = 1e-5


def required_dimension(table: Table) -> int:
    """Return the length of the embeddings in a detections table.

    Raises:
        UserError: It has none.
    """
    embeddings = ImageColumn.of(table, "embedding")
    if embeddings is None:
        raise UserError(f"{table.uri} has no embeddings; score the images again with `raydet predict --keep embedding`")
    return embeddings.dimension


def normalised(vectors: npt.NDArray[Any]) -> Vectors:
    """Convert vectors [N, D] to single precision and length 1."""
    result: Vectors = vectors.astype(np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", result, result))[:, None]
    result /= np.where(lengths > 0, lengths, np.float32(1))
    return result


def rows_of(column: pa.FixedSizeListArray, dimension: int) -> npt.NDArray[Any]:
    """Return the vectors of a column that are not null, [N, D]."""
    return numbers_of(column.flatten()).reshape(-1, dimension)


@dataclass(frozen=True)
class ImageColumn:
    """A column of a detections table with one vector for each image that could be read.

    Attributes:
        name: Its name.
        dimension: Length of a vector.
        dtype: Type of its numbers.
    """

    name: str
    dimension: int
    dtype: type[np.float16 | np.uint8]

    @classmethod
    def of(cls, table: Table, kind: Compare) -> Self | None:
        """Return the column of a detections table with vectors of a kind; None if it has none."""
        if kind == "thumbnail":
            is_there = THUMBNAIL_COLUMN in table.schema.names
            return cls(THUMBNAIL_COLUMN, THUMBNAIL_TYPE.list_size, np.uint8) if is_there else None
        kept = KeptVectors.of_table(table.schema, table.uri)
        dimension = None if kept is None else kept.dimension
        return None if dimension is None else cls(IMAGE_EMBEDDING_COLUMN, dimension, np.float16)

    def vectors(self, rows: npt.NDArray[Any]) -> Vectors:
        """Convert rows [N, D] to vectors.

        A thumbnail loses the mean of each colour, so that the cosine of two is the correlation of their pixels, which
        depends on neither brightness nor contrast. Half a grey level remains, so that images of a single colour, which
        have no other direction, are alike.
        """
        if self.dtype is np.float16:
            return normalised(rows)
        pixels = rows.reshape(len(rows), self.dimension // THUMBNAIL_SHAPE[2], THUMBNAIL_SHAPE[2]).astype(np.float32)
        return normalised((pixels - pixels.mean(axis=1, keepdims=True) + 0.5).reshape(rows.shape))


@dataclass(frozen=True)
class Sameness:
    """The rule by which two images are nearly the same: the least cosine similarity of their vectors in a column."""

    column: ImageColumn
    min_similarity: float

    @classmethod
    def of(cls, table: Table, config: SelectConfig) -> Self | None:
        """Return the rule for the images of a detections table; None if neither the config nor the table states one.

        Raises:
            UserError: The table lacks what the config compares.
        """
        thumbnails, embeddings = ImageColumn.of(table, "thumbnail"), ImageColumn.of(table, "embedding")
        column = {"thumbnail": thumbnails, "embedding": embeddings, None: thumbnails or embeddings}[config.compare]
        if column is None:
            if config.compare is None and config.min_similarity is None and not config.near_duplicates:
                return None
            what = f"--compare {config.compare}" if config.compare else "--min-similarity"
            raise UserError(
                f"{'--near-duplicates' if config.near_duplicates else what} compares "
                f"{f'{config.compare}s' if config.compare else 'thumbnails or embeddings'}, which {table.uri} lacks; "
                f"score the images again with `raydet predict --keep {config.compare or 'thumbnail'}`"
            )
        least = config.min_similarity
        if least is None and column == thumbnails:
            least = SAME_PICTURE
        # The product of two equal vectors may be a little below 1.
        return None if least is None else cls(column, min(least, 1 - _ROUNDING))


class ImageVectors:
    """The vectors of a table's images, in a temporary file, so that memory does not grow with their number.

    Attributes:
        image_ids: int64 [N], in the order of the table; images that could not be read are left out.
    """

    def __init__(self, table: Table, column: ImageColumn, groups: Sequence[RowGroup] | None = None) -> None:
        """Copy the vectors of all images, or those of some row groups."""
        self._column = column
        self._file = tempfile.TemporaryFile(prefix="raydet-")  # noqa: SIM115
        ids = [np.zeros(0, np.int64)]
        for batch in table.iter_batches(["image_id", column.name], groups=groups):
            found = batch.column(column.name)
            ids.append(image_ids_in(batch)[numbers_of(found.is_valid())])
            self._file.write(rows_of(found, column.dimension).tobytes())
        self._file.flush()
        self.image_ids: Integers = np.concatenate(ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def block(self, start: int, stop: int) -> Vectors:
        """Return the vectors of some images."""
        row_bytes = np.dtype(self._column.dtype).itemsize * self._column.dimension
        data = os.pread(self._file.fileno(), (stop - start) * row_bytes, start * row_bytes)
        return self._column.vectors(np.frombuffer(data, self._column.dtype).reshape(-1, self._column.dimension))

    def blocks(self, num_rows: int, stop: int | None = None) -> Iterator[tuple[int, Vectors]]:
        """Yield the vectors of all images, or of those before `stop`, in blocks, each with its first position."""
        end = len(self.image_ids) if stop is None else stop
        for start in range(0, end, num_rows):
            yield start, self.block(start, min(start + num_rows, end))
