"""Read detections from a table or COCO results JSON, check them and join them to the truth by image.

Detections keep their input order within an image.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raydet.common.boxes import as_boxes
from raydet.common.class_names import check_mapping, folded, indices_in, is_unused
from raydet.common.errors import UserError
from raydet.config.measuring import JoinKey
from raydet.measuring.joining import ImageKeys, join_images, list_images
from raydet.measuring.truth import Truth, is_json
from raydet.tables import storage
from raydet.tables.checks import check_boxes
from raydet.tables.coco_columns import read_results
from raydet.tables.columns import (
    BATCH_ROWS,
    DetectionColumns,
    Integers,
    TruthColumns,
    concatenate_detections,
    flatten,
    numbers_of,
    starts_of,
    take_detections,
    take_truth,
)
from raydet.tables.schema import parse_metadata
from raydet.tables.table import Table, open_table

DETECTION_FIELDS = ("image_id", "detections", "error")


@dataclass(frozen=True, kw_only=True)
class DetectionRows:
    """Rows of a detections table.

    Attributes:
        columns: Detections by row, with the truth's category indices.
        errors: Row → reason why the detector could not read its image.
        num_other_class: Number of detections left out, because the truth lacks their class.
    """

    columns: DetectionColumns
    errors: dict[int, str]
    num_other_class: int = 0


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Detections joined to the truth: the same images on both sides, in ascending id order.

    Attributes:
        truth_rows: Rows of the full truth that are measured, int64 [I].
        found_ids: Image id of each of them in the detections, -1 if it has no row there, int64 [I].
        errors: Image id → reason why the detector could not read the image, which then has no detections.
        num_left_out: Number of images that only one side has, with `allow_partial`.
        note: Line about how the images were joined, if worth reporting.
        model: Checkpoint recorded in the detections table.
        has_operating_point: True if the detections are those of `predict --operating-point`.
        num_detections: Number of detections in all measured images.
        num_other_class: Number of detections left out, because the truth lacks their class.
    """

    uri: str
    columns: DetectionColumns
    truth_columns: TruthColumns
    truth_rows: Integers
    found_ids: Integers
    errors: dict[int, str] = field(default_factory=dict)
    num_left_out: int = 0
    note: str | None = None
    model: str | None = None
    has_operating_point: bool = False
    num_detections: int = 0
    num_other_class: int = 0


def read_detections(uri: str, truth: Truth, *, join: JoinKey = "id", allow_partial: bool | None = None) -> Scored:
    """Read a detections table, or COCO results JSON, which omits images without detections.

    `join` is the key that identifies an image on both sides. `allow_partial` measures only the images that both sides
    have, instead of raising an error; None if the command has no such option.

    Raises:
        UserError: The input does not exist or is damaged, a box or score is invalid, the images or classes differ
            from those of the truth, or the two sides share no images.
    """
    uri = storage.absolute_uri(uri)
    if is_json(uri, "detections", "a detections table or COCO results JSON"):
        image_ids, columns = read_results(uri, truth.categories)
        check_boxes(
            uri,
            boxes_xywh=columns.boxes_xywh,
            scores=columns.scores,
            num_categories=len(truth.categories),
            image_of=lambda: np.repeat(image_ids, np.diff(columns.starts)),
            noun="detections",
        )
        rows, model, has_point = DetectionRows(columns=columns, errors={}), None, False
        found = ImageKeys(uri=uri, image_ids=image_ids, sizes_hw=np.zeros((len(image_ids), 2), np.int64))
        joined = join_images(truth.images, found, by=join, allow_partial=allow_partial, has_every_image=False)
    else:
        table = open_table(uri, "detections")
        joined = join_images(truth.images, list_images(table), by=join, allow_partial=allow_partial)
        rows = read_detection_rows(table, truth, table.iter_batches(DETECTION_FIELDS, BATCH_ROWS))
        model, has_point = model_of(table), has_operating_point(table)
    columns = take_detections(rows.columns, joined.rows_of(len(truth.images.image_ids))[joined.truth_rows])
    return Scored(
        uri=uri,
        columns=columns,
        truth_columns=take_truth(truth.columns, joined.truth_rows),
        truth_rows=joined.truth_rows,
        found_ids=joined.found_ids,
        errors=errors_by_id(rows.errors, joined.truth_row, truth),
        num_left_out=joined.num_left_out,
        note=joined.note,
        model=model,
        has_operating_point=has_point,
        num_detections=len(columns.scores),
        num_other_class=rows.num_other_class,
    )


