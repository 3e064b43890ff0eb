"""Findings of teachers in the training images: rows of stored detections → boxes and class scores beside the labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.errors import UserError
from raydet.preparation.sources.scored.rows import RecentRows
from raydet.tables.columns import Integers, elements_of, numbers_of
from raydet.tables.table import Table
from raydet.training.feeding.chunks import TEACHER_TYPE

NOT_SCORED = -1


@dataclass(frozen=True, eq=False)
class Teacher:
    """The stored detections of a model in the training images.

    Attributes:
        table: Detections with the class scores of each query.
        weight: Weight of this teacher's loss terms.
        places: Row of `table` of each training image, int64 [N]; `NOT_SCORED` for those without one.
        class_map: Index among the classes of the training data of each class of `table`, int64; -1 if they lack it.
            Of several classes with the same index the highest score counts.
        num_classes: Number of classes of the training data.
    """

    table: Table
    weight: float
    places: Integers
    class_map: Integers
    num_classes: int

    def __reduce__(self) -> tuple[Any, ...]:
        return Teacher, (self.table, self.weight, self.places, self.class_map, self.num_classes)

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """The classes of the training data that the teacher knows, bool [C]."""
        return np.isin(np.arange(self.num_classes), self.class_map)

    @property
    def row_bytes(self) -> float:
        """Mean size of a row in bytes, uncompressed."""
        return float(self.table.layout.num_bytes.sum()) / max(1, self.table.num_rows)

    @cached_property
    def rows(self) -> RecentRows:
        """The rows of `table`, of which a few row groups stay in memory."""
        return RecentRows(self.table, ["queries", "error"])


def taught(teachers: Sequence[Teacher], first: int, num_rows: int) -> pa.StructArray:
    """Return what the teachers found in consecutive training images.

    Args:
        teachers: The teachers.
        first: Number of the first image.
        num_rows: Number of images.

    Returns:
        An array of `TEACHER_TYPE`.
    """
    images: list[dict[str, list[Any]]] = [{field.name: [] for field in TEACHER_TYPE} for _ in range(num_rows)]
    for number, teacher in enumerate(teachers):
        places = teacher.places[first : first + num_rows]
        is_scored = places != NOT_SCORED
        found = iter(_found(teacher, places[is_scored]) if is_scored.any() else ())
        known = teacher.known
        for image, has_row in zip(images, is_scored.tolist(), strict=True):
            boxes_xywh, scores = next(found) if has_row else (None, None)
            image["weights"].append(0.0 if scores is None else teacher.weight)
            image["known"].append(known)
            if boxes_xywh is not None and scores is not None:
                image["bbox"].append(boxes_xywh)
                image["class_scores"].append(scores.reshape(-1))
                image["owner"].append(np.full(len(boxes_xywh), number, np.int64))
    return pa.StructArray.from_arrays(
        [_lists([image[field.name] for image in images], field.type) for field in TEACHER_TYPE],
        fields=list(TEACHER_TYPE),
    )


def _found(teacher: Teacher, places: Integers) -> list[tuple[Any, Any]]:
    """Return, for each row, its boxes, float64 [T, 4], and class scores, float16 [T, C]; None for an unread image."""
    rows = teacher.rows.take(places)
    counts, columns = elements_of(rows, "queries", ("bbox", "class_scores"), teacher.table.uri)
    boxes_xywh = numbers_of(columns["bbox"]).reshape(-1, 4)
    known = numbers_of(columns["class_scores"]).reshape(-1, len(teacher.table.categories))
    scores = np.zeros((len(boxes_xywh), teacher.num_classes), np.float16)
    for column, place in enumerate(teacher.class_map.tolist()):
        if place >= 0:
            scores[:, place] = np.maximum(scores[:, place], known[:, column])
    ends = np.cumsum(counts)
    parts = zip(np.split(boxes_xywh, ends[:-1]), np.split(scores, ends[:-1]), strict=True)
    errors = rows.column("error").to_pylist()
    return [pair if error is None else (None, None) for pair, error in zip(parts, errors, strict=True)]


def _lists(images: Sequence[Sequence[Any]], type_: pa.ListType) -> pa.ListArray:
    """Return the concatenated parts of each image as a list."""
    parts = [np.concatenate(own) if own and np.ndim(own[0]) else np.asarray(own) for own in images]
    ends = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
    if ends[-1] >= 2**31:
        raise UserError(
            f"--teacher: {len(images):,} images of a row group have {ends[-1]:,} class scores, more than 2³¹; predict "
            "with a higher --score-threshold"
        )
    offsets = ends.astype(np.int32)
    filled = [part for part in parts if len(part)]
    values = np.concatenate(filled) if filled else np.zeros(0)
    if pa.types.is_list(type_.value_type) or pa.types.is_fixed_size_list(type_.value_type):
        flat = pa.array(values.astype(np.float64).reshape(-1))
        return pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(flat, 4))
    dtype = type_.value_type
    return pa.ListArray.from_arrays(offsets, pa.array(values.astype(dtype.to_pandas_dtype()), dtype))
