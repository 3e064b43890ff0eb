"""Suppression of overlapping boxes of any classes among the detections that pass the thresholds."""

import numpy as np

from raydet.common.boxes import kept_of_pairs
from raydet.measuring.diagnosis.scores import IOU, Outcomes, outcomes_at
from raydet.measuring.fitting.calibrating import NUM_FOLDS, folds_of
from raydet.measuring.numbers.matches import Protocol
from raydet.measuring.numbers.matching import Pairs, match, match_in_parts, overlapping_pairs
from raydet.tables.columns import (
    DetectionColumns,
    Flags,
    Floats,
    Integers,
    TruthColumns,
    as_labels,
    keep_detections,
)

CANDIDATES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""IoU thresholds to choose from."""


def outcomes_of(truth: TruthColumns, detections: DetectionColumns, num_categories: int) -> Outcomes:
    """Match detections with the truth, as `evaluate` does, and return what counts at IoU 0.5."""
    protocol = Protocol(iou_thresholds=(IOU,))
    matches = match_in_parts(truth, detections, lambda own, found, _: match(own, found, num_categories, protocol))
    return outcomes_at(matches)


def choose_nms(
    truth: TruthColumns,
    detections: DetectionColumns,
    calibrated: Floats,
    num_categories: int,
    *,
    seed: int,
    keeps_precision: bool,
) -> tuple[float | None, Outcomes]:
    """Choose the IoU threshold of class-agnostic suppression with the best F1 over all classes; None if none gains.

    A threshold counts as a gain if, chosen on four fifths of the images, it raises the F1 of the others, over five
    folds.

    Args:
        truth: Labelled boxes.
        detections: Detections that pass the thresholds.
        calibrated: Their calibrated scores [D], by which the better of two boxes is kept; of equal ones the first.
        num_categories: Number of classes.
        seed: Seed of the folds.
        keeps_precision: Leave out thresholds with which the measured precision of a class falls.

    Returns:
        The threshold, and the outcomes of the detections that remain.
    """
    pairs = overlapping_detections(truth.image_ids, detections, calibrated)
    choices: list[float | None] = [None]
    plain = outcomes_of(truth, detections, num_categories)
    found = [plain]
    for iou in CANDIDATES:
        kept = kept_by_nms(pairs, len(calibrated), iou)
        if kept.all():
            continue
        outcomes = outcomes_of(truth, keep_detections(detections, kept), num_categories)
        if keeps_precision and (_precisions(outcomes) < _precisions(plain)).any():
            continue
        choices.append(iou)
        found.append(outcomes)
    counts = [_counts(outcomes) for outcomes in found]
    fold = folds_of(len(truth.image_ids), seed)
    held_out = np.zeros(2)
    for number in range(NUM_FOLDS):
        best = int(np.argmax([_f1(own[fold != number].sum(axis=0)) for own in counts]))
        held_out += counts[best][fold == number].sum(axis=0)
    if _f1(held_out) <= _f1(counts[0].sum(axis=0)):
        return None, plain
    best = int(np.argmax([_f1(own.sum(axis=0)) for own in counts]))
    return choices[best], found[best]


def _counts(outcomes: Outcomes) -> Floats:
    """Return of each image the correct detections, and the mean number of detections and boxes, float64 [I, 2]."""
    num = len(outcomes.image_ids)
    right = np.bincount(outcomes.image[outcomes.is_right], minlength=num)
    both = np.bincount(outcomes.image, minlength=num) + np.bincount(outcomes.truth_image, minlength=num)
    return np.stack([right, both / 2], axis=1)


def _f1(counts: Floats) -> float:
    return float(counts[0] / counts[1]) if counts[1] else 0.0


def _precisions(outcomes: Outcomes) -> Floats:
    """Return the precision of each class, 1 without detections, float64 [C]."""
    num_right, num_kept = (
        np.bincount(outcomes.category[chosen], minlength=outcomes.num_categories)
        for chosen in (outcomes.is_right, slice(None))
    )
    return np.where(num_kept > 0, num_right / np.maximum(num_kept, 1), 1.0)


def overlapping_detections(image_ids: Integers, detections: DetectionColumns, scores: Floats) -> Pairs:
    """Return the overlapping pairs of an image: a better detection as `truth`, sorted by it, and a worse one."""
    labels = as_labels(image_ids, detections)
    pairs = overlapping_pairs(labels, detections, same_category=False, min_iou=CANDIDATES[0])
    rank = np.empty(len(scores), np.int64)
    rank[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    better, worse = rank[pairs.truth], rank[pairs.detection]
    chosen = np.flatnonzero(better < worse)
    chosen = chosen[np.argsort(better[chosen], kind="stable")]
    return Pairs._make(column[chosen] for column in pairs)


def kept_by_nms(pairs: Pairs, num: int, iou: float) -> Flags:
    """Return which of `num` detections remain if each drops those worse ones that it overlaps by more than `iou`."""
    strong = pairs.iou > iou
    return kept_of_pairs(pairs.truth[strong], pairs.detection[strong], num)
