"""Boxes of many images as columns: flat arrays in which the boxes of an image are contiguous."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.boxes import Boxes, as_boxes
from raydet.common.errors import UserError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BATCH_ROWS = 65_536
"""Rows of a table converted to columns per batch."""


@dataclass(frozen=True, kw_only=True)
class TruthColumns:
    """Labelled boxes of some images; rows starts[i] to starts[i + 1] (exclusive) belong to image i.

    Attributes:
        image_ids: int64 [I], unique, in any order.
        starts: int64 [I + 1].
        boxes_xywh: Absolute pixels, float64 [G, 4].
        category: Category indices, int64 [G].
        area: Areas in square pixels, which define the size classes, float64 [G].
        iscrowd: bool [G].
        labelled: The classes that each image is labelled for, lists of int64 [I], null for all; None if every image is
            labelled for all.
    """

    image_ids: Integers
    starts: Integers
    boxes_xywh: Boxes
    category: Integers
    area: Floats
    iscrowd: Flags
    labelled: pa.ListArray | None = None


@dataclass(frozen=True, kw_only=True)
class DetectionColumns:
    """Detections in the images of a `TruthColumns`, in the same order of images.

    Attributes:
        starts: int64 [I + 1].
        boxes_xywh: Absolute pixels, float64 [D, 4].
        scores: Finite confidence scores, float64 [D]. Among equal scores in an image, the earlier is matched first.
        category: Category indices, int64 [D].
    """

    starts: Integers
    boxes_xywh: Boxes
    scores: Floats
    category: Integers


def take_truth(columns: TruthColumns, rows: Integers) -> TruthColumns:
    """Select the boxes of some images, in the given order; consecutive images are sliced without copying the boxes."""
    starts, taken = _rows_of_images(columns.starts, rows)
    return TruthColumns(
        image_ids=columns.image_ids[rows],
        starts=starts,
        boxes_xywh=columns.boxes_xywh[taken],
        category=columns.category[taken],
        area=columns.area[taken],
        iscrowd=columns.iscrowd[taken],
        labelled=None if columns.labelled is None else take_rows(columns.labelled, rows),
    )


def in_unlabelled_class(
    truth: TruthColumns, detections: DetectionColumns, rows: Integers | None = None
) -> Flags | None:
    """Find the detections of a class that their image is not labelled for.

    Args:
        truth: Labels of the images.
        detections: Detections in the same images.
        rows: Detections to look at, int64 [D]; None for all.

    Returns:
        bool [D]; None if every image is labelled for all classes.
    """
    lists = truth.labelled
    if lists is None or lists.null_count == len(lists):
        return None
    import pyarrow.compute as pc  # slow to import

    image, category = image_places(detections), detections.category
    if rows is not None:
        image, category = image[rows], category[rows]
    lengths, classes = numbers_of(pc.list_value_length(lists)), numbers_of(lists.flatten())
    num_categories = 1 + max(int(classes.max(initial=0)), int(category.max(initial=0)))
    known = np.repeat(np.arange(len(lists)), lengths) * num_categories + classes
    is_partial = numbers_of(lists.is_valid())
    unlabelled: Flags = is_partial[image] & ~np.isin(image * num_categories + category, known)
    return unlabelled


def take_detections(columns: DetectionColumns, rows: Integers) -> DetectionColumns:
    """Select the detections of some images as `take_truth` does; row -1 yields an image without detections."""
    starts, taken = _rows_of_images(columns.starts, rows)
    return DetectionColumns(
        starts=starts,
        boxes_xywh=columns.boxes_xywh[taken],
        scores=columns.scores[taken],
        category=columns.category[taken],
    )


def keep_detections(columns: DetectionColumns, is_kept: Flags) -> DetectionColumns:
    """Select detections by a mask, bool [D], in the same images."""
    return DetectionColumns(
        starts=starts_of(np.bincount(image_places(columns)[is_kept], minlength=len(columns.starts) - 1)),
        boxes_xywh=columns.boxes_xywh[is_kept],
        scores=columns.scores[is_kept],
        category=columns.category[is_kept],
    )


def as_labels(image_ids: Integers, detections: DetectionColumns) -> TruthColumns:
    """Return the detections in some images as labelled boxes, without crowds, to match others with them."""
    return TruthColumns(
        image_ids=image_ids,
        starts=detections.starts,
        boxes_xywh=detections.boxes_xywh,
        category=detections.category,
        area=detections.boxes_xywh[:, 2:].prod(axis=1),
        iscrowd=np.zeros(len(detections.scores), np.bool_),
    )


def image_places(columns: DetectionColumns) -> Integers:
    """Return the place of each detection's image, int64 [D]."""
    return np.repeat(np.arange(len(columns.starts) - 1), np.diff(columns.starts))


