"""Match detections with labelled boxes by COCO's greedy rule, vectorised over many images."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from raydet.common.boxes import Boxes
from raydet.common.threads import available_cpus
from raydet.measuring.numbers.matches import COCO, BitSets, Matches, Protocol, bits_type, concatenate
from raydet.tables.columns import (
    DetectionColumns,
    Flags,
    Floats,
    Integers,
    TruthColumns,
    in_unlabelled_class,
    take_detections,
    take_truth,
)

Matcher = Callable[[TruthColumns, DetectionColumns, slice], Matches]
"""Function that matches the columns of a range of images; the range is its third argument."""

_IMAGES_PER_PART = 20_000
_BOXES_PER_PART = 400_000
_PAIRS_AT_ONCE = 1_000_000
_MAX_THRESHOLD = 1 - 1e-10
"""pycocotools caps thresholds here, so that a threshold of 1 can be met in spite of rounding."""


class Pairs(NamedTuple):
    """Overlapping detections and labelled boxes, by ascending detection, then truth.

    Attributes:
        detection: Row in the `DetectionColumns`, int64 [P].
        truth: Row in the `TruthColumns`, int64 [P].
        iou: float64 [P]; for a crowd, the share of the detection that lies in it.
    """

    detection: Integers
    truth: Integers
    iou: Floats


class _Boxes(NamedTuple):
    """Boxes of one side, sorted by group: an image or, unless classes count as one, a class of an image."""

    row: Integers  # in the input columns
    image: Integers  # rank of the image id
    category: Integers
    group: Integers
    boxes_xywh: Boxes


def match(
    truth: TruthColumns,
    detections: DetectionColumns,
    num_categories: int,
    protocol: Protocol = COCO,
    *,
    pairs_at_once: int = _PAIRS_AT_ONCE,
) -> Matches:
    """Match every detection with at most one labelled box, exactly as pycocotools' `COCOeval.evaluateImg` does.

    In each image and class, in descending score order, each detection takes the free box that counts and that it
    overlaps most, if the overlap reaches the threshold (of equal overlaps, the last box). Otherwise it takes a box that
    does not count by the same rule (any number of detections may share a crowd) and does not count either. A detection
    without a match does not count if it belongs to another size class, or if its image is not labelled for its class
    (LVIS's rule for classes of which not all objects are labelled).

    If classes count as one, they are matched together. Ties between scores and between overlaps are then ordered by
    category index before row, as pycocotools orders them by category id. `pairs_at_once` bounds the memory: the overlap
    of so many pairs is computed together.
    """
    num_classes = 1 if protocol.class_agnostic else num_categories
    order = np.argsort(truth.image_ids)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    image, found_image = (np.repeat(place, np.diff(side.starts)) for side in (truth, detections))
    rules = num_classes, protocol.class_agnostic
    labelled = _by_group(image, truth.category, truth.boxes_xywh, None, *rules)
    found = _by_group(found_image, detections.category, detections.boxes_xywh, detections.scores, *rules)
    rank = _rank(found.group)
    kept = rank < protocol.max_detections[-1]
    if not kept.all():
        rank, found = rank[kept], _Boxes._make(column[kept] for column in found)

    iscrowd, area = truth.iscrowd[labelled.row], truth.area[labelled.row]
    found_area = found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3]
    bounds = np.array([bound for _, bound in protocol.areas])
    truth_ignored = iscrowd | (area < bounds[:, :1]) | (area > bounds[:, 1:])
    thresholds = np.minimum(protocol.iou_thresholds, _MAX_THRESHOLD)
    pairs = _overlapping(found, labelled, iscrowd, float(thresholds[0]), pairs_at_once)
    true_positive, ignored, truth_found = _assign(pairs, found.group, thresholds, truth_ignored, iscrowd)
    other_size = (found_area < bounds[:, :1]) | (found_area > bounds[:, 1:])
    everything = true_positive.dtype.type(2 ** len(thresholds) - 1)
    ignored |= other_size * everything & ~true_positive
    unlabelled = in_unlabelled_class(truth, detections, found.row)
    if unlabelled is not None:
        ignored |= unlabelled * everything & ~true_positive
    return Matches(
        protocol=protocol,
        num_categories=num_classes,
        image_ids=truth.image_ids[order],
        detection_image=found.image.astype(np.int32),
        detection_category=found.category.astype(np.int32),
        detection_row=found.row,
        scores=detections.scores[found.row],
        rank=rank.astype(np.int32),
        true_positive=true_positive,
        ignored=ignored,
        truth_image=labelled.image.astype(np.int32),
        truth_category=labelled.category.astype(np.int32),
        truth_row=labelled.row,
        truth_ignored=truth_ignored,
        truth_found=truth_found,
    )


def match_in_parts(
    truth: TruthColumns, detections: DetectionColumns, matcher: Matcher, *, num_parts: int | None = None
) -> Matches:
    """Match ranges of images in parallel threads, which bounds memory; the result equals matching in one piece.

    The images are in ascending id order. There are by default as few ranges as keep each one small.
    """
    num_images = len(truth.image_ids)
    # Cumulative number of rows, so that parts have similar amounts of work.
    work = truth.starts + detections.starts + np.arange(num_images + 1)
    if num_parts is None:
        num_parts = max(-(-num_images // _IMAGES_PER_PART), -(-int(work[-1]) // _BOXES_PER_PART))
    cuts = np.searchsorted(work, np.linspace(0, work[-1], min(num_parts, num_images) + 1)[1:-1])
    bounds = np.unique([0, *cuts.tolist(), num_images]).tolist()

    def match_part(first: int, last: int) -> Matches:
        images = np.arange(first, last)
        part = matcher(take_truth(truth, images), take_detections(detections, images), slice(first, last))
        return replace(
            part,
            detection_row=part.detection_row + detections.starts[first],
            truth_row=part.truth_row + truth.starts[first],
        )

    if len(bounds) <= 2:
        return match_part(0, num_images)
    with ThreadPoolExecutor(available_cpus()) as pool:
        parts = list(pool.map(match_part, bounds[:-1], bounds[1:]))
    # Parts are ranges of ascending ids, so concatenation preserves the order of rows.
    return replace(
        concatenate(parts),
        detection_row=np.concatenate([part.detection_row for part in parts]),
        truth_row=np.concatenate([part.truth_row for part in parts]),
    )


def overlapping_pairs(
    truth: TruthColumns, detections: DetectionColumns, *, same_category: bool, min_iou: float
) -> Pairs:
    """Return all pairs of a detection and a labelled box, of the same class if requested, with pycocotools' IoU.

    Boxes that merely touch are always excluded.
    """
    labels, guesses = truth.category, detections.category
    if not same_category:
        labels, guesses = np.zeros_like(labels), np.zeros_like(guesses)
    num_classes = 1 + max(int(labels.max(initial=0)), int(guesses.max(initial=0)))
    place = np.arange(len(truth.image_ids))
    image = np.repeat(place, np.diff(truth.starts))
    labelled = _by_group(image, labels, truth.boxes_xywh, None, num_classes, class_agnostic=False)
    image = np.repeat(place, np.diff(detections.starts))
    found = _Boxes(np.arange(len(image)), image, guesses, image * num_classes + guesses, detections.boxes_xywh)
    least = max(min_iou, float(np.nextafter(0, 1)))
    pairs = _overlapping(found, labelled, truth.iscrowd[labelled.row], least)
    return pairs._replace(truth=labelled.row[pairs.truth])


def _by_group(
    image: Integers,
    category: Integers,
    boxes_xywh: Boxes,
    scores: Floats | None,
    num_classes: int,
    class_agnostic: bool,
) -> _Boxes:
    """Sort by image, class and descending score, keeping the input order of ties."""
    rows = np.arange(len(image))
    if class_agnostic:
        group, label = image, np.zeros_like(category)
        rows = stable_order(category)
    else:
        group, label = image * num_classes + category, category
    if scores is not None:
        # Scores usually descend within each image already, and the group sort below preserves that order.
        rises = (scores[1:] > scores[:-1]) & (image[1:] == image[:-1])
        if class_agnostic or rises.any():
            rows = rows[stable_order(descending_rank(scores[rows]))]
    rows = rows[stable_order(group[rows])]
    return _Boxes(rows, image[rows], label[rows], group[rows], boxes_xywh[rows])


def stable_order(keys: Integers) -> Integers:
    """Return `np.argsort(keys, kind="stable")` for non-negative keys."""
    shift = len(keys).bit_length()
    if int(keys.max(initial=0)).bit_length() + shift > 62:
        return np.argsort(keys, kind="stable")
    # numpy sorts integers many times faster than it argsorts them, so pack each position into its key.
    carrying: Integers = (keys << shift) | np.arange(len(keys))
    carrying.sort()
    carrying &= (1 << shift) - 1
    return carrying


def descending_rank(scores: Floats) -> Integers:
    """Return the rank of each score, 0 for the highest; equal scores share a rank, [D] → [D]."""
    order = np.argsort(-scores)
    falls = np.diff(scores[order], prepend=scores[order[:1]]) != 0
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[order] = np.cumsum(falls)
    return ranks


def _rank(group: Integers) -> Integers:
    """Return the position of each element in its group, from 0; groups must be contiguous."""
    positions = np.arange(len(group))
    is_first = np.append(True, group[1:] != group[:-1])[: len(group)]
    return positions - np.maximum.accumulate(np.where(is_first, positions, 0))


def _overlapping(
    found: _Boxes, labelled: _Boxes, iscrowd: Flags, min_iou: float, pairs_at_once: int = _PAIRS_AT_ONCE
) -> Pairs:
    """Return the pairs of the same group that overlap by at least `min_iou`, as positions in the two sides."""
    start = np.searchsorted(labelled.group, found.group, side="left")
    count = np.searchsorted(labelled.group, found.group, side="right") - start
    has_company = np.flatnonzero(count)
    start, count = start[has_company], count[has_company]
    ends = np.cumsum(count)
    first_sides, second_sides = _sides(found.boxes_xywh[has_company]), _sides(labelled.boxes_xywh)
    parts: list[Pairs] = []
    begin = 0
    while begin < len(count):
        done = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + pairs_at_once, side="right")))
        own = np.repeat(np.arange(begin, end), count[begin:end])
        offsets = start[begin:end] - (ends[begin:end] - count[begin:end] - done)
        other = np.arange(len(own)) + np.repeat(offsets, count[begin:end])
        iou = _iou(first_sides, own, second_sides, other, iscrowd)
        kept = np.flatnonzero(iou >= min_iou)
        parts.append(Pairs(has_company[own[kept]], other[kept], iou[kept]))
        begin = end
    if not parts:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return Pairs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _sides(boxes_xywh: Boxes) -> tuple[Floats, ...]:
    """Return left, top, right, bottom and area, each [N]."""
    left, top, width, height = np.ascontiguousarray(boxes_xywh.T)
    return left, top, left + width, top + height, width * height


def _iou(
    first: tuple[Floats, ...], own: Integers, second: tuple[Floats, ...], other: Integers, iscrowd: Flags
) -> Floats:
    """Return the IoU with pycocotools' `bbIou` order of operations, so that results are bit-identical."""
    width = np.minimum(first[2][own], second[2][other]) - np.maximum(first[0][own], second[0][other])
    height = np.minimum(first[3][own], second[3][other]) - np.maximum(first[1][own], second[1][other])
    shared = np.where((width > 0) & (height > 0), width * height, 0.0)
    area = first[4][own]
    union = area + second[4][other] - shared
    if iscrowd.any():
        union = np.where(iscrowd[other], area, union)
    # Boxes without area overlap nothing, including each other.
    iou: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
    return iou


def _assign(
    pairs: Pairs, group: Integers, thresholds: Floats, truth_ignored: Flags, iscrowd: Flags
) -> tuple[BitSets, BitSets, BitSets]:
    """Assign boxes to detections for all thresholds (as bits) and size classes simultaneously.

    Each round processes the next detection of every group in descending score order, so no two detections of a round
    compete for a box. Within a round, each tries its candidates in descending overlap order, those that count first.

    Pairs are positions of detections and labelled boxes, and their overlap of at least the lowest threshold; `group` is
    [D], `thresholds`, ascending, [T], `truth_ignored` [A, G] and `iscrowd` [G].

    Returns:
        Thresholds at which each detection is correct [A, D], does not count [A, D], and each box is found [G].
    """
    bits = bits_type(len(thresholds))
    everything = bits(2 ** len(thresholds) - 1)
    detection, truth, iou = pairs
    # Order each detection's candidates by descending overlap; of equal overlaps, the last box comes first.
    order = np.lexsort((-truth, -iou, detection))
    choice = _rank(detection)
    is_first = choice == 0
    turn = _rank(group[detection[is_first]])[np.cumsum(is_first) - 1]
    step = turn * (int(choice.max(initial=0)) + 1) + choice
    by_step = stable_order(step)
    order, step, turn = order[by_step], step[by_step], turn[by_step]
    detection, truth, iou = detection[order], truth[order], iou[order]

    reached = np.array([2**count - 1 for count in range(len(thresholds) + 1)], dtype=bits)
    candidates = reached[np.searchsorted(thresholds, iou, side="right")][:, None]
    counting = np.where(truth_ignored.T, bits(0), everything)[truth]
    always_free = np.where(iscrowd, everything, bits(0))[truth][:, None]
    free = np.full((len(iscrowd), len(truth_ignored)), everything)
    wanting = np.full((len(group), len(truth_ignored)), everything)
    right, ignored = np.zeros_like(wanting), np.zeros_like(wanting)
    passes = ((right, candidates & counting), (ignored, candidates & ~counting))
    starts = np.flatnonzero(np.append(True, step[1:] != step[:-1])[: len(step)])
    ends = np.append(starts[1:], len(step))
    for of_turn in np.split(np.arange(len(starts)), np.flatnonzero(np.diff(turn[starts])) + 1):
        for outcome, allowed in passes:
            for number in of_turn.tolist():
                chosen = slice(starts[number], ends[number])
                own, other = detection[chosen], truth[chosen]
                still_free, wanted = free[other], wanting[own]
                taken = wanted & allowed[chosen] & (still_free | always_free[chosen])
                free[other] = still_free & ~taken
                wanting[own] = wanted ^ taken
                outcome[own] |= taken
    found = free[:, 0] ^ everything
    return np.ascontiguousarray(right.T), np.ascontiguousarray(ignored.T), found
