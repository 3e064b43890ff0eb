"""Classify the errors of detections and boxes, and measure the AP that each kind of error costs (TIDE)."""

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
"""Below this overlap, a detection is unrelated to a box."""

ERRORS = ("class", "location", "both", "duplicate", "background")
"""Kinds of errors; `Errors.kind` holds the index."""
_CLASS, _LOCATION, _BOTH, _DUPLICATE, _BACKGROUND = range(len(ERRORS))
_RIGHT = -1


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Error of each detection and each box of some `Outcomes`.

    Attributes:
        kind: Index in `ERRORS`, -1 for a correct detection, int8 [D].
        target: Row in the outcomes' truth of the box that a class or location error refers to, else -1, int64 [D].
        is_missed: True if no detection found the box and no error refers to it, bool [G].
    """

    kind: npt.NDArray[np.int8]
    target: Integers
    is_missed: Flags


@dataclass(frozen=True, kw_only=True)
class Overlaps:
    """Overlapping pairs of a detection and a box, as rows in some `Outcomes`; crowds are excluded.

    Attributes:
        detection: int64 [P].
        truth: int64 [P].
        iou: float64 [P].
        is_same: True if both have the same class, bool [P].
    """

    detection: Integers
    truth: Integers
    iou: Floats
    is_same: Flags


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Input of the error and label analyses, computed once by `gather`.

    Attributes:
        matches: Matches of exactly these columns.
        outcomes: Detections and boxes that count at IoU 0.5.
        pairs: All pairs with an overlap of at least 0.1, as rows in the columns; includes crowds and different
            classes.
        overlaps: Pairs in which both sides count.
    """

    truth: TruthColumns
    detections: DetectionColumns
    matches: Matches
    outcomes: Outcomes
    pairs: Pairs
    overlaps: Overlaps


def gather(truth: TruthColumns, detections: DetectionColumns, matches: Matches) -> Evidence:
    """Determine the detections and boxes that count and the overlapping pairs; `matches` belongs to these columns.

    Raises:
        ValueError: IoU 0.5 is not among the thresholds, or the matches were concatenated and have no column rows.
    """
    outcomes = outcomes_at(matches)
    if (outcomes.detection_row < 0).any() or (outcomes.truth_row < 0).any():
        raise ValueError("concatenated matches have no column rows; match the columns in one piece")
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
    """Return the position in the outcomes of each row of the columns, -1 for rows that do not count."""
    places = np.full(num_rows, -1, dtype=np.int64)
    places[rows] = np.arange(len(rows))
    return places


def best_partner(group: Integers, partner: Integers, value: Floats, num_groups: int) -> tuple[Floats, Integers]:
    """Return the highest value of each group and its partner (the first of equal ones); 0 and -1 for empty groups.

    Group, below `num_groups` (N), partner and value, above 0, are those of each pair, [P]. The result is float64 [N]
    and int64 [N].
    """
    best = np.zeros(num_groups)
    np.maximum.at(best, group, value)
    best_partners = np.full(num_groups, -1, dtype=np.int64)
    chosen = np.flatnonzero(value == best[group])[::-1]
    best_partners[group[chosen]] = partner[chosen]
    return best, best_partners


def find_errors(outcomes: Outcomes, pairs: Overlaps) -> Errors:
    """Classify each wrong detection and determine the missed boxes.

    The kinds are those of Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (2020). They
    are tested in the order of the authors' program, so each detection has exactly one: *location*, its best overlap
    with a box of its class is at least 0.1 and below 0.5; *class*, it overlaps a box of another class by at least 0.5;
    *duplicate*, it overlaps a box of its class by at least 0.5, but another detection found that box; *background*,
    it overlaps no box by 0.1; *both*, all others. A box is missed if no detection found it and no class or location
    error refers to it.
    """
    num_detections = len(outcomes.scores)
    (same_iou, same_box), (other_iou, other_box) = (
        best_partner(pairs.detection[chosen], pairs.truth[chosen], pairs.iou[chosen], num_detections)
        for chosen in (pairs.is_same, ~pairs.is_same)
    )
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
    """Count the errors of each kind and measure their cost, overall and by class: an `errors` table.

    `ap_points` is the increase of AP50 (0 to 1) if only the errors of this kind were fixed. A class or location error
    becomes a correct detection of its box if the box is not found; of several errors with the same box, only the one
    with the highest score does, and the others are removed. *both*, *duplicate* and *background* detections are
    removed, and so are missed boxes. *false_positive* removes all wrong detections, *false_negative* all boxes that
    were not found. A class that loses all its boxes keeps its AP. The value is null for a class without boxes.
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
    """Return the count over all classes, then by class, [1 + C]."""
    counts = np.bincount(category, minlength=num_classes)
    return np.append(counts.sum(), counts).astype(np.float64)


def _with_mean(values: Floats) -> Floats:
    """Return the mean over the classes that have boxes, then the value of each class, [1 + C]."""
    measured = values[~np.isnan(values)]
    return np.append(measured.mean() if measured.size else np.nan, values)


def _average_precision(outcomes: Outcomes, kept: Flags) -> Floats:
    judged = outcomes.category[kept], outcomes.scores[kept], outcomes.is_right[kept]
    return average_precision(*judged, outcomes.num_truth)


def _fixed_detections(outcomes: Outcomes, errors: Errors, kind: int) -> Floats:
    """Return AP50 of each class with the errors of one kind fixed, or removed if they cannot be fixed, [C]."""
    of_kind = errors.kind == kind
    # As in the authors' program, class and location errors compete for a box even if only one kind is fixed.
    free = np.flatnonzero(errors.target >= 0)
    free = free[~outcomes.is_found[errors.target[free]]]
    by_score = free[np.argsort(-outcomes.scores[free], kind="stable")]
    boxes, first = np.unique(errors.target[by_score], return_index=True)
    corrected = by_score[first]
    boxes, corrected = boxes[of_kind[corrected]], corrected[of_kind[corrected]]
    category, is_right, kept = outcomes.category.copy(), outcomes.is_right.copy(), ~of_kind
    category[corrected] = outcomes.truth_category[boxes]
    is_right[corrected] = kept[corrected] = True
    return average_precision(category[kept], outcomes.scores[kept], is_right[kept], outcomes.num_truth)


def _without_boxes(outcomes: Outcomes, removed: Flags) -> Floats:
    """Return AP50 of each class without the given boxes, none of which was found, [C]."""
    num_truth = outcomes.num_truth
    num_left = num_truth - np.bincount(outcomes.truth_category[removed], minlength=outcomes.num_categories)
    values = average_precision(outcomes.category, outcomes.scores, outcomes.is_right, num_left)
    # A class that loses all its boxes had an AP of 0, because none of them was found.
    return np.where((num_truth > 0) & (num_left == 0), 0.0, values)
