"""Score analysis of the matches: precision-recall curves, thresholds, calibration and counts per image."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.measuring.numbers.matches import Matches, Protocol, bits_at
from raydet.measuring.numbers.metrics import CocoResult, accumulate
from raydet.measuring.numbers.precision import COCO_RECALLS, coco_precision, hits_needed, precision_at
from raydet.measuring.numbers.values import MetricValue
from raydet.tables.columns import Flags, Floats, Integers
from raydet.tables.schema import Category, TableKind, build_schema

Indices = npt.NDArray[np.signedinteger[Any]]

IOU = 0.5
"""Minimum overlap at which a detection finds a box, throughout the error analysis."""
_NUM_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Detections and boxes that count at one IoU threshold; crowds and detections inside crowds are excluded.

    Attributes:
        num_categories: Number of classes; 1 if they count as one.
        class_agnostic: All classes count as one, so there are no values by class.
        image_ids: All images, ascending, int64 [I].
        image: Row in `image_ids`, int32 [D].
        category: int32 [D].
        scores: float64 [D].
        is_right: True if the detection found a box, bool [D].
        detection_row: As in `Matches`, int64 [D].
        truth_image: Row in `image_ids`, int32 [G].
        truth_category: int32 [G].
        truth_row: As in `Matches`, int64 [G].
        is_found: True if a detection found the box, bool [G].
    """

    num_categories: int
    class_agnostic: bool
    image_ids: Integers
    image: npt.NDArray[np.int32]
    category: npt.NDArray[np.int32]
    scores: Floats
    is_right: Flags
    detection_row: Integers
    truth_image: npt.NDArray[np.int32]
    truth_category: npt.NDArray[np.int32]
    truth_row: Integers
    is_found: Flags

    @property
    def num_truth(self) -> Integers:
        """Number of boxes of each class that count, int64 [C]."""
        return np.bincount(self.truth_category, minlength=self.num_categories)

    def names(self, categories: Sequence[Category]) -> list[str | None]:
        """Return the `category` values of a table: None for all classes, then each class with values of its own."""
        return [None] if self.class_agnostic else [None, *(category.name for category in categories)]

    def by_class(self) -> Iterator[tuple[Floats, Flags, int]]:
        """Yield for each class: scores in descending order, correctness of each detection, number of boxes."""
        order = np.lexsort((-self.scores, self.category))
        starts = np.searchsorted(self.category[order], np.arange(self.num_categories + 1))
        for index, num_truth in enumerate(self.num_truth.tolist()):
            own = order[starts[index] : starts[index + 1]]
            yield self.scores[own], self.is_right[own], num_truth


def threshold_index(protocol: Protocol, iou: float) -> int | None:
    """Return the index of an IoU threshold in a protocol; None if the protocol does not have it."""
    found = np.flatnonzero(np.isclose(protocol.iou_thresholds, iou, rtol=0, atol=1e-9))
    return int(found[0]) if found.size else None


def outcomes_at(matches: Matches, iou: float = IOU) -> Outcomes:
    """Return the detections and boxes that count at one IoU threshold, for boxes of all sizes.

    Raises:
        ValueError: The protocol does not have this IoU threshold.
    """
    index = threshold_index(matches.protocol, iou)
    if index is None:
        raise ValueError(f"matched at IoU {matches.protocol.iou_thresholds}, which does not include {iou}")
    counts = ~bits_at(matches.ignored[0], index)
    truth_counts = ~matches.truth_ignored[0]
    return Outcomes(
        num_categories=matches.num_categories,
        class_agnostic=matches.protocol.class_agnostic,
        image_ids=matches.image_ids,
        image=matches.detection_image[counts],
        category=matches.detection_category[counts],
        scores=matches.scores[counts],
        is_right=bits_at(matches.true_positive[0], index)[counts],
        detection_row=matches.detection_row[counts],
        truth_image=matches.truth_image[truth_counts],
        truth_category=matches.truth_category[truth_counts],
        truth_row=matches.truth_row[truth_counts],
        is_found=bits_at(matches.truth_found, index)[truth_counts],
    )


def build_table(
    kind: TableKind, categories: Sequence[Category], run: str | None, columns: Mapping[str, object], **metadata: float
) -> pa.Table:
    """Build a table in its declared schema, with the name of the run in every row; NaN becomes null."""
    schema = build_schema(kind, categories, extra_metadata=metadata)
    arrays = {name: pa.array(column, schema.field(name).type, from_pandas=True) for name, column in columns.items()}
    num_rows = len(next(iter(arrays.values())))
    arrays["run"] = pa.array([run], pa.string()).take(pa.array(np.zeros(num_rows, dtype=np.int64)))
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def average_precision(category: Indices, scores: Floats, is_right: Flags, num_truth: Integers) -> Floats:
    """Return COCO's average precision of each class at one IoU threshold: mean precision over 101 recalls.

    `category`, `scores` and `is_right` are those of each detection that counts, [D], `num_truth` the number of boxes
    of each class, [C]. The result is float64 [C], NaN for a class without boxes; detections with equal scores keep
    their order.
    """
    order = np.lexsort((-scores, category))
    starts = np.searchsorted(category[order], np.arange(len(num_truth)))
    hits = np.flatnonzero(is_right[order])
    own = category[order][hits]
    hits, own = hits[num_truth[own] > 0], own[num_truth[own] > 0]
    num_hits, known = np.bincount(own, minlength=len(num_truth)), np.flatnonzero(num_truth)
    precision = coco_precision(own, hits + 1 - starts[own], num_hits)
    values = np.full(len(num_truth), np.nan)
    needed = hits_needed(num_truth[known], COCO_RECALLS)
    values[known] = precision_at(precision, num_hits[known], needed).mean(axis=1)
    return values


