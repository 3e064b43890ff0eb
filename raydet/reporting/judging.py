"""Judge the boxes of selected images: correct, wrong, missed or of another class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.boxes import as_boxes
from raydet.common.class_names import indices_in
from raydet.measuring.detections import Scored, read_detections
from raydet.measuring.joining import join_images, list_images
from raydet.measuring.numbers.matches import Protocol, bits_at
from raydet.measuring.numbers.matching import match, overlapping_pairs
from raydet.measuring.truth import Truth
from raydet.reporting.run_tables import RunTables
from raydet.tables.columns import DetectionColumns, TruthColumns
from raydet.tables.schema import LABELLED_COLUMN
from raydet.tables.table import Table

_IOU = 0.5
_DEFAULT_THRESHOLD = 0.3

_Flags = npt.NDArray[np.bool_]
_Boxed = list[tuple[list[float], str]]


@dataclass(frozen=True, kw_only=True)
class JudgedImage:
    """Judged boxes of one image.

    Attributes:
        truth: Box (x, y, width, height in pixels of the image) and class of each labelled object [G].
        detections: Box, and class with score, of each detection above the threshold [D].
        is_missed: bool [G].
        is_taken_for_other: Missed, and overlapped by a detection of another class, bool [G].
        is_false: bool [D].
        is_other_class: Wrong, and overlaps a missed object of another class, bool [D].
    """

    truth: _Boxed
    detections: _Boxed
    is_missed: _Flags
    is_taken_for_other: _Flags
    is_false: _Flags
    is_other_class: _Flags


def score_threshold(run: RunTables) -> float:
    """Return the minimum score of detections in the galleries, the one with the best F1 over all classes."""
    best = run.value("best_f1_threshold").value
    return _DEFAULT_THRESHOLD if best is None else best


def read_scored(run: RunTables, truth: Truth) -> Scored:
    """Read the detections of an evaluated run as the evaluation did.

    Raises:
        UserError: They no longer exist, or are not those of the truth.
    """
    return read_detections(
        run.detections.uri,
        replace(truth, class_mapping=run.settings.get("class_mapping") or {}),
        join="path" if run.settings.get("join") == "path" else "id",
        allow_partial=True,
    )


def judge(run: RunTables, image_ids: Sequence[int]) -> dict[int, JudgedImage]:
    """Match truth and detections of selected images again.

    Args:
        run: Run that names the tables.
        image_ids: Ids of the images; ids that the truth does not have are skipped.

    Raises:
        UserError: Truth or detections no longer exist, or are not tables.
    """
    truth_table, found_table = run.truth, run.detections
    labelled = _rows(truth_table, image_ids, "objects")
    found = _found_rows(run, truth_table, found_table, image_ids)
    names = [category.name for category in truth_table.categories]
    to_truth = indices_in([category.name for category in found_table.categories], names)
    ids = sorted(labelled)
    truth = _truth_columns(ids, [labelled[image_id] for image_id in ids])
    if LABELLED_COLUMN in truth_table.schema.names:
        classes = _rows(truth_table, image_ids, LABELLED_COLUMN)
        truth = replace(truth, labelled=pa.array([classes[image_id] for image_id in ids], pa.list_(pa.int64())))
    threshold = score_threshold(run)
    detections = _detection_columns([found.get(image_id) for image_id in ids], to_truth, threshold)
    return _judged(ids, truth, detections, names)


def _found_rows(
    run: RunTables, truth_table: Table, found_table: Table, image_ids: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """Return the detections in selected images by the truth's image id, joined as in the evaluation."""
    if run.settings.get("join") != "path":
        return _rows(found_table, image_ids, "detections")
    truth = list_images(truth_table)
    truth = truth.take(np.argsort(truth.image_ids, kind="stable"))
    found = list_images(found_table)
    truth_row = join_images(truth, found, by="path", allow_partial=True).truth_row
    ids = np.where(truth_row >= 0, truth.image_ids[truth_row], -1)
    wanted = np.isin(ids, list(image_ids))
    truth_id_of = dict(zip(found.image_ids[wanted].tolist(), ids[wanted].tolist(), strict=True))
    rows = _rows(found_table, list(truth_id_of), "detections")
    return {truth_id_of[image_id]: row for image_id, row in rows.items()}


