"""Class confusions, and labels that the detector contradicts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.optimize import isotonic_regression

from raydet.measuring.diagnosis.errors import Evidence, Overlaps, best_partner
from raydet.measuring.diagnosis.scores import IOU, Outcomes, average_precision, build_table, threshold_index
from raydet.measuring.numbers.matches import COCO_AREAS, bits_at
from raydet.measuring.numbers.matching import overlapping_pairs
from raydet.tables.columns import DetectionColumns, Flags, Floats, Integers, TruthColumns
from raydet.tables.schema import Category

CONFIDENT_SHARE = 0.8
"""Minimum share of correct detections among those of the same class and score for a detection to be confident. With a
fifth of the labels wrong, some detections still reach it; with a higher bar, the wrong labels would hide each other."""
MIN_AP50 = 0.5
"""Minimum AP50 of a class for which labels are doubted. Below it most disagreements are the detector's errors."""
_MIN_SUPPORT_SHARE = 0.1
"""Detections that are correct less often than this do not support a label."""


def confusion(
    evidence: Evidence, categories: Sequence[Category], *, threshold: float, run: str | None = None
) -> pa.Table:
    """Count how often each class is detected as another: a `confusion` table of the counts above 0.

    Detections at or above the score threshold are matched with the boxes of all classes. In descending score order,
    each takes a free box that it overlaps by at least 0.5: preferably of its own class, then the one with the largest
    overlap. Crowds, and unmatched detections that do not count, are left out. The counts of a true class sum to its
    boxes; those of a detected class sum to its detections that count.
    """
    truth, detections, matches = evidence.truth, evidence.detections, evidence.matches
    kept = np.flatnonzero(matches.scores >= threshold)
    kept = kept[np.argsort(-matches.scores[kept], kind="stable")]
    place = np.full(len(detections.scores), -1, dtype=np.int64)
    place[matches.detection_row[kept]] = np.arange(len(kept))
    box_place = np.full(len(truth.category), -1, dtype=np.int64)
    box_place[matches.truth_row] = np.arange(len(matches.truth_row))
    pairs, finds = evidence.pairs, evidence.pairs.iou >= IOU
    detection, box = place[pairs.detection[finds]], box_place[pairs.truth[finds]]
    in_crowd = np.zeros(len(kept), dtype=bool)
    is_crowd = matches.truth_ignored[0]
    in_crowd[detection[(detection >= 0) & is_crowd[box]]] = True
    chosen = (detection >= 0) & ~is_crowd[box]
    detection, box, iou = detection[chosen], box[chosen], pairs.iou[finds][chosen]
    detected_class, truth_class = detections.category[matches.detection_row[kept]], truth.category[matches.truth_row]
    is_same = detected_class[detection] == truth_class[box]
    taken = _take_in_turn(detection, box, np.where(is_same, 1 + iou, iou), len(kept), len(truth_class))

    nothing = len(categories)
    found = taken >= 0
    is_left = ~is_crowd
    is_left[taken[found]] = False
    index = threshold_index(matches.protocol, IOU)
    assert index is not None, "outcomes at this threshold were gathered from these matches"
    spurious = ~found & ~in_crowd & ~bits_at(matches.ignored[0], index)[kept]
    shown = np.concatenate([truth_class[taken[found]], truth_class[is_left], np.full(spurious.sum(), nothing)])
    columns = np.concatenate([detected_class[found], np.full(is_left.sum(), nothing), detected_class[spurious]])
    size = nothing + 1
    table = np.bincount(shown * size + columns, minlength=size * size)
    cells = np.flatnonzero(table)
    names = [*(category.name for category in categories), None]
    sides = {"truth": cells // size, "detected": cells % size}
    named = {side: [names[index] for index in indices.tolist()] for side, indices in sides.items()}
    return build_table("confusion", categories, run, {**named, "count": table[cells]})


def _take_in_turn(chooser: Integers, item: Integers, value: Floats, num_choosers: int, num_items: int) -> Integers:
    """Let each chooser in turn take the free item with the highest value to it, for all images simultaneously.

    Each chooser requests its best item, an item keeps the earliest chooser that requests it, and the others request
    their next best item until nothing changes. This stable matching equals the result of choosing in turn.

    Chooser, item and value are those of each pair, [P]. Lower choosers choose first; of equal values, the first pair is
    preferred.

    Returns:
        Item of each chooser or -1, int64 [num_choosers].
    """
    order = np.lexsort((-value, chooser))
    item = item[order]
    place, end = (np.searchsorted(chooser[order], np.arange(num_choosers), side=side) for side in ("left", "right"))
    owner = np.full(num_items, num_choosers)
    asking = np.flatnonzero(place < end)
    while asking.size:
        np.minimum.at(owner, item[place[asking]], asking)
        waiting = np.flatnonzero(place < end)
        refused = waiting[owner[item[place[waiting]]] != waiting]
        place[refused] += 1
        asking = refused[place[refused] < end[refused]]
    taken = np.full(num_choosers, -1, dtype=np.int64)
    has_one = np.flatnonzero(place < end)
    taken[has_one] = item[place[has_one]]
    return taken


class _Suspects(NamedTuple):
    """Suspects of one kind; `doubt` in [0, 1] is higher if the detector makes this kind of error less often."""

    kind: str
    detection: Integers  # rows in the outcomes, -1 for none
    truth: Integers  # rows in the outcomes, -1 for none
    doubt: Floats
    iou: Floats


def suspects(
    evidence: Evidence, categories: Sequence[Category], *, max_rows: int = 1000, run: str | None = None
) -> pa.Table:
    """List the labels that the detector contradicts, the most doubtful first: a `suspects` table.

    If the detector rarely makes a kind of error, its disagreement with a label is more likely the label's fault. Error
    rates are estimated from the data: for detections by class and score (decreasing with the score), for labels by
    class and size.

    - *no_truth*: a detection that overlaps no label by 0.1 and no crowd. Among the detections of its class and score
      that are correct or overlap nothing, at least 80 % are correct. The box is the detection's.
    - *other_class*: a detection that overlaps a label of another class by at least 0.5, and none of its own class.
      Among the detections of its class and score that are correct or do the same, at least 80 % are correct. Detections
      of the labelled class that overlap the label reduce the probability.
    - *not_found*: a label that no detection of any class overlaps by at least 0.5, ignoring detections that are correct
      less than one time in ten. The probability rises with the share of labels of its class and size (COCO's small,
      medium, large) that are found, and falls with the largest overlap. `detected` and `score` are null, `iou` is the
      largest overlap.

    Left out are suspects of classes whose AP50 is below `MIN_AP50`; the class is that of the label for *not_found*, and
    that of the detection for the others.
    """
    truth, detections, outcomes = evidence.truth, evidence.detections, evidence.outcomes
    touches = np.zeros(len(detections.scores), dtype=bool)
    touches[evidence.pairs.detection] = True
    is_alone = ~touches[outcomes.detection_row]
    parts = [
        _without_label(detections, outcomes, is_alone),
        _of_other_class(outcomes, evidence.overlaps),
        _not_found(outcomes, evidence.overlaps, truth.area[outcomes.truth_row]),
    ]
    doubt = np.concatenate([part.doubt for part in parts])
    detection, box = (np.concatenate([getattr(part, name) for part in parts]) for name in ("detection", "truth"))
    ap50 = average_precision(outcomes.category, outcomes.scores, outcomes.is_right, outcomes.num_truth)
    # A row of -1 selects the last element, which represents "none".
    of_detection, of_box = np.append(outcomes.category, 0)[detection], np.append(outcomes.truth_category, 0)[box]
    accuser = np.where(detection >= 0, of_detection, of_box)
    order = np.lexsort((-np.append(outcomes.scores, 0.0)[detection], -doubt))
    order = order[ap50[accuser[order]] >= MIN_AP50][:max_rows]
    detection, box = detection[order], box[order]
    kinds = np.repeat([part.kind for part in parts], [len(part.doubt) for part in parts])[order]
    names = np.array([*(category.name for category in categories), None], dtype=object)
    scores = np.append(outcomes.scores, np.nan)[detection]
    detected = np.append(detections.category[outcomes.detection_row], -1)[detection]
    labelled = np.append(truth.category[outcomes.truth_row], -1)[box]
    image = np.where(box >= 0, np.append(outcomes.truth_image, -1)[box], np.append(outcomes.image, -1)[detection])
    boxes_xywh = np.zeros((len(order), 4))
    boxes_xywh[box < 0] = detections.boxes_xywh[outcomes.detection_row[detection[box < 0]]]
    boxes_xywh[box >= 0] = truth.boxes_xywh[outcomes.truth_row[box[box >= 0]]]
    columns = {
        "image_id": outcomes.image_ids[image],
        "kind": kinds.tolist(),
        "category": names[np.where(box >= 0, labelled, detected)].tolist(),
        "detected": names[detected].tolist(),
        "bbox": boxes_xywh.tolist(),
        "score": scores,
        "iou": np.concatenate([part.iou for part in parts])[order],
    }
    return build_table("suspects", categories, run, columns)


def _share_right(outcomes: Outcomes, is_compared: Flags) -> Floats:
    """Return, for each detection, the share of correct ones among its peers in class and score, [D].

    Isotonic regression makes the share non-decreasing in the score. One additional wrong detection is assumed at each
    level, so that a few correct ones are weak evidence.
    """
    shares = np.zeros(len(outcomes.scores))
    order = np.argsort(outcomes.category, kind="stable")
    starts = np.searchsorted(outcomes.category[order], np.arange(outcomes.num_categories + 1))
    for index in range(outcomes.num_categories):
        own = order[starts[index] : starts[index + 1]]
        compared = own[is_compared[own]]
        if not compared.size:
            continue
        levels, place, counts = np.unique(outcomes.scores[compared], return_inverse=True, return_counts=True)
        share = np.bincount(place, weights=outcomes.is_right[compared]) / counts
        fitted = isotonic_regression(share, weights=counts.astype(np.float64))
        sizes = np.repeat(np.add.reduceat(counts, fitted.blocks[:-1]), np.diff(fitted.blocks))
        smoothed = np.maximum.accumulate(fitted.x * sizes / (sizes + 1))
        below = np.searchsorted(levels, outcomes.scores[own], side="right") - 1
        shares[own] = np.where(below >= 0, smoothed[np.maximum(below, 0)], 0.0)
    return shares


def _without_label(detections: DetectionColumns, outcomes: Outcomes, is_alone: Flags) -> _Suspects:
    """Return confident detections without a label; of several that overlap, only the most confident."""
    share = _share_right(outcomes, outcomes.is_right | is_alone)
    chosen = np.flatnonzero(is_alone & (share >= CONFIDENT_SHARE))
    chosen = chosen[np.lexsort((-outcomes.scores[chosen], -share[chosen], outcomes.image[chosen]))]
    starts = np.searchsorted(outcomes.image[chosen], np.arange(len(outcomes.image_ids) + 1))
    boxes_xywh = detections.boxes_xywh[outcomes.detection_row[chosen]]
    category = outcomes.category[chosen].astype(np.int64)
    as_truth = TruthColumns(
        image_ids=outcomes.image_ids,
        starts=starts,
        boxes_xywh=boxes_xywh,
        category=category,
        area=boxes_xywh[:, 2] * boxes_xywh[:, 3],
        iscrowd=np.zeros(len(chosen), dtype=bool),
    )
    columns = DetectionColumns(starts=starts, boxes_xywh=boxes_xywh, scores=outcomes.scores[chosen], category=category)
    pairs = overlapping_pairs(as_truth, columns, same_category=False, min_iou=IOU)
    is_first = np.ones(len(chosen), dtype=bool)
    is_first[pairs.detection[pairs.truth < pairs.detection]] = False
    chosen = chosen[is_first]
    return _Suspects("no_truth", chosen, np.full(len(chosen), -1), share[chosen], np.zeros(len(chosen)))


def _of_other_class(outcomes: Outcomes, pairs: Overlaps) -> _Suspects:
    """Return labels that a confident detection of another class overlaps, each with the most confident one."""
    finds = pairs.iou >= IOU
    own, other = finds & pairs.is_same, finds & ~pairs.is_same
    is_confused = np.zeros(len(outcomes.scores), dtype=bool)
    is_confused[pairs.detection[other]] = True
    is_confused[pairs.detection[own]] = False
    share = _share_right(outcomes, outcomes.is_right | is_confused)
    truth, detection = pairs.truth[own], pairs.detection[own]
    support, _ = best_partner(truth, detection, share[detection], len(outcomes.truth_row))
    contradicts = np.flatnonzero(other & (is_confused & (share >= CONFIDENT_SHARE))[pairs.detection])
    doubt = share[pairs.detection[contradicts]] * (1 - support[pairs.truth[contradicts]])
    by_box = np.lexsort((-pairs.iou[contradicts], -doubt, pairs.truth[contradicts]))
    _, first = np.unique(pairs.truth[contradicts][by_box], return_index=True)
    chosen = contradicts[by_box[first]]
    doubt = doubt[by_box[first]]
    return _Suspects("other_class", pairs.detection[chosen], pairs.truth[chosen], doubt, pairs.iou[chosen])


def _not_found(outcomes: Outcomes, pairs: Overlaps, area: Floats) -> _Suspects:
    """Return labels that no detection supports."""
    usable = _share_right(outcomes, np.ones(len(outcomes.scores), dtype=bool))[pairs.detection] >= _MIN_SUPPORT_SHARE
    nearest, _ = best_partner(pairs.truth[usable], pairs.detection[usable], pairs.iou[usable], len(outcomes.truth_row))
    is_found = nearest >= IOU
    size = np.searchsorted([COCO_AREAS["small"][1], COCO_AREAS["medium"][1]], area, side="left")
    group = outcomes.truth_category.astype(np.int64) * 3 + size
    num_groups = outcomes.num_categories * 3
    num_found, num_labels = (np.bincount(group[chosen], minlength=num_groups) for chosen in (is_found, slice(None)))
    missed = np.flatnonzero(~is_found)
    doubt = (num_found / (num_labels + 1))[group[missed]] * (1 - nearest[missed])
    return _Suspects("not_found", np.full(len(missed), -1), missed, doubt, nearest[missed])
