"""Checks of a table's schema and rows, which may come from a stranger; every row that raydet reads passes them.

Read as an unsigned integer, a number that is negative, infinite or NaN is larger than any other. So one maximum over
the bits of a column, without a temporary array, proves that all of its numbers are in range; only if it fails are they
looked at one by one. The checks cost a few percent of decoding Parquet. The statistics in Parquet files are not used:
they are as much a stranger's claim as the numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.boxes import Boxes, as_boxes
from raydet.common.errors import UserError, one_line
from raydet.tables.columns import Floats, Integers, elements_of, image_ids_in, numbers_of
from raydet.tables.kept.columns import KeptVectors, check_kept
from raydet.tables.kept.thumbnails import check_thumbnails
from raydet.tables.schema import LABELLED_COLUMN, MAX_IMAGE_ID, OPTIONAL_FIELDS, TableKind, declared_fields

_ROWS_FOLDED = 256
_MOST_PIXELS = 1e15
"""Limit of a box's numbers, below which areas and their sums are finite and exact to a pixel."""
_ONE, _FAR, _INFINITY = (int(np.array(number).view(np.uint64)) for number in (1.0, _MOST_PIXELS, np.inf))
_BOXES: dict[TableKind, str] = {"images": "objects", "detections": "detections"}
_FREE_NUMBERS: tuple[TableKind, ...] = ("images", "detections", "histograms", "trials")
"""Kinds whose plain numbers may be NaN or infinite: columns of a source, outermost bins, losses that diverged."""


def check_types(schema: pa.Schema, kind: TableKind, where: str) -> None:
    """Check the types of a table's own columns; a struct of lists may have further lists.

    Raises:
        UserError: A column has another type.
    """
    optional = [(name, dtype) for name, dtype in OPTIONAL_FIELDS.get(kind, {}).items() if name in schema.names]
    for name, expected in (*declared_fields(kind), *optional):
        if len(schema.get_all_field_indices(name)) != 1:
            raise UserError(f"{where} is damaged: it must have one column {name}")
        found = schema.field(name).type
        if pa.types.is_struct(expected) and pa.types.is_struct(found):
            by_name = {field.name: field.type for field in found}
            is_same = len(by_name) == found.num_fields and all(by_name.get(own.name) == own.type for own in expected)
        else:
            is_same = found == expected
        if not is_same:
            raise UserError(f"{where} is damaged: the column {name} has the type {found}, expected {expected}")
    if kind == "detections":
        KeptVectors.of_table(schema, where)


def check_rows(rows: pa.RecordBatch | pa.Table, kind: TableKind, num_categories: int, where: str) -> None:
    """Check rows of a table, of all columns or some.

    Raises:
        UserError: A text is not UTF-8, an id, a size, a box, a score or a category is out of range, or a number is not
            finite.
    """
    for batch in rows.to_batches() if isinstance(rows, pa.Table) else [rows]:
        for field in batch.schema:
            column = batch.column(field.name)
            _check_texts(column, field.name, where)
            if pa.types.is_floating(field.type) and kind not in _FREE_NUMBERS and not is_finite(numbers_of(column)):
                raise UserError(f"{where} is damaged: the column {field.name} has numbers that are NaN or infinite")
        _check_ids_and_sizes(batch, kind, where)
        if kind in _BOXES and _BOXES[kind] in batch.schema.names:
            _check_boxes(batch, _BOXES[kind], num_categories, where)
        if kind == "detections":
            check_kept(batch, where)
            check_thumbnails(batch, where)
        if kind == "images" and LABELLED_COLUMN in batch.schema.names:
            _check_labelled(batch.column(LABELLED_COLUMN), num_categories, where)


def _check_labelled(lists: pa.ListArray, num_categories: int, where: str) -> None:
    indices = lists.flatten()
    if indices.null_count or (len(indices) and _most_bits(numbers_of(indices)) >= num_categories):
        raise UserError(
            f"{where} is damaged: the column {LABELLED_COLUMN} has a value that is not one of the {num_categories} "
            "categories"
        )


def _check_texts(column: pa.Array, name: str, where: str) -> None:
    if pa.types.is_struct(column.type):
        for field in column.type:
            if pa.types.is_string(field.type):
                _check_texts(column.field(field.name), f"{name}.{field.name}", where)
    if not pa.types.is_string(column.type):
        return
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"{where} is damaged: the column {name}: {one_line(error)}") from None


def _check_ids_and_sizes(batch: pa.RecordBatch, kind: TableKind, where: str) -> None:
    for name, limit in (("image_id", MAX_IMAGE_ID), ("width", 2**31), ("height", 2**31)):
        if name not in batch.schema.names or not batch.num_rows:
            continue
        column = batch.column(name)
        if column.null_count and kind in _BOXES and (name == "image_id" or kind == "images"):
            raise UserError(f"{where} is damaged: the column {name} contains nulls")
        numbers = numbers_of(column)
        if _most_bits(numbers) >= limit:
            bad = numbers[(numbers < 0) | (numbers >= limit)][0]
            raise UserError(f"{where} has the {name} {bad}, expected 0 … {limit - 1}")


