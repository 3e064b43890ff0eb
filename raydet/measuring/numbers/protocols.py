"""Metrics of Pascal VOC and LVIS.

Each benchmark has its own matching, `match_voc` and `match_lvis`, which returns ordinary `Matches` (parts can be joined
with `matches.concatenate`), and its own metrics, `voc_blocks` and `lvis_blocks`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from raydet.measuring.numbers.matches import Matches, Protocol, bits_at
from raydet.measuring.numbers.matching import match, overlapping_pairs
from raydet.measuring.numbers.metrics import accumulate, by_descending_score, mean_of
from raydet.measuring.numbers.precision import VOC07_RECALLS, envelope, hits_needed, precision_at
from raydet.measuring.numbers.values import Block, MetricValue
from raydet.tables.columns import DetectionColumns, Integers, TruthColumns, in_unlabelled_class
from raydet.tables.schema import Category

VOC = Protocol(iou_thresholds=(0.5,), areas=(("all", (0.0, float("inf"))),), max_detections=(2**31 - 1,))
LVIS = Protocol(max_detections=(300,))

_MAX_IMAGES_RARE, _MAX_IMAGES_COMMON = 10, 100


def match_voc(truth: TruthColumns, detections: DetectionColumns, num_categories: int) -> Matches:
    """Match detections by Pascal VOC's rule, at IoU 0.5.

    A detection is assigned to the box of its class that it overlaps most (of equal overlaps, the first), if the overlap
    is at least 0.5. If that box is difficult, the detection does not count. Of the detections assigned to any other
    box, the one with the highest score is correct and the rest are wrong, regardless of other boxes they overlap.
    Source: the development kit of the challenge (`VOCevaldet.m`, 2007 to 2012). `iscrowd` marks difficult boxes, and
    the detections have no limit per image.
    """
    matches = match(truth, detections, num_categories, VOC)
    plain = replace(truth, iscrowd=np.zeros_like(truth.iscrowd))
    pairs = overlapping_pairs(plain, detections, same_category=True, min_iou=0.5)
    best_first = np.lexsort((pairs.truth, -pairs.iou, pairs.detection))
    own, is_first = np.unique(pairs.detection[best_first], return_index=True)
    box_of = np.full(len(detections.scores), -1)
    box_of[own] = pairs.truth[best_first[is_first]]

    box = box_of[matches.detection_row]
    assigned = np.flatnonzero(box >= 0)
    # Ordered by image, class and descending score, so the first detection of each box has the highest score.
    found, first_of_box = np.unique(box[assigned], return_index=True)
    is_counted = ~truth.iscrowd[found]
    right = np.zeros_like(matches.true_positive)
    right[0, assigned[first_of_box[is_counted]]] = 1
    ignored = np.zeros_like(matches.ignored)
    ignored[0, assigned[truth.iscrowd[box[assigned]]]] = 1
    unlabelled = in_unlabelled_class(truth, detections, matches.detection_row)
    if unlabelled is not None:
        ignored[0, unlabelled & (right[0] == 0)] = 1
    truth_found = np.isin(matches.truth_row, found).astype(matches.truth_found.dtype)
    return replace(matches, true_positive=right, ignored=ignored, truth_found=truth_found)


def voc_blocks(matches: Matches, categories: Sequence[Category], *, eleven_points: bool) -> tuple[Block, ...]:
    """Return Pascal VOC's average precision over all classes (their mean) and by class, from all images in one piece.

    With eleven points it is the mean of the best precision at or beyond recalls 0, 0.1, … 1 (VOC 2007), otherwise the
    area under the curve of the best precision at or beyond each recall (VOC 2010 and later).
    """
    order = by_descending_score(matches)
    category = matches.detection_category[order]
    right, judged = bits_at(matches.true_positive[0], 0)[order], ~bits_at(matches.ignored[0], 0)[order]
    starts = np.searchsorted(category, np.arange(len(categories) + 1))
    num_truth = np.bincount(matches.truth_category[~matches.truth_ignored[0]], minlength=len(categories))
    values = np.full(len(categories), np.nan)
    for index in np.flatnonzero(num_truth).tolist():
        own = slice(starts[index], starts[index + 1])
        hits = np.flatnonzero(right[own])
        precision = np.arange(1, len(hits) + 1) / np.cumsum(judged[own])[hits]
        if eleven_points:
            needed = hits_needed(num_truth[index : index + 1], VOC07_RECALLS)
            values[index] = precision_at(precision, np.array([len(hits)]), needed)[0].mean()
        else:
            values[index] = envelope(precision).sum() / num_truth[index]
    names = [None, *(category.name for category in categories)]
    known = np.flatnonzero(num_truth)
    numbers = [float(np.mean(values[known])) if known.size else None]
    numbers += [None if np.isnan(value) else value for value in values.tolist()]
    return tuple(
        (MetricValue(metric="AP50", value=number, category=name, iou=0.5),)
        for name, number in zip(names, numbers, strict=True)
    )


def match_lvis(
    truth: TruthColumns,
    detections: DetectionColumns,
    num_categories: int,
    negatives: Sequence[Sequence[int]],
    not_exhaustive: Sequence[Sequence[int]],
) -> Matches:
    """Match as COCO does, but judge in each image only the classes whose presence or absence is known.

    Only the 300 detections with the highest scores in an image are used. Detections of a class that is neither labelled
    in the image nor known to be absent are dropped. Unmatched detections do not count if not every object of their
    class is labelled. There are no crowds, and boxes without area are dropped. Source: the `lvis` package.

    For each image, in the order of `truth`, `negatives` are the classes known to be absent (`neg_category_ids`), and
    `not_exhaustive` those of which not all objects are labelled (`not_exhaustive_category_ids`).
    """
    num_images = len(truth.image_ids)
    counted = np.flatnonzero(truth.area > 0)
    labelled_image = np.repeat(np.arange(num_images), np.diff(truth.starts))[counted]
    image = np.repeat(np.arange(num_images), np.diff(detections.starts))
    by_score = np.lexsort((-detections.scores, image))
    place = np.arange(len(image)) - np.repeat(detections.starts[:-1], np.diff(detections.starts))
    # Ascending, so that detections with equal scores keep their order.
    kept = np.sort(by_score[place < LVIS.max_detections[-1]])
    key = image * num_categories + detections.category
    labelled = labelled_image * num_categories + truth.category[counted]
    known = np.concatenate([labelled, _keys(negatives, num_categories)])
    has_area = detections.boxes_xywh[kept, 2] * detections.boxes_xywh[kept, 3] > 0
    kept = kept[np.isin(key[kept], known) & has_area]
    judged = DetectionColumns(
        starts=np.searchsorted(image[kept], np.arange(num_images + 1)),
        boxes_xywh=detections.boxes_xywh[kept],
        scores=detections.scores[kept],
        category=detections.category[kept],
    )
    boxes = TruthColumns(
        image_ids=truth.image_ids,
        starts=np.searchsorted(labelled_image, np.arange(num_images + 1)),
        boxes_xywh=truth.boxes_xywh[counted],
        category=truth.category[counted],
        area=truth.area[counted],
        iscrowd=np.zeros(len(counted), dtype=bool),
    )
    matches = match(boxes, judged, num_categories, LVIS)
    row = kept[matches.detection_row]
    is_open = np.isin(key[row], _keys(not_exhaustive, num_categories))
    everything = matches.ignored.dtype.type(2 ** len(LVIS.iou_thresholds) - 1)
    ignored = matches.ignored.copy()
    ignored[:, is_open] |= everything & ~matches.true_positive[:, is_open]
    return replace(matches, detection_row=row, truth_row=counted[matches.truth_row], ignored=ignored)


def _keys(categories_by_image: Sequence[Sequence[int]], num_categories: int) -> Integers:
    """Return one key for each class of each image, in one array."""
    image = np.repeat(np.arange(len(categories_by_image)), [len(categories) for categories in categories_by_image])
    listed = [category for categories in categories_by_image for category in categories]
    return image * num_categories + np.array(listed, dtype=np.int64)


def lvis_blocks(
    matches: Matches, categories: Sequence[Category], frequency: Sequence[str] | None = None
) -> tuple[Block, ...]:
    """Return LVIS's metrics over all classes (including rare, common and frequent classes) and by class.

    `matches` are the result of `match_lvis`, all images in one piece. `frequency` is "r", "c" or "f" for each class; by
    default it follows from the number of images in which the class is labelled: up to 10, up to 100, or more.
    """
    result = accumulate(matches, categories)
    precision = result.precision[:, :, :, 0, 0]
    groups = frequency or _frequency_by_images(matches)
    by_source_id = sorted(range(len(categories)), key=lambda index: categories[index].id)
    limit = LVIS.max_detections[-1]
    overall, *by_class = result.blocks()
    by_frequency = [
        MetricValue(
            metric=f"AP{letter}",
            value=mean_of(precision[:, :, [index for index in by_source_id if groups[index] == letter]]),
            area="all",
            max_detections=limit,
        )
        for letter in "rcf"
    ]
    place = next(place for place, value in enumerate(overall) if value.metric == f"AR{limit}")
    return ((*overall[:place], *by_frequency, *overall[place:]), *by_class)


def _frequency_by_images(matches: Matches) -> list[str]:
    keys = np.unique(matches.truth_image.astype(np.int64) * matches.num_categories + matches.truth_category)
    num_images = np.bincount(keys % matches.num_categories, minlength=matches.num_categories)
    steps = np.searchsorted([_MAX_IMAGES_RARE, _MAX_IMAGES_COMMON], num_images)
    return ["rcf"[step] for step in steps.tolist()]