def _rows(table: Table, image_ids: Sequence[int], column: str) -> dict[int, Any]:
    """Return the boxes, or another column, of selected images by image id, without reading image data."""
    wanted = pa.array(image_ids, pa.int64())
    rows: dict[int, Any] = {}
    for batch in table.iter_batches(["image_id", column], batch_size=4096):
        chosen = batch.filter(pc.is_in(batch.column("image_id"), wanted))
        rows.update(zip(chosen.column("image_id").to_pylist(), chosen.column(column).to_pylist(), strict=True))
    return rows


def _truth_columns(ids: Sequence[int], rows: Sequence[dict[str, Any] | None]) -> TruthColumns:
    lists = [row or {"bbox": [], "category": [], "area": [], "iscrowd": []} for row in rows]
    return TruthColumns(
        image_ids=np.array(ids, np.int64),
        starts=np.cumsum([0, *(len(row["bbox"]) for row in lists)], dtype=np.int64),
        boxes_xywh=as_boxes([box for row in lists for box in row["bbox"]]),
        category=np.array([value for row in lists for value in row["category"]], np.int64),
        area=np.array([value for row in lists for value in row["area"]], np.float64),
        iscrowd=np.array([value for row in lists for value in row["iscrowd"]], np.bool_),
    )


def _detection_columns(
    rows: Sequence[dict[str, Any] | None], to_truth: npt.NDArray[np.int64], threshold: float
) -> DetectionColumns:
    kept: list[list[tuple[list[float], float, int]]] = []
    for row in rows:
        triples = zip(row["bbox"], row["score"], row["category"], strict=True) if row else ()
        kept.append([item for item in triples if item[1] >= threshold and to_truth[item[2]] >= 0])
    items = [item for row in kept for item in row]
    return DetectionColumns(
        starts=np.cumsum([0, *map(len, kept)], dtype=np.int64),
        boxes_xywh=as_boxes([box for box, _, _ in items]),
        scores=np.array([score for _, score, _ in items], np.float64),
        category=np.array([to_truth[category] for _, _, category in items], np.int64),
    )


def _judged(
    ids: Sequence[int], truth: TruthColumns, detections: DetectionColumns, names: Sequence[str]
) -> dict[int, JudgedImage]:
    outcome = match(truth, detections, len(names), Protocol(iou_thresholds=(_IOU,)))
    is_missed, is_false = np.zeros(len(truth.category), np.bool_), np.zeros(len(detections.category), np.bool_)
    is_missed[outcome.truth_row] = ~bits_at(outcome.truth_found, 0) & ~outcome.truth_ignored[0]
    is_false[outcome.detection_row] = ~bits_at(outcome.true_positive[0], 0) & ~bits_at(outcome.ignored[0], 0)
    pairs = overlapping_pairs(truth, detections, same_category=False, min_iou=_IOU)
    others = is_false[pairs.detection] & is_missed[pairs.truth]
    others &= detections.category[pairs.detection] != truth.category[pairs.truth]
    is_other_class, is_taken = np.zeros_like(is_false), np.zeros_like(is_missed)
    is_other_class[pairs.detection[others]] = True
    is_taken[pairs.truth[others]] = True
    judged = {}
    for number, image_id in enumerate(ids):
        own, found = (slice(starts[number], starts[number + 1]) for starts in (truth.starts, detections.starts))
        labels = [names[category] for category in truth.category[own].tolist()]
        scored = zip(detections.category[found].tolist(), detections.scores[found].tolist(), strict=True)
        judged[image_id] = JudgedImage(
            truth=list(zip(truth.boxes_xywh[own].tolist(), labels, strict=True)),
            detections=[
                (box, f"{names[category]} {score:.2f}")
                for box, (category, score) in zip(detections.boxes_xywh[found].tolist(), scored, strict=True)
            ],
            is_missed=is_missed[own],
            is_taken_for_other=is_taken[own],
            is_false=is_false[found],
            is_other_class=is_other_class[found],
        )
    return judged
