"""Which detection found which labelled box, by COCO's greedy rule, for whole columns of images at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np

from raydet.common.boxes import Boxes
from raydet.common.threads import available_cpus
from raydet.measuring.numbers.matches import COCO, BitSets, Matches, Protocol, bits_type, concatenate
from raydet.tables.columns import DetectionColumns, Flags, Floats, Integers, TruthColumns, take_detections, take_truth

Matcher = Callable[[TruthColumns, DetectionColumns, slice], Matches]
"""Matches the columns of a range of images, given with the range."""

_IMAGES_PER_PART = 20_000
_BOXES_PER_PART = 400_000
_PAIRS_AT_ONCE = 1_000_000
_SURE_IOU = 1 - 1e-10
"""pycocotools asks for no more than this, so that a threshold of 1 can be met in spite of rounding."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Detections and labelled boxes that overlap, by rising detection, then truth.

    Attributes:
        detection: Row in the `DetectionColumns` given, int64 [P].
        truth: Row in the `TruthColumns` given, int64 [P].
        iou: float64 [P]; where the labelled box is a crowd, the part of the detection that lies in it.
    """

    detection: Integers
    truth: Integers
    iou: Floats


@dataclass(frozen=True)
class _Boxes:
    """Boxes of one kind, by group, which is an image and, unless classes count as one, a class of it."""

    row: Integers  # in the columns given
    image: Integers  # by rising id
    category: Integers
    group: Integers
    boxes_xywh: Boxes


def match(truth: TruthColumns, detections: DetectionColumns, num_categories: int, protocol: Protocol = COCO) -> Matches:
    """Matches every detection with at most one labelled box, exactly as pycocotools' `COCOeval.evaluateImg` does.

    In each image and class the detections, by falling score, take the free box that counts and that they overlap
    most, if that reaches the threshold (of equal overlaps the box given last); where there is none, they take such a
    box that does not count (a crowd as often as they like) and do not count either. A detection that found nothing
    and is of another size does not count.

    Classes that count as one are matched together; of equal scores, as of equal overlaps, the order of the category
    indices then decides before that of the rows, as in pycocotools that of the category ids.

    Args:
        truth: The labelled boxes of all images.
        detections: The detections in the same images.
        num_categories: Classes; all indices are below it.
        protocol: By which rules.
    """
    num_classes = 1 if protocol.class_agnostic else num_categories
    order = np.argsort(truth.image_ids)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    labelled = _by_group(place, truth.starts, truth.category, truth.boxes_xywh, None, num_classes, protocol)
    found = _by_group(
        place, detections.starts, detections.category, detections.boxes_xywh, detections.scores, num_classes, protocol
    )
    rank = _rank(found.group)
    kept = rank < protocol.max_detections[-1]
    if not kept.all():
        rank = rank[kept]
        found = _Boxes(*(getattr(found, field.name)[kept] for field in fields(_Boxes)))

    iscrowd, area = truth.iscrowd[labelled.row], truth.area[labelled.row]
    found_area = found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3]
    bounds = np.array([bound for _, bound in protocol.areas])
    truth_ignored = iscrowd | (area < bounds[:, :1]) | (area > bounds[:, 1:])
    thresholds = np.minimum(protocol.iou_thresholds, _SURE_IOU)
    bits = bits_type(len(thresholds))
    everything = bits(2 ** len(thresholds) - 1)
    pairs = _overlapping(found, labelled, iscrowd, float(thresholds[0]))
    true_positive, ignored, truth_found = _assign(pairs, found.group, thresholds, truth_ignored, iscrowd)
    other_size = (found_area < bounds[:, :1]) | (found_area > bounds[:, 1:])
    ignored |= np.where(other_size, everything, bits(0)) & ~true_positive
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
    """Matches ranges of images side by side in threads, which bounds the memory; the outcome is that of one piece.

    Args:
        truth: The labelled boxes; images by rising id.
        detections: In the same images.
        matcher: Matches a range of them.
        num_parts: How many ranges; by default as few as keep each small.
    """
    num_images = len(truth.image_ids)
    # Rows up to each image, so that parts have about equally much in them.
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

    if len(bounds) == 2:
        return match_part(0, num_images)
    with ThreadPoolExecutor(available_cpus()) as pool:
        parts = list(pool.map(match_part, bounds[:-1], bounds[1:]))
    # Parts are ranges of rising ids, so what stands behind each other stays so.
    return replace(
        concatenate(parts),
        detection_row=np.concatenate([part.detection_row for part in parts]),
        truth_row=np.concatenate([part.truth_row for part in parts]),
    )


def overlapping_pairs(
    truth: TruthColumns, detections: DetectionColumns, *, same_category: bool, min_iou: float
) -> Pairs:
    """All detections and labelled boxes of one image that overlap, as pycocotools computes it.

    Args:
        truth: The labelled boxes of all images.
        detections: The detections in the same images.
        same_category: Only those of one class.
        min_iou: Lowest overlap; what merely touches is left out in any case.
    """
    labels, guesses = truth.category, detections.category
    if not same_category:
        labels, guesses = np.zeros_like(labels), np.zeros_like(guesses)
    num_classes = 1 + max(int(labels.max(initial=0)), int(guesses.max(initial=0)))
    place = np.arange(len(truth.image_ids))
    labelled = _by_group(place, truth.starts, labels, truth.boxes_xywh, None, num_classes, COCO)
    image = np.repeat(place, np.diff(detections.starts))
    found = _Boxes(np.arange(len(image)), image, guesses, image * num_classes + guesses, detections.boxes_xywh)
    least = max(min_iou, float(np.nextafter(0, 1)))
    detection, column, iou = _overlapping(found, labelled, truth.iscrowd[labelled.row], least)
    return Pairs(detection=detection, truth=labelled.row[column], iou=iou)


def _by_group(
    place: Integers,
    starts: Integers,
    category: Integers,
    boxes_xywh: Boxes,
    scores: Floats | None,
    num_classes: int,
    protocol: Protocol,
) -> _Boxes:
    """Sorts by image, class and falling score; what is equal stays in the order given."""
    image = np.repeat(place, np.diff(starts))
    rows = np.arange(len(image))
    if protocol.class_agnostic:
        group, label = image, np.zeros_like(category)
        rows = stable_order(category)
    else:
        group, label = image * num_classes + category, category
    if scores is not None:
        # Detections mostly come by falling score in each image, which what is sorted next leaves as it is.
        rises = (scores[1:] > scores[:-1]) & (image[1:] == image[:-1])
        if protocol.class_agnostic or rises.any():
            rows = rows[stable_order(falling_rank(scores[rows]))]
    rows = rows[stable_order(group[rows])]
    return _Boxes(rows, image[rows], label[rows], group[rows], boxes_xywh[rows])


def stable_order(keys: Integers) -> Integers:
    """As `np.argsort(keys, kind="stable")`; keys are not negative."""
    shift = len(keys).bit_length()
    if int(keys.max(initial=0)).bit_length() + shift > 62:
        return np.argsort(keys, kind="stable")
    # numpy sorts whole numbers many times faster than it finds their order, so each carries its place with it.
    carrying: Integers = (keys << shift) | np.arange(len(keys))
    carrying.sort()
    carrying &= (1 << shift) - 1
    return carrying


def falling_rank(scores: Floats) -> Integers:
    """0 for the highest score, 1 for the next lower one and so on; equal scores have one rank, [D] → [D]."""
    order = np.argsort(-scores)
    falls = np.diff(scores[order], prepend=scores[order[:1]]) != 0
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[order] = np.cumsum(falls)
    return ranks


def _rank(group: Integers) -> Integers:
    """Place of each element among those of its group, from 0; groups stand together."""
    positions = np.arange(len(group))
    is_first = np.append(True, group[1:] != group[:-1])[: len(group)]
    return positions - np.maximum.accumulate(np.where(is_first, positions, 0))


def _overlapping(found: _Boxes, labelled: _Boxes, iscrowd: Flags, min_iou: float) -> tuple[Integers, Integers, Floats]:
    """Positions of detections, of labelled boxes of the same group, and their overlap where it is at least `min_iou`.

    By rising position of the detection, then of the labelled box.
    """
    start = np.searchsorted(labelled.group, found.group, side="left")
    count = np.searchsorted(labelled.group, found.group, side="right") - start
    has_company = np.flatnonzero(count)
    start, count = start[has_company], count[has_company]
    ends = np.cumsum(count)
    first_sides, second_sides = _sides(found.boxes_xywh[has_company]), _sides(labelled.boxes_xywh)
    parts: list[tuple[Integers, Integers, Floats]] = []
    begin = 0
    while begin < len(count):
        done = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        own = np.repeat(np.arange(begin, end), count[begin:end])
        other = np.arange(len(own)) + np.repeat(
            start[begin:end] - (ends[begin:end] - count[begin:end] - done), count[begin:end]
        )
        iou = _iou(first_sides, own, second_sides, other, iscrowd)
        kept = np.flatnonzero(iou >= min_iou)
        parts.append((has_company[own[kept]], other[kept], iou[kept]))
        begin = end
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    first, second, iou = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return first, second, iou


def _sides(boxes_xywh: Boxes) -> tuple[Floats, ...]:
    """Left, top, right, bottom and area, each [N]."""
    left, top, width, height = np.ascontiguousarray(boxes_xywh.T)
    return left, top, left + width, top + height, width * height


def _iou(
    first: tuple[Floats, ...], own: Integers, second: tuple[Floats, ...], other: Integers, iscrowd: Flags
) -> Floats:
    """In the order of operations of pycocotools' `bbIou`, so that every bit is the same."""
    width = np.minimum(first[2][own], second[2][other]) - np.maximum(first[0][own], second[0][other])
    height = np.minimum(first[3][own], second[3][other]) - np.maximum(first[1][own], second[1][other])
    shared = np.where((width > 0) & (height > 0), width * height, 0.0)
    area = first[4][own]
    union = area + second[4][other] - shared
    if iscrowd.any():
        union = np.where(iscrowd[other], area, union)
    # Boxes without area overlap nothing, not even each other.
    iou: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
    return iou


def _assign(
    pairs: tuple[Integers, Integers, Floats], group: Integers, thresholds: Floats, truth_ignored: Flags, iscrowd: Flags
) -> tuple[BitSets, BitSets, BitSets]:
    """Deals the boxes out to the detections, for all thresholds (as bits) and size classes at once.

    A round takes one detection of every group, the surest that has not had its turn, so that no two of a round want
    the same box; in a round each goes through its candidates from the best down, first those that count.

    Args:
        pairs: Positions of detections and labelled boxes, and their overlap, of at least the lowest threshold.
        group: Of each detection, [D].
        thresholds: Ascending, [T].
        truth_ignored: [A, G].
        iscrowd: [G].

    Returns:
        Thresholds at which each detection is right [A, D], does not count [A, D], and each box is found [G].
    """
    bits = bits_type(len(thresholds))
    everything = bits(2 ** len(thresholds) - 1)
    detection, truth, iou = pairs
    # From the best candidate of each detection down, of equal ones the last first.
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