def pr_curves(
    matches: Matches, categories: Sequence[Category], *, run: str | None = None, result: CocoResult | None = None
) -> pa.Table:
    """Tabulate precision over 101 recalls from 0 to 1, by class with boxes and for their mean: a `pr_curves` table.

    The curves are those of `accumulate`, for boxes of all sizes and the highest detection limit; the mean of a curve
    is the AP. There is one curve at IoU 0.5, one at 0.75 if the protocol has it, and the mean over all thresholds.
    `score` is the highest score threshold that reaches the recall. `result` is that of `accumulate`, if known.
    """
    result = result or accumulate(matches, categories)
    precision = result.precision[:, :, :, 0, -1]
    measured = np.flatnonzero((precision > -1).any(axis=(0, 1)))
    is_one = matches.protocol.class_agnostic
    curves: list[tuple[str | None, float | None, Floats, Floats]] = []
    for iou in (0.5, 0.75, None):
        index = None if iou is None else threshold_index(matches.protocol, iou)
        if iou is not None and index is None:
            continue
        of_classes = precision.mean(axis=0) if index is None else precision[index]
        nothing = np.full(of_classes.shape, np.nan)
        scores = nothing if iou is None else _scores_at_recalls(outcomes_at(matches, iou))
        if measured.size and not is_one:
            curves.append((None, iou, of_classes[:, measured].mean(axis=1), nothing[:, 0]))
        for i in measured.tolist():
            curves.append((None if is_one else categories[i].name, iou, of_classes[:, i], scores[:, i]))
    columns = {
        "category": [name for name, *_ in curves for _ in COCO_RECALLS],
        "iou": [iou for _, iou, *_ in curves for _ in COCO_RECALLS],
        "recall": np.tile(COCO_RECALLS, len(curves)),
        "precision": np.ravel([precision for *_, precision, _ in curves]),
        "score": np.ravel([score for *_, score in curves]),
    }
    return build_table("pr_curves", categories, run, columns)


def _scores_at_recalls(outcomes: Outcomes) -> Floats:
    """Return the score threshold at which each class reaches each recall, [101, C]; NaN for unreached recalls."""
    scores_at = np.full((len(COCO_RECALLS), outcomes.num_categories), np.nan)
    for index, (scores, is_right, num_truth) in enumerate(outcomes.by_class()):
        if num_truth:
            places = np.searchsorted(np.cumsum(is_right) / num_truth, COCO_RECALLS, side="left")
            scores_at[:, index] = np.append(scores, np.nan)[places]
    return scores_at


@dataclass(frozen=True)
class OperatingPoint:
    """Score threshold, and the metrics of the detections at or above it; None if undefined."""

    threshold: float
    precision: float | None
    recall: float | None
    f1: float | None


def best_threshold(scores: Floats, is_right: Flags, num_truth: int) -> OperatingPoint:
    """Return the score threshold with the highest F1, the highest of several; 0 if no detection is correct.

    The scores and flags, [D], are those of the detections that count, in any order.
    """
    if not is_right.any():
        precision, recall = 0.0 if scores.size else None, 0.0 if num_truth else None
        return OperatingPoint(0.0, precision, recall, None if precision is recall is None else 0.0)
    scores, num_right, num_kept = _kept_at_thresholds(scores, is_right)
    best = int(np.argmax(2 * num_right / (num_kept + num_truth)))
    right, kept = float(num_right[best]), float(num_kept[best])
    return OperatingPoint(float(scores[best]), right / kept, right / num_truth, 2 * right / (kept + num_truth))


def threshold_at_precision(scores: Floats, is_right: Flags, target_precision: float) -> float | None:
    """Return the lowest score threshold at which the remaining detections reach this precision; None if none does."""
    if not scores.size:
        return None
    scores, num_right, num_kept = _kept_at_thresholds(scores, is_right)
    good = np.flatnonzero(num_right / num_kept >= target_precision)
    return float(scores[good[-1]]) if good.size else None


def _kept_at_thresholds(scores: Floats, is_right: Flags) -> tuple[Floats, Integers, Integers]:
    """Return the distinct scores in descending order, and the correct and total detections at or above each."""
    order = np.argsort(-scores, kind="stable")
    scores, num_right = scores[order], np.cumsum(is_right[order])
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    return scores[last], num_right[last].astype(np.int64), (last + 1).astype(np.int64)


