"""All tables of the error analysis, from one matching."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from raydet.measuring.diagnosis.errors import error_shares, gather
from raydet.measuring.diagnosis.labels import confusion, suspects
from raydet.measuring.diagnosis.scores import (
    IOU,
    OperatingPoint,
    best_threshold,
    calibration,
    per_image,
    pr_curves,
    score_values,
    threshold_index,
)
from raydet.measuring.numbers.matches import Matches
from raydet.measuring.numbers.matching import match
from raydet.measuring.numbers.metrics import CocoResult
from raydet.measuring.numbers.values import MetricValue
from raydet.tables.columns import DetectionColumns, TruthColumns
from raydet.tables.schema import Category, TableKind


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Result of `diagnose`.

    Attributes:
        tables: Tables `pr_curves`, `errors`, `confusion`, `calibration`, `suspects` and `per_image`.
        values: Additional values for the `metrics` table.
        best: Score threshold with the best F1 over all classes, at which `confusion` and `per_image` are computed.
    """

    tables: dict[TableKind, pa.Table]
    values: list[MetricValue]
    best: OperatingPoint


def diagnose(
    truth: TruthColumns,
    detections: DetectionColumns,
    matches: Matches,
    categories: Sequence[Category],
    *,
    run: str | None = None,
    target_precision: float | None = None,
    unreadable: Mapping[int, str] | None = None,
    result: CocoResult | None = None,
) -> Diagnosis:
    """Analyse the errors at IoU 0.5.

    The matches are of exactly these columns. If IoU 0.5 is not among the thresholds, or the matches were concatenated
    and have no column rows, the columns are matched again. `target_precision` adds the lowest score threshold that
    reaches it, and `unreadable` the reasons why images could not be read, by image id. `result` is that of
    `accumulate`, if known.
    """
    curves = pr_curves(matches, categories, run=run, result=result)
    has_rows = not ((matches.detection_row < 0).any() or (matches.truth_row < 0).any())
    if threshold_index(matches.protocol, IOU) is None or not has_rows:
        protocol = dataclasses.replace(matches.protocol, iou_thresholds=(IOU,))
        matches = match(truth, detections, matches.num_categories, protocol)
    evidence = gather(truth, detections, matches)
    outcomes = evidence.outcomes
    best = best_threshold(outcomes.scores, outcomes.is_right, len(outcomes.truth_row))
    tables: dict[TableKind, pa.Table] = {
        "pr_curves": curves,
        "errors": error_shares(evidence, categories, run=run),
        "confusion": confusion(evidence, categories, threshold=best.threshold, run=run),
        "calibration": calibration(outcomes, categories, run=run),
        "suspects": suspects(evidence, categories, run=run),
        "per_image": per_image(matches, outcomes, threshold=best.threshold, run=run, errors=unreadable),
    }
    limit = matches.protocol.max_detections[-1]
    values = score_values(outcomes, categories, max_detections=limit, target_precision=target_precision)
    return Diagnosis(tables=tables, values=values, best=best)
