"""Detections, from a table or from COCO results JSON, held against the truth: aligned image by image and checked.

Detections stand in the order in which they were given.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raydet.common.boxes import Boxes, as_boxes
from raydet.common.errors import UserError
from raydet.measuring.truth import Truth, is_json
from raydet.measuring.truth_json import read_results
from raydet.tables import storage
from raydet.tables.columns import (
    ROWS_AT_ONCE,
    DetectionColumns,
    Floats,
    Integers,
    TruthColumns,
    flatten,
    image_ids_in,
    numbers_of,
    places_in,
    starts_of,
    take_detections,
    take_truth,
)
from raydet.tables.schema import parse_metadata
from raydet.tables.table import Table, open_table

DETECTION_FIELDS = ("image_id", "detections", "error")


@dataclass(frozen=True, kw_only=True)
class DetectionRows:
    """Images with their detections as a source has them; `columns` in the truth's category indices.

    Attributes:
        image_ids: int64 [R].
        columns: Their detections, in the same order.
        errors: Image id → why the detector could not read it.
    """

    image_ids: Integers
    columns: DetectionColumns
    errors: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Detections held against the truth: the same images on both sides, in the same order, by rising id.

    Attributes:
        uri: Where the detections were read.
        columns: The detections.
        truth_columns: The labelled boxes.
        truth_rows: Rows of the whole truth that are measured, int64 [I].
        errors: Image id → why the detector could not read it; it has no detections.
        num_left_out: Images that only one side has, with `allow_partial`.
        model: The checkpoint that the detections' table names.
        num_detections: In all images measured.
    """

    uri: str
    columns: DetectionColumns
    truth_columns: TruthColumns
    truth_rows: Integers
    errors: dict[int, str] = field(default_factory=dict)
    num_left_out: int = 0
    model: str | None = None
    num_detections: int = 0


def read_detections(uri: str, truth: Truth, *, allow_partial: bool = False) -> Scored:
    """Reads a detections table, or COCO results JSON, in which an image without detections is not named.

    Args:
        uri: A table's folder or a JSON file.
        truth: What they are held against.
        allow_partial: Take the images that both sides have, where they differ.

    Raises:
        UserError: There is no such input or it is damaged, a box or score means nothing, the images or classes are
            not those of the truth, or no image is on both sides.
    """
    uri = storage.absolute_uri(uri)
    is_table = not is_json(uri, "detections", "a detections table or COCO results JSON")
    if is_table:
        table = open_table(uri, "detections")
        batches = table.iter_batches(DETECTION_FIELDS, ROWS_AT_ONCE)
        rows, model = read_detection_rows(table, truth, batches), model_of(table)
    else:
        rows, model = _read_results(uri, truth), None
    source_rows = find_rows(uri, rows.image_ids, truth)
    truth_rows, num_left_out = choose_images(
        uri, rows.image_ids, source_rows, truth, is_table=is_table, allow_partial=allow_partial
    )
    columns = take_detections(rows.columns, source_rows[truth_rows])
    return Scored(
        uri=uri,
        columns=columns,
        truth_columns=take_truth(truth.columns, truth_rows),
        truth_rows=truth_rows,
        errors=errors_in(rows.errors, truth.columns.image_ids[truth_rows]),
        num_left_out=num_left_out,
        model=model,
        num_detections=len(columns.scores),
    )


def errors_in(errors: dict[int, str], image_ids: Integers) -> dict[int, str]:
    """The errors of those images that are measured."""
    measured = np.isin(list(errors), image_ids).tolist()
    return {image_id: reason for (image_id, reason), is_in in zip(errors.items(), measured, strict=True) if is_in}


# Which images: both sides, by rising id.


def find_rows(uri: str, image_ids: Integers, truth: Truth) -> Integers:
    """Finds for each image of the truth its row among some rows of the detections, -1 for none, int64 [I].

    Raises:
        UserError: An image stands in two rows.
    """
    places, is_known = places_in(truth.columns.image_ids, image_ids)
    ids, counts = np.unique(image_ids, return_counts=True)
    if len(ids) < len(image_ids):
        raise UserError(
            f"{uri} has image {ids[counts > 1][0]} more than once; a detections table has one row for each image"
        )
    rows = np.full(len(truth.columns.image_ids), -1, dtype=np.int64)
    rows[places[is_known]] = np.flatnonzero(is_known)
    return rows


