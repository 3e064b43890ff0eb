"""Why detections are wrong and boxes are missed, and what each kind of error costs (TIDE)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.measuring.diagnosis.scores import IOU, Indices, Outcomes, average_precision, build_table, outcomes_at
from raydet.measuring.numbers.matches import Matches
from raydet.measuring.numbers.matching import Pairs, overlapping_pairs
from raydet.tables.columns import DetectionColumns, Flags, Floats, Integers, TruthColumns
from raydet.tables.schema import Category

BACKGROUND_IOU = 0.1
"""Below this overlap a detection has nothing to do with a box."""

ERRORS = ("class", "location", "both", "duplicate", "background")
"""Of a detection; its index stands in `Errors.kind`."""
_CLASS, _LOCATION, _BOTH, _DUPLICATE, _BACKGROUND = range(len(ERRORS))
_RIGHT = -1


@dataclass(frozen=True, kw_only=True)
class Errors:
    """What is wrong with each detection and each box of some `Outcomes`.

    Attributes:
        kind: Index in `ERRORS`, -1 for a right one, int8 [D].
        target: The box that a class or location error meant (its row in the outcomes' truth), else -1, int64 [D].
        is_missed: Whether no detection found the box and none meant it, bool [G].
    """

    kind: npt.NDArray[np.int8]
    target: Integers
    is_missed: Flags


@dataclass(frozen=True, kw_only=True)
class Overlaps:
    """Pairs of a detection and a box that overlap, both as rows in some `Outcomes`; crowds are left out.

    Attributes:
        detection: int64 [P].
        truth: int64 [P].
        iou: float64 [P].
        is_same: Whether both have one class, bool [P].
    """

    detection: Integers
    truth: Integers
    iou: Floats
    is_same: Flags


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What all that is said of errors and labels starts from; `gather` makes it, once.

    Attributes:
        truth: The labelled boxes.
        detections: In the same images.
        matches: The outcome of matching these very columns.
        outcomes: What counts of it at IoU 0.5.
        pairs: All detections and boxes that overlap by 0.1 or more, crowds too and whatever their classes, as rows
            in the columns.
        overlaps: Those of them of which both count.
    """

    truth: TruthColumns
    detections: DetectionColumns
    matches: Matches
    outcomes: Outcomes
    pairs: Pairs
    overlaps: Overlaps


def gather(truth: TruthColumns, detections: DetectionColumns, matches: Matches) -> Evidence:
    """Finds what counts and what overlaps.

    Args:
        truth: The labelled boxes.
        detections: In the same images.
        matches: The outcome of matching these very columns, at IoU 0.5 or more thresholds.

    Raises:
        ValueError: The matching was not done at IoU 0.5, or was put together from parts and no longer knows the rows.
    """
    outcomes = outcomes_at(matches)
    if (outcomes.detection_row < 0).any() or (outcomes.truth_row < 0).any():
        raise ValueError("matches that were put together do not know the rows of the columns; match them in one piece")
    pairs = overlapping_pairs(truth, detections, same_category=False, min_iou=BACKGROUND_IOU)
    detection = _places(outcomes.detection_row, len(detections.scores))[pairs.detection]
    box = _places(outcomes.truth_row, len(truth.category))[pairs.truth]
    counts = (detection >= 0) & (box >= 0)
    detection, box = detection[counts], box[counts]
    overlaps = Overlaps(
        detection=detection,
        truth=box,
        iou=pairs.iou[counts],
        is_same=outcomes.category[detection] == outcomes.truth_category[box],
    )
    return Evidence(
        truth=truth, detections=detections, matches=matches, outcomes=outcomes, pairs=pairs, overlaps=overlaps
    )


def _places(rows: Integers, num_rows: int) -> Integers:
    """Where each row of the columns stands in the outcomes; -1 where it does not count."""
    places = np.full(num_rows, -1, dtype=np.int64)
    places[rows] = np.arange(len(rows))
    return places


def best_partner(group: Integers, partner: Integers, value: Floats, num_groups: int) -> tuple[Floats, Integers]:
    """Of each group the highest value and whose it is, the first of equal ones; 0 and -1 for a group without any.

    Args:
        group: Integers [P] below `num_groups`.
        partner: Integers [P].
        value: Above 0, float64 [P].
        num_groups: N.

    Returns:
        float64 [N] and int64 [N].
    """
    best = np.zeros(num_groups)
    np.maximum.at(best, group, value)
    whose = np.full(num_groups, -1, dtype=np.int64)
    chosen = np.flatnonzero(value == best[group])[::-1]
    whose[group[chosen]] = partner[chosen]
    return best, whose


def find_errors(outcomes: Outcomes, pairs: Overlaps) -> Errors:
    """Says of each wrong detection what is wrong, and of each box whether it is missed.

    The kinds are those of Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (2020),
    asked in the order of their program, so that each detection has one: *location*, its best overlap with a box of
    its class is from 0.1 to below 0.5; *class*, it overlaps a box of another class by 0.5 or more; *duplicate*, a box
    of its class by 0.5 or more, which another one took; *background*, no box by 0.1; *both*, what is left.
    A box is missed when no detection found it and no class or location error means it.
    """
    num_detections = len(outcomes.scores)
    same, other = (
        best_partner(pairs.detection[chosen], pairs.truth[chosen], pairs.iou[chosen], num_detections)
        for chosen in (pairs.is_same, ~pairs.is_same)
    )
    (same_iou, same_box), (other_iou, other_box) = same, other
    tests = {
        _RIGHT: outcomes.is_right,
        _LOCATION: (same_iou >= BACKGROUND_IOU) & (same_iou < IOU),
        _CLASS: other_iou >= IOU,
        _DUPLICATE: same_iou >= IOU,
        _BACKGROUND: (same_iou < BACKGROUND_IOU) & (other_iou < BACKGROUND_IOU),
    }
    kind = np.select(list(tests.values()), list(tests), default=_BOTH).astype(np.int8)
    target = np.select([kind == _LOCATION, kind == _CLASS], [same_box, other_box], default=-1)
    is_missed = ~outcomes.is_found
    is_missed[target[target >= 0]] = False
    return Errors(kind=kind, target=target, is_missed=is_missed)


def error_shares(evidence: Evidence, categories: Sequence[Category], *, run: str | None = None) -> pa.Table:
    """How many errors of each kind there are and what they cost, over all classes and of each: an `errors` table.

    `ap_points` is by how much AP50 (from 0 to 1) would rise were errors of this kind alone put right: a class or
    location error becomes a right detection of the box it means (of all that mean one box the surest, and only where
    the box is not found; the others of the kind go), both, duplicates and background go, missed boxes were never
    there. *false_positive*: all wrong detections go; *false_negative*: all boxes that were not found were never there.
    A class of which no box is left by that keeps its AP. It is null for a class without boxes.

    Args:
        evidence: Of the run.
        categories: The classes by their indices.
        run: Its name in the table.
    """
    outcomes = evidence.outcomes
    errors = find_errors(outcomes, evidence.overlaps)
    num_classes = outcomes.num_categories
    base = _with_mean(_average_precision(outcomes, np.ones(len(outcomes.scores), dtype=bool)))
    fixed = {name: _fixed_detections(outcomes, errors, index) for index, name in enumerate(ERRORS)}
    fixed["missed"] = _without_boxes(outcomes, errors.is_missed)
    fixed["false_positive"] = _average_precision(outcomes, outcomes.is_right)
    fixed["false_negative"] = _without_boxes(outcomes, ~outcomes.is_found)
    counts = {
        name: _class_counts(outcomes.category[errors.kind == index], num_classes) for index, name in enumerate(ERRORS)
    }
    counts["missed"] = _class_counts(outcomes.truth_category[errors.is_missed], num_classes)
    no_counts = np.full(num_classes + 1, np.nan)
    names = outcomes.names(categories)
    columns = {
        "category": [name for name in names for _ in fixed],
        "error": list(fixed) * len(names),
        "count": np.stack([counts.get(name, no_counts) for name in fixed], axis=1)[: len(names)].ravel(),
        "ap_points": np.stack([_with_mean(values) - base for values in fixed.values()], axis=1)[: len(names)].ravel(),
    }
    return build_table("errors", categories, run, columns)


def _class_counts(category: Indices, num_classes: int) -> Floats:
    """How many there are in all and of each class, [1 + C]."""
    counts = np.bincount(category, minlength=num_classes)
    return np.append(counts.sum(), counts).astype(np.float64)


def _with_mean(values: Floats) -> Floats:
    """The mean over the classes that have boxes, then each class, [1 + C]."""
    measured = values[~np.isnan(values)]
    return np.append(measured.mean() if measured.size else np.nan, values)


def _average_precision(outcomes: Outcomes, kept: Flags) -> Floats:
    return average_precision(
        outcomes.category[kept], outcomes.scores[kept], outcomes.is_right[kept], outcomes.num_truth
    )


def _fixed_detections(outcomes: Outcomes, errors: Errors, kind: int) -> Floats:
    """AP50 of each class with the detections of one kind of error put right, or gone where they cannot be, [C]."""
    of_kind = errors.kind == kind
    # Class and location errors compete for a box even while one kind is put right: so does the authors' program.
    free = np.flatnonzero(errors.target >= 0)
    free = free[~outcomes.is_found[errors.target[free]]]
    by_score = free[np.argsort(-outcomes.scores[free], kind="stable")]
    boxes, first = np.unique(errors.target[by_score], return_index=True)
    put_right = by_score[first]
    boxes, put_right = boxes[of_kind[put_right]], put_right[of_kind[put_right]]
    category, is_right, kept = outcomes.category.copy(), outcomes.is_right.copy(), ~of_kind
    category[put_right] = outcomes.truth_category[boxes]
    is_right[put_right] = kept[put_right] = True
    return average_precision(category[kept], outcomes.scores[kept], is_right[kept], outcomes.num_truth)


def _without_boxes(outcomes: Outcomes, gone: Flags) -> Floats:
    """AP50 of each class had some boxes that were not found never been there, [C]."""
    num_truth = outcomes.num_truth
    num_left = num_truth - np.bincount(outcomes.truth_category[gone], minlength=outcomes.num_categories)
    values = average_precision(outcomes.category, outcomes.scores, outcomes.is_right, num_left)
    # Where no box is left, none was found, and the AP was 0.
    return np.where((num_truth > 0) & (num_left == 0), 0.0, values)
