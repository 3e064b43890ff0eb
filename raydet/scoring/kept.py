"""Detections with the vectors of their queries → further columns of a detections table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.boxes import Boxes
from raydet.config import PredictConfig
from raydet.models.checkpoints import Checkpoint
from raydet.models.families import Family
from raydet.tables.columns import starts_of
from raydet.tables.kept.columns import IMAGE_EMBEDDING_COLUMN, QUERIES_COLUMN, KeptVectors

Flags = npt.NDArray[np.bool_]


def vectors_to_keep(config: PredictConfig, checkpoint: Checkpoint, family: Family) -> KeptVectors | None:
    """Return what `--keep` stores of a model; None without it."""
    if not config.keeps_vectors:
        return None
    dimension = family.default_hidden_size
    for name in ("hidden_size", "d_model"):
        stated = checkpoint.content.get(name)
        dimension = stated if isinstance(stated, int) else dimension
    return KeptVectors(
        class_scores=("softmax" if family.softmax else "sigmoid") if "class_scores" in config.keeps_vectors else None,
        num_classes=len(checkpoint.categories),
        dimension=dimension if "embedding" in config.keeps_vectors else None,
    )


def query_numbers(found: Sequence[Any]) -> pa.Array:
    """Return the index of each detection's query in the row of its image, of images one after the other."""
    numbers = [one.queries for one in found]
    return pa.array(np.concatenate(numbers) if numbers else np.zeros(0, np.int64), pa.int64())


def kept_columns(found: Sequence[Any], boxes_xywh: Boxes, is_readable: Flags, schema: pa.Schema) -> dict[str, pa.Array]:
    """Build the columns beside `detections`.

    Args:
        found: `Detections` of each readable image, whose vectors are those of `with_used_queries`.
        boxes_xywh: Boxes of all detections, in pixels of the upright image, [K, 4].
        is_readable: True for each row whose image was read.
        schema: Schema of the table.
    """
    counts = np.array([int(one.queries.max(initial=-1)) + 1 for one in found], np.int64)
    all_counts = np.zeros(len(is_readable), np.int64)
    all_counts[is_readable] = counts
    first = starts_of(counts)
    # All detections of a query have its box; the first stands for them.
    queries = [one.queries + start for one, start in zip(found, first, strict=False)]
    _, firsts = np.unique(np.concatenate([np.zeros(0, np.int64), *queries]), return_index=True)
    offsets = pa.array(starts_of(all_counts), pa.int32())
    queries_type = schema.field(QUERIES_COLUMN).type
    lists = []
    for field in queries_type:
        size = field.type.value_type.list_size
        parts = [boxes_xywh[firsts]] if field.name == "bbox" else [getattr(one.vectors, field.name) for one in found]
        lists.append(pa.ListArray.from_arrays(offsets, _fixed(parts, size, field.type.value_type.value_type)))
    columns = {QUERIES_COLUMN: pa.StructArray.from_arrays(lists, fields=list(queries_type))}
    if IMAGE_EMBEDDING_COLUMN in schema.names:
        dtype = schema.field(IMAGE_EMBEDDING_COLUMN).type
        vectors = np.zeros((len(is_readable), dtype.list_size), np.float16)
        if found:
            vectors[is_readable] = np.stack([one.vectors.image_embedding for one in found])
        columns[IMAGE_EMBEDDING_COLUMN] = _fixed([vectors], dtype.list_size, dtype.value_type, ~is_readable)
    return columns


def _fixed(
    parts: Sequence[npt.NDArray[Any]], size: int, dtype: pa.DataType, is_null: Flags | None = None
) -> pa.FixedSizeListArray:
    """Return the rows of some arrays [N, size] as lists."""
    assert all(part.shape[1] == size for part in parts), f"vectors of another length than the {size} of the schema"
    flat = np.concatenate([np.zeros(0, dtype.to_pandas_dtype()), *(part.reshape(-1) for part in parts)])
    mask = None if is_null is None else pa.array(is_null)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, dtype), size, mask=mask)