def score_values(
    outcomes: Outcomes, categories: Sequence[Category], *, max_detections: int, target_precision: float | None = None
) -> list[MetricValue]:
    """Return the score metrics at IoU 0.5, over all classes and by class.

    These are `best_f1`, with `best_f1_threshold`, `best_f1_precision` and `best_f1_recall` at the score that reaches
    it; `ECE`, the expected calibration error (Guo et al. 2017); and, with a target precision, the lowest
    `threshold_at_precision`.
    """
    over = [(outcomes.scores, outcomes.is_right, len(outcomes.truth_row)), *outcomes.by_class()]
    found = []
    # If classes count as one, the only class is skipped.
    named = zip(outcomes.names(categories), over, calibration_errors(outcomes), strict=not outcomes.class_agnostic)
    for name, (scores, is_right, num_truth), error in named:
        best = best_threshold(scores, is_right, num_truth)
        values: dict[str, float | None] = {
            "best_f1": best.f1,
            "best_f1_threshold": best.threshold if is_right.any() else None,
            "best_f1_precision": best.precision,
            "best_f1_recall": best.recall,
            "ECE": error,
        }
        if target_precision is not None:
            values["threshold_at_precision"] = threshold_at_precision(scores, is_right, target_precision)
        found += [
            MetricValue(metric=metric, value=value, category=name, iou=IOU, area="all", max_detections=max_detections)
            for metric, value in values.items()
        ]
    return found


def calibration(outcomes: Outcomes, categories: Sequence[Category], *, run: str | None = None) -> pa.Table:
    """Compare scores with the precision they should predict: a `calibration` table, overall and by class.

    Ten bins of equal width over [0, 1], closed below (the last one also above), with the number of detections, their
    mean score and the share of correct ones; the last two are null in an empty bin.
    """
    names = outcomes.names(categories)
    counts, score_sums, right_sums = (part[: len(names)].ravel() for part in _bin_sums(outcomes))
    ends = np.arange(_NUM_BINS + 1) / _NUM_BINS
    with np.errstate(invalid="ignore"):
        columns = {
            "category": [name for name in names for _ in range(_NUM_BINS)],
            "low": np.tile(ends[:-1], len(names)),
            "high": np.tile(ends[1:], len(names)),
            "count": counts,
            "mean_score": score_sums / counts,
            "precision": right_sums / counts,
        }
    return build_table("calibration", categories, run, columns)


def _bin_sums(outcomes: Outcomes) -> tuple[Floats, ...]:
    """Return the number, score sum and correct number of detections by bin, overall and by class, [1 + C, 10]."""
    inner_ends = np.arange(1, _NUM_BINS) / _NUM_BINS
    place = outcomes.category.astype(np.int64) * _NUM_BINS + np.searchsorted(inner_ends, outcomes.scores, side="right")
    sums = []
    for weights in (np.ones(len(place)), outcomes.scores, outcomes.is_right):
        of_bins = np.bincount(place, weights=weights, minlength=outcomes.num_categories * _NUM_BINS)
        of_classes = of_bins.reshape(outcomes.num_categories, _NUM_BINS)
        sums.append(np.concatenate([of_classes.sum(axis=0, keepdims=True), of_classes]))
    return tuple(sums)


def calibration_errors(outcomes: Outcomes) -> list[float | None]:
    """Return the mean distance of precision from score, weighted by the detections in a bin; None without any."""
    counts, score_sums, right_sums = _bin_sums(outcomes)
    distances = np.abs(score_sums - right_sums).sum(axis=1).tolist()
    numbers = counts.sum(axis=1).tolist()
    return [distance / number if number else None for distance, number in zip(distances, numbers, strict=True)]


def per_image(
    matches: Matches,
    outcomes: Outcomes,
    *,
    threshold: float,
    run: str | None = None,
    errors: Mapping[int, str] | None = None,
) -> pa.Table:
    """Count correct, wrong and missed boxes of each image, in ascending id order: a `per_image` table.

    Counts are at one score threshold and IoU 0.5. `num_detections` includes detections inside a crowd, which are
    neither correct nor wrong, but none beyond the highest detection limit. F1 is null for an image with neither boxes
    nor detections. `errors` are the reasons why images could not be read, by image id.
    """
    num_images = len(matches.image_ids)
    kept = outcomes.scores >= threshold
    right = np.bincount(outcomes.image[kept & outcomes.is_right], minlength=num_images)
    wrong = np.bincount(outcomes.image[kept & ~outcomes.is_right], minlength=num_images)
    num_truth = np.bincount(outcomes.truth_image, minlength=num_images)
    with np.errstate(invalid="ignore"):
        f1 = 2 * right / (right + wrong + num_truth)
    of_image = errors or {}
    columns = {
        "image_id": matches.image_ids,
        "num_truth": num_truth,
        "num_detections": np.bincount(matches.detection_image[matches.scores >= threshold], minlength=num_images),
        "true_positives": right,
        "false_positives": wrong,
        "false_negatives": num_truth - right,
        "f1": f1,
        "error": [of_image.get(image_id) for image_id in matches.image_ids.tolist()],
    }
    return build_table("per_image", (), run, columns, iou=IOU, score_threshold=threshold)