def concatenate_detections(parts: Sequence[DetectionColumns]) -> DetectionColumns:
    """Return the detections of the images of all parts, at least one, in the order of the parts."""
    return DetectionColumns(
        starts=starts_of(np.concatenate([np.diff(part.starts) for part in parts])),
        boxes_xywh=np.concatenate([part.boxes_xywh for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        category=np.concatenate([part.category for part in parts]),
    )


def _rows_of_images(starts: Integers, images: Integers) -> tuple[Integers, Integers | slice]:
    """Return new starts and the box rows of some images (-1: an image without boxes)."""
    if len(images) and images[0] >= 0 and (np.diff(images) == 1).all():
        first, last = int(images[0]), int(images[-1]) + 1
        return starts[first : last + 1] - starts[first], slice(int(starts[first]), int(starts[last]))
    lengths = np.where(images >= 0, np.diff(starts)[images] if len(starts) > 1 else 0, 0)
    new_starts = starts_of(lengths)
    shifts = np.where(images >= 0, starts[images], 0) - new_starts[:-1]
    return new_starts, np.arange(new_starts[-1]) + np.repeat(shifts, lengths)


def starts_of(lengths: Integers) -> Integers:
    """Return the start offsets of consecutive lists, followed by the end of the last: [N] → [N + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def places_in(known: npt.NDArray[Any], values: npt.NDArray[Any]) -> tuple[Integers, Flags]:
    """Look up the positions of values in a sorted array.

    Args:
        known: Integers in ascending order, at least one, [K].
        values: Integers, [N].

    Returns:
        Positions, int64 [N], of the first of equal entries; and a mask, bool [N], of the values found. Positions of
        other values are meaningless.
    """
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return places, known[places] == values


# Arrow.


def image_ids_in(batch: pa.RecordBatch) -> Integers:
    """Return the image ids of some rows of a table, int64 [R]."""
    return numbers_of(batch.column("image_id"))


def flatten(
    batch: pa.RecordBatch, column: str, names: Sequence[str], where: str
) -> tuple[Integers, dict[str, npt.NDArray[Any]]]:
    """Flatten the lists of a struct column: the list length of each row, and all elements of each field in one array.

    Raises:
        UserError: The lists of a row differ in length or contain nulls.
    """
    lengths, elements = elements_of(batch, column, names, where)
    columns = {name: numbers_of(values) for name, values in elements.items()}
    return lengths, columns | {name: as_boxes(columns[name]) for name in names if name == "bbox"}


def elements_of(
    batch: pa.RecordBatch, column: str, names: Sequence[str], where: str, *, nullable: Sequence[str] = ()
) -> tuple[Integers, dict[str, pa.Array]]:
    """Return what `flatten` does as arrays of Arrow, without a copy; that of `bbox` holds four numbers for each box.

    Raises:
        UserError: The lists of a row differ in length, or contain nulls and are not `nullable`.
    """
    struct = batch.column(column)
    elements: dict[str, pa.Array] = {}
    lengths: npt.NDArray[Any] | None = None
    for name in names:
        lists = struct.field(name)
        if struct.null_count or lists.null_count:
            import pyarrow.compute as pc  # slow to import

            lists = pc.struct_field(struct, name)
            own, values = numbers_of(pc.list_value_length(lists)), lists.flatten()
        else:
            ends = numbers_of(lists.offsets)
            own, values = np.diff(ends), lists.values.slice(ends[0], ends[-1] - ends[0])
        numbers = values
        if pa.types.is_fixed_size_list(values.type):
            size = values.type.list_size
            numbers = values.values.slice(size * values.offset, size * len(values))
        lengths = own if lengths is None else lengths
        has_nulls = name not in nullable and (values.null_count or numbers.null_count)
        if has_nulls or not np.array_equal(own, lengths):
            raise UserError(f"{where}: the lists in `{column}` differ in length or contain nulls")
        elements[name] = numbers
    assert lengths is not None
    return lengths.astype(np.int64), elements


def take_rows(array: pa.Array, rows: Integers) -> pa.Array:
    """Select elements of an array by position, int64; avoids pandas, see `numbers_of`."""
    rows = np.ascontiguousarray(rows, np.int64)
    return array.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)]))


def texts_of(texts: Sequence[str]) -> pa.LargeStringArray:
    """Build an array of strings; avoids pandas, see `numbers_of`."""
    encoded = [text.encode() for text in texts]
    ends = starts_of(np.fromiter(map(len, encoded), np.int64, len(encoded)))
    return pa.LargeStringArray.from_buffers(len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def bytes_of(values: pa.BinaryArray | pa.LargeBinaryArray) -> tuple[memoryview, list[int]]:
    """Return the bytes of all values without a copy, and the position at which each starts, and the last one ends.

    Arrow's own access to a value copies it.
    """
    _, offsets, data = values.buffers()
    dtype = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    starts = np.frombuffer(offsets, dtype)[values.offset : values.offset + len(values) + 1]
    return memoryview(data or b""), starts.tolist()


def numbers_of(array: pa.Array) -> npt.NDArray[Any]:
    """Return the numbers or booleans of an array, 0 for null.

    The values are read from the Arrow buffer directly: `to_numpy`, and any call with Python numbers, imports pandas if
    installed, which takes longer than reading a hundred thousand images.
    """
    if pa.types.is_boolean(array.type):
        return numbers_of(array.cast(pa.uint8())).astype(np.bool_)
    dtype = np.dtype(array.type.to_pandas_dtype())
    values = np.zeros(0, dtype)
    if len(array):
        values = np.frombuffer(array.buffers()[1], dtype, count=len(array), offset=array.offset * dtype.itemsize)
    return np.where(numbers_of(array.is_valid()), values, values.dtype.type(0)) if array.null_count else values
