"""What is taken for what, and which labels are probably wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.optimize import isotonic_regression

from raydet.measuring.diagnosis.errors import Evidence, Overlaps, best_partner
from raydet.measuring.diagnosis.scores import IOU, Outcomes, build_table
from raydet.measuring.numbers.matches import COCO_AREAS
from raydet.measuring.numbers.matching import overlapping_pairs
from raydet.tables.columns import DetectionColumns, Flags, Floats, Integers, TruthColumns
from raydet.tables.schema import Category

SURE = 0.8
"""A detection is sure when those of its class and score are right this often. Labels of which a fifth is wrong still
leave sure detections; with a higher bar they would hide each other."""
_UNLIKELY = 0.1
"""A detection that is right more seldom does not speak for a label."""


def confusion(
    evidence: Evidence, categories: Sequence[Category], *, threshold: float, run: str | None = None
) -> pa.Table:
    """How often each class is taken for which: a `confusion` table of the counts above 0.

    The detections at or above the score threshold are held against the boxes whatever their classes. By falling
    score each takes a free box that it overlaps by 0.5 or more: one of its own class if there is one, and of several
    that which it overlaps most. What lies in a crowd and found nothing is left out, and so are crowds. The counts of
    a class as truth sum to its boxes, those of a class as detected to its detections that count.

    Args:
        evidence: Of the run; its `matches` give the detections that are looked at.
        categories: The classes by their indices.
        threshold: Lowest score.
        run: Its name in the table.
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
    spurious = ~found & ~in_crowd
    shown = np.concatenate([truth_class[taken[found]], truth_class[is_left], np.full(spurious.sum(), nothing)])
    columns = np.concatenate([detected_class[found], np.full(is_left.sum(), nothing), detected_class[spurious]])
    size = nothing + 1
    table = np.bincount(shown * size + columns, minlength=size * size)
    cells = np.flatnonzero(table)
    names = [*(category.name for category in categories), None]
    return build_table(
        "confusion",
        categories,
        run,
        {
            "truth": [names[index] for index in (cells // size).tolist()],
            "detected": [names[index] for index in (cells % size).tolist()],
            "count": table[cells],
        },
    )


def _take_in_turn(chooser: Integers, item: Integers, value: Floats, num_choosers: int, num_items: int) -> Integers:
    """Each chooser in turn takes the free item of the highest value to it; all images go at once.

    Every chooser asks for its best item, an item keeps the earliest of those that ask, and the others ask for their
    next best until nobody asks anew: the stable outcome, which here is that of taking in turn.

    Args:
        chooser: Of each pair, integers [P]; the lower goes first.
        item: Of each pair, integers [P].
        value: Of each pair, float64 [P]; of equal ones the first is taken.
        num_choosers: N.
        num_items: M.

    Returns:
        The item of each chooser or -1, int64 [N].
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


@dataclass(frozen=True, kw_only=True)
class _Suspects:
    """Candidates of one kind; `doubt` is the higher the more seldom the detector errs in this way, from 0 to 1."""

    kind: str
    detection: Integers  # rows in the outcomes, -1 without
    truth: Integers  # rows in the outcomes, -1 without
    doubt: Floats
    iou: Floats


def suspects(
    evidence: Evidence, categories: Sequence[Category], *, max_rows: int = 1000, run: str | None = None
) -> pa.Table:
    """The labels that are probably wrong, the most probable first: a `suspects` table.

    A detector that is seldom wrong in a way is more likely to be right against a label. How seldom is learnt from the
    data, for detections by class and score (the higher, the more seldom), for labels by class and size:

    - *no_truth*: a detection that overlaps no label by 0.1, nor a crowd, where among those of its class and score
      that are right or overlap nothing at least 80 % are right. The box is the detection's.
    - *other_class*: a detection that overlaps a label of another class by 0.5 or more, and none of its own, where
      among those of its class and score that are right or do the same at least 80 % are right. Less probable where
      detections of the labelled class speak for the label.
    - *not_found*: a label that no detection of any class overlaps by 0.5 or more, those left out that are right in
      less than one of ten cases; the more probable the more labels of its class and size (COCO's small, medium,
      large) are found, the less the nearer a detection comes. `detected` and `score` are null, `iou` is the largest
      overlap.

    Args:
        evidence: Of the run.
        categories: The classes by their indices.
        max_rows: At most so many.
        run: Its name in the table.
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
    # A row of -1 takes the last element, which stands for nothing.
    order = np.lexsort((-np.append(outcomes.scores, 0.0)[detection], -doubt))[:max_rows]
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
    return build_table(
        "suspects",
        categories,
        run,
        {
            "image_id": outcomes.image_ids[image],
            "kind": kinds.tolist(),
            "category": names[np.where(box >= 0, labelled, detected)].tolist(),
            "detected": names[detected].tolist(),
            "bbox": boxes_xywh.tolist(),
            "score": scores,
            "iou": np.concatenate([part.iou for part in parts])[order],
        },
    )


def _share_right(outcomes: Outcomes, is_compared: Flags) -> Floats:
    """Which part of the detections compared, of each one's class and score, is right, [D].

    By isotonic regression, so that a higher score is never worth less; at each level one more wrong detection is
    imagined, so that a few right ones prove little.
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
        learnt = np.maximum.accumulate(fitted.x * sizes / (sizes + 1))
        below = np.searchsorted(levels, outcomes.scores[own], side="right") - 1
        shares[own] = np.where(below >= 0, learnt[np.maximum(below, 0)], 0.0)
    return shares


def _without_label(detections: DetectionColumns, outcomes: Outcomes, is_alone: Flags) -> _Suspects:
    """Sure detections without any label; of several of one thing only the surest."""
    share = _share_right(outcomes, outcomes.is_right | is_alone)
    chosen = np.flatnonzero(is_alone & (share >= SURE))
    chosen = chosen[np.lexsort((-outcomes.scores[chosen], -share[chosen], outcomes.image[chosen]))]
    starts = np.searchsorted(outcomes.image[chosen], np.arange(len(outcomes.image_ids) + 1))
    boxes_xywh = detections.boxes_xywh[outcomes.detection_row[chosen]]
    category = outcomes.category[chosen].astype(np.int64)
    themselves = TruthColumns(
        image_ids=outcomes.image_ids,
        starts=starts,
        boxes_xywh=boxes_xywh,
        category=category,
        area=boxes_xywh[:, 2] * boxes_xywh[:, 3],
        iscrowd=np.zeros(len(chosen), dtype=bool),
    )
    columns = DetectionColumns(starts=starts, boxes_xywh=boxes_xywh, scores=outcomes.scores[chosen], category=category)
    pairs = overlapping_pairs(themselves, columns, same_category=False, min_iou=IOU)
    is_first = np.ones(len(chosen), dtype=bool)
    is_first[pairs.detection[pairs.truth < pairs.detection]] = False
    chosen = chosen[is_first]
    nothing = np.full(len(chosen), -1, dtype=np.int64)
    return _Suspects(kind="no_truth", detection=chosen, truth=nothing, doubt=share[chosen], iou=np.zeros(len(chosen)))


def _of_other_class(outcomes: Outcomes, pairs: Overlaps) -> _Suspects:
    """Labels that a sure detection of another class lies on, each with the surest."""
    finds = pairs.iou >= IOU
    own, other = finds & pairs.is_same, finds & ~pairs.is_same
    errs = np.zeros(len(outcomes.scores), dtype=bool)
    errs[pairs.detection[other]] = True
    errs[pairs.detection[own]] = False
    share = _share_right(outcomes, outcomes.is_right | errs)
    backed, _ = best_partner(
        pairs.truth[own], pairs.detection[own], share[pairs.detection[own]], len(outcomes.truth_row)
    )
    speaks = np.flatnonzero(other & (errs & (share >= SURE))[pairs.detection])
    doubt = share[pairs.detection[speaks]] * (1 - backed[pairs.truth[speaks]])
    by_box = np.lexsort((-pairs.iou[speaks], -doubt, pairs.truth[speaks]))
    _, first = np.unique(pairs.truth[speaks][by_box], return_index=True)
    chosen = speaks[by_box[first]]
    return _Suspects(
        kind="other_class",
        detection=pairs.detection[chosen],
        truth=pairs.truth[chosen],
        doubt=doubt[by_box[first]],
        iou=pairs.iou[chosen],
    )


def _not_found(outcomes: Outcomes, pairs: Overlaps, area: Floats) -> _Suspects:
    """Labels that no detection speaks for."""
    speaks = _share_right(outcomes, np.ones(len(outcomes.scores), dtype=bool))[pairs.detection] >= _UNLIKELY
    nearest, _ = best_partner(pairs.truth[speaks], pairs.detection[speaks], pairs.iou[speaks], len(outcomes.truth_row))
    is_found = nearest >= IOU
    size = np.searchsorted([COCO_AREAS["small"][1], COCO_AREAS["medium"][1]], area, side="left")
    group = outcomes.truth_category.astype(np.int64) * 3 + size
    num_groups = outcomes.num_categories * 3
    num_found, num_labels = (np.bincount(group[chosen], minlength=num_groups) for chosen in (is_found, slice(None)))
    missed = np.flatnonzero(~is_found)
    doubt = (num_found / (num_labels + 1))[group[missed]] * (1 - nearest[missed])
    nothing = np.full(len(missed), -1, dtype=np.int64)
    return _Suspects(kind="not_found", detection=nothing, truth=missed, doubt=doubt, iou=nearest[missed])