def check_unique(image_ids: Integers, where: str) -> None:
    """Check that image ids are unique; fast if they ascend.

    Raises:
        UserError: An id is repeated.
    """
    if (image_ids[1:] > image_ids[:-1]).all():
        return
    ordered = np.sort(image_ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.size:
        raise UserError(f"{where} has duplicate image ids, for example of image {repeated[0]}; ids must be unique")


def _check_boxes(batch: pa.RecordBatch, column: str, num_categories: int, where: str) -> None:
    present = {field.name for field in batch.schema.field(column).type}
    names = [name for name in ("bbox", "category", "score", "area", "id", "iscrowd") if name in present]
    if not names:
        return
    nullable = ("score",) if column == "objects" else ()  # a label that a person drew has none
    lengths, elements = elements_of(batch, column, names, where, nullable=nullable)
    values = {name: numbers_of(elements[name]) for name in ("category", "score", "area") if name in elements}

    def image_of() -> Integers:
        has_ids = "image_id" in batch.schema.names
        return np.repeat(image_ids_in(batch) if has_ids else np.full(len(lengths), -1), lengths)

    check_boxes(
        where,
        boxes_xywh=as_boxes(numbers_of(elements["bbox"])) if "bbox" in elements else None,
        category=values.get("category"),
        scores=values.get("score"),
        area=values.get("area"),
        num_categories=num_categories,
        image_of=image_of,
        noun="boxes" if column == "objects" else "detections",
    )


def check_boxes(
    where: str,
    *,
    num_categories: int,
    image_of: Callable[[], Integers],
    noun: str,
    boxes_xywh: Boxes | None = None,
    category: Integers | None = None,
    scores: Floats | None = None,
    area: Floats | None = None,
) -> None:
    """Check labelled boxes or detections; arrays that are None are not checked.

    Args:
        where: Their source, for messages.
        num_categories: Number of classes.
        image_of: Returns the image id of each box, [N], -1 if unknown; called only for a message.
        noun: What they are, for messages.
        boxes_xywh: Absolute pixels, float64 [N, 4].
        category: Category indices, int64 [N].
        scores: float64 [N].
        area: float64 [N].

    Raises:
        UserError: A number is not finite, a size is negative, or a score or category is out of range.
    """

    def refuse(bad: Any, what: str) -> None:
        image_id = image_of()[bad][0]
        example = f", for example in image {image_id}" if image_id >= 0 else ""
        raise UserError(f"{where}: {bad.sum()} {noun} have {what}{example}")

    if boxes_xywh is not None and len(boxes_xywh):
        most_xy, most_wh = _most_bits_of_columns(boxes_xywh).reshape(2, 2).max(axis=1)
        # Negative numbers are larger than any other if read as integers.
        if most_wh > _FAR or (most_xy > _FAR and not (np.abs(boxes_xywh[:, :2]) <= _MOST_PIXELS).all()):
            bad = ~np.isfinite(boxes_xywh).all(axis=1)
            if bad.any():
                refuse(bad, "a box that is not finite (NaN or infinite)")
            bad = (boxes_xywh[:, 2:] < 0).any(axis=1)
            if bad.any():
                refuse(bad, "a box with a negative width or height; boxes are x, y, width, height")
            bad = (np.abs(boxes_xywh) > _MOST_PIXELS).any(axis=1)
            if bad.any():
                refuse(bad, f"a box that reaches beyond {_MOST_PIXELS:.0e} pixels")
    if scores is not None and len(scores) and _most_bits(scores) > _ONE:
        bad = ~np.isfinite(scores)
        if bad.any():
            refuse(bad, "a score that is not finite (NaN or infinite)")
        bad = (scores < 0) | (scores > 1)
        if bad.any():
            refuse(bad, "a score outside 0 … 1")
    if area is not None and len(area) and _most_bits(area) >= _INFINITY and not is_finite(area):
        refuse(~np.isfinite(area), "an area that is not finite (NaN or infinite)")
    if category is not None and len(category) and not num_categories:
        raise UserError(f"{where} has no categories, but {noun} that belong to one")
    if category is not None and len(category) and _most_bits(category) >= num_categories:
        refuse(
            (category < 0) | (category >= num_categories),
            f"a category that is not one of the {num_categories} categories",
        )


def is_finite(numbers: npt.NDArray[Any]) -> bool:
    """Return True if no number is NaN or infinite; one pass without a temporary array, as a rule."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = numbers.sum()
    return bool(np.isfinite(total) or np.isfinite(numbers).all())


def _most_bits(numbers: npt.NDArray[Any]) -> int:
    """Return the largest of some numbers, at least one, read as unsigned integers; -0.0 counts as negative too."""
    return int(numbers.view(f"u{numbers.itemsize}").max())


def _most_bits_of_columns(boxes_xywh: Boxes) -> npt.NDArray[np.uint64]:
    """Return the largest bits of each column of boxes [N, 4], N > 0.

    Reducing long rows is vectorised; the maximum over a column of four is not.
    """
    bits = boxes_xywh.view(np.uint64)
    whole = len(bits) // _ROWS_FOLDED * _ROWS_FOLDED
    folded = bits[:whole].reshape(-1, 4 * _ROWS_FOLDED).max(axis=0, initial=0).reshape(-1, 4)
    largest: npt.NDArray[np.uint64] = np.maximum(folded.max(axis=0), bits[whole:].max(axis=0, initial=0))
    return largest