def errors_by_id(errors: dict[int, str], truth_row: Integers, truth: Truth) -> dict[int, str]:
    """Key errors by image id instead of the row; `truth_row` is each row's place in the truth, -1 if it has none."""
    places = truth_row[list(errors)].tolist()
    ids = truth.images.image_ids
    return {int(ids[place]): reason for place, reason in zip(places, errors.values(), strict=True) if place >= 0}


def model_of(table: Table) -> str | None:
    """Return the checkpoint that produced a detections table."""
    model: str | None = parse_metadata(table.schema, kind="detections", where=table.uri).get("checkpoint")
    return model


def has_operating_point(table: Table) -> bool:
    """Return True if `predict --operating-point` wrote a detections table."""
    return parse_metadata(table.schema, kind="detections", where=table.uri).get("operating_point") is not None


def read_detection_rows(table: Table, truth: Truth, batches: Iterable[pa.RecordBatch]) -> DetectionRows:
    """Read batches of a detections table with `DETECTION_FIELDS`; categories become those of the truth, by name.

    Detections of a class that the truth lacks are left out and counted.

    Raises:
        UserError: The classes differ, a box or score is invalid, or an image with an error has detections.
    """
    to_truth = map_categories(table, truth)
    errors: dict[int, str] = {}
    nothing = np.zeros(0, np.int64)
    parts = [DetectionColumns(starts=starts_of(nothing), boxes_xywh=as_boxes([]), scores=np.zeros(0), category=nothing)]
    num_rows = num_other_class = 0
    for batch in batches:
        counts, columns = flatten(batch, "detections", ("bbox", "score", "category"), table.uri)
        has_error = numbers_of(batch.column("error").is_valid())
        if (counts[has_error] > 0).any():
            raise UserError(f"{table.uri} has an image with both detections and an `error`; expected one or neither")
        bad_rows = (np.flatnonzero(has_error) + num_rows).tolist()
        errors |= dict(zip(bad_rows, batch.column("error").drop_null().to_pylist(), strict=True))
        num_rows += batch.num_rows
        boxes_xywh, scores, category = columns["bbox"], columns["score"], to_truth[columns["category"]]
        is_known = category >= 0
        if not is_known.all():
            row = np.repeat(np.arange(len(counts)), counts)
            counts = np.bincount(row[is_known], minlength=len(counts))
            boxes_xywh, scores, category = boxes_xywh[is_known], scores[is_known], category[is_known]
            num_other_class += int((~is_known).sum())
        parts.append(
            DetectionColumns(starts=starts_of(counts), boxes_xywh=boxes_xywh, scores=scores, category=category)
        )
    return DetectionRows(columns=concatenate_detections(parts), errors=errors, num_other_class=num_other_class)


def map_categories(table: Table, truth: Truth) -> Integers:
    """Return the truth's index of each category of a detections table, mapped by name; -1 if the truth lacks it."""
    names, truth_names = ([category.name for category in side.categories] for side in (table, truth))
    check_mapping(truth.class_mapping, truth_names, names, where=table.uri, of_names=truth.uri)
    renamed = {folded(name): new for name, new in truth.class_mapping.items()}
    names = [renamed.get(folded(name), name) for name in names]
    if names == truth_names:
        return np.arange(len(names))
    used, truth_used = (
        [name for index, name in enumerate(side) if not is_unused(name, index)] for side in (names, truth_names)
    )
    places = indices_in(names, truth_names)
    found = set(places.tolist())
    missing = [name for index, name in enumerate(truth_names) if index not in found and not is_unused(name, index)]
    if len(set(used)) < len(used) or len(set(truth_used)) < len(truth_used):
        raise UserError(
            f"{table.uri} and {truth.uri} order their categories differently and some categories share a name; "
            "category names must be unique"
        )
    if missing:
        only_here = [name for name, place in zip(names, places, strict=True) if place < 0 and name in used]
        raise UserError(
            f"the categories differ: only in detections {table.uri}: {', '.join(map(repr, only_here)) or 'none'}; only "
            f"in truth {truth.uri}: {', '.join(map(repr, missing))}; if a class has another name on each side, use "
            "--class-mapping of evaluate"
        )
    return places