def choose_images(
    uri: str, image_ids: Integers, rows: Integers, truth: Truth, *, is_table: bool, allow_partial: bool
) -> tuple[Integers, int]:
    """Says which images of the truth can be measured.

    Args:
        uri: Where the detections were read.
        image_ids: All images there, int64 [R].
        rows: What `find_rows` gave for them.
        truth: What they are held against.
        is_table: Whether there must be a row for each image of the truth.
        allow_partial: Leave out the images that only one side has.

    Returns:
        Rows of the truth, int64 [I], and the number of images left out.

    Raises:
        UserError: The images differ.
    """
    known, has_row = truth.columns.image_ids, rows >= 0
    if is_table and not image_ids.size:
        raise UserError(f"{uri} holds no image; the truth {truth.uri} has {len(known):,}")
    unknown = np.setdiff1d(image_ids, known)
    if unknown.size and not (allow_partial and has_row.any()):
        raise UserError(
            f"{uri} has {'rows of' if is_table else 'detections in'} {unknown.size:,} images that the truth "
            f"{truth.uri} does not have, such as image {unknown[0]}"
            + (
                "; --allow-partial measures the images that both have"
                if has_row.any()
                else ", and none that it has: they are of different data"
            )
        )
    num_missing = int((~has_row).sum()) if is_table else 0
    if num_missing and not allow_partial:
        raise UserError(
            f"{uri} has no row for {num_missing:,} of the {len(known):,} images of {truth.uri}, such as image "
            f"{known[~has_row][0]}: predict did not see the same data; run it on this truth, or measure the images "
            "that both have with --allow-partial"
        )
    return np.flatnonzero(has_row) if is_table else np.arange(len(known)), unknown.size + num_missing


# Tables.


def model_of(table: Table) -> str | None:
    """The checkpoint that made a detections table."""
    model: str | None = parse_metadata(table.schema, kind="detections", where=table.uri).get("checkpoint")
    return model


def read_detection_rows(table: Table, truth: Truth, batches: Iterable[pa.RecordBatch]) -> DetectionRows:
    """Reads some or all rows of a detections table.

    Args:
        table: The table.
        truth: Whose category indices the result has; categories are told apart by their names.
        batches: Rows of the table with the columns of `DETECTION_FIELDS`.

    Raises:
        UserError: The classes are others, a box or score means nothing, or an image with an error has detections.
    """
    to_truth = _map_categories(table, truth)
    image_ids, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    errors: dict[int, str] = {}
    parts: list[tuple[Boxes, Floats, Integers]] = [(as_boxes([]), np.zeros(0), np.zeros(0, np.int64))]
    for batch in batches:
        ids = image_ids_in(batch)
        counts, columns = flatten(batch, "detections", ("bbox", "score", "category"), table.uri)
        category = columns["category"]
        if category.size and not 0 <= category.min() <= category.max() < len(to_truth):
            raise UserError(
                f"{table.uri} has detections of a category that is not one of its {len(to_truth)} categories"
            )
        check_detections(table.uri, columns["bbox"], columns["score"], ids, counts)
        has_error = numbers_of(batch.column("error").is_valid())
        if (counts[has_error] > 0).any():
            raise UserError(f"{table.uri} has an image with detections although its `error` says it has none")
        errors |= dict(zip(ids[has_error].tolist(), batch.column("error").drop_null().to_pylist(), strict=True))
        image_ids.append(ids)
        lengths.append(counts)
        parts.append((columns["bbox"], columns["score"], to_truth[category]))
    boxes_xywh, scores, category = (np.concatenate(column) for column in zip(*parts, strict=True))
    return DetectionRows(
        image_ids=np.concatenate(image_ids),
        columns=DetectionColumns(
            starts=starts_of(np.concatenate(lengths)), boxes_xywh=boxes_xywh, scores=scores, category=category
        ),
        errors=errors,
    )


def check_detections(where: str, boxes_xywh: Boxes, scores: Floats, image_ids: Integers, lengths: Integers) -> None:
    """Refuses boxes and scores that mean nothing."""
    for bad, what in (
        (~np.isfinite(boxes_xywh).all(axis=1), "a box that is not finite (NaN or infinite)"),
        (~np.isfinite(scores), "a score that is not finite (NaN or infinite)"),
        ((boxes_xywh[:, 2:] < 0).any(axis=1), "a box of negative width or height; boxes are x, y, width, height"),
        ((scores < 0) | (scores > 1), "a score outside of 0 … 1"),
    ):
        if bad.any():
            image_id = np.repeat(image_ids, lengths)[bad][0]
            raise UserError(f"{where}: {bad.sum()} detections have {what}, such as one in image {image_id}")


def _map_categories(table: Table, truth: Truth) -> Integers:
    """For each category of a detections table its index in the truth, by name."""
    names, truth_names = ([category.name for category in side.categories] for side in (table, truth))
    if names == truth_names:
        return np.arange(len(names))
    only_here, only_there = (
        ", ".join(repr(name) for name in first if name not in set(second)) or "none"
        for first, second in ((names, truth_names), (truth_names, names))
    )
    if set(names) != set(truth_names):
        raise UserError(
            f"the categories differ: only in the detections {table.uri}: {only_here}; only in the truth {truth.uri}: "
            f"{only_there}"
        )
    if len(set(names)) < len(names) or len(names) != len(truth_names):
        raise UserError(
            f"{table.uri} and {truth.uri} order their categories differently, and some share a name: they cannot be "
            "told apart; give each category its own name"
        )
    return np.array([truth_names.index(name) for name in names], dtype=np.int64)


def _read_results(uri: str, truth: Truth) -> DetectionRows:
    image_ids, columns = read_results(uri, truth.categories)
    check_detections(uri, columns.boxes_xywh, columns.scores, image_ids, np.diff(columns.starts))
    return DetectionRows(image_ids=image_ids, columns=columns, errors={})
