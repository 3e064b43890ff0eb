"""Detections of images → how much the labels of each image would teach a model, by several criteria, from 0 to 1."""

import numpy as np
import numpy.typing as npt

from raydet.measuring.numbers.matching import overlapping_pairs
from raydet.tables.columns import (
    DetectionColumns,
    Floats,
    Integers,
    as_labels,
    image_places,
    keep_detections,
)

HIGHEST = 5
"""Detections of an image whose uncertainty counts."""
MIN_IOU = 0.5
"""Two runs found the same object if their boxes overlap at least this much."""
MOST_DETECTIONS = 50
"""Detections of an image that are compared with those of another run."""


def uncertainty_of(scores: Floats, other_scores: Floats) -> Floats:
    """Return how uncertain each detection is: whether there is an object, or which class it has, [D] → [D].

    The first is the binary entropy of the score in bits. The second is the lower one of the score and that of the
    query's best other class, as in a margin between them. The result is 1 − (1 − first) · (1 − second).
    """
    is_sure = (scores <= 0) | (scores >= 1)
    inside = np.where(is_sure, 0.5, scores)
    entropy = np.where(is_sure, 0.0, -inside * np.log2(inside) - (1 - inside) * np.log2(1 - inside))
    return np.asarray(1 - (1 - entropy) * (1 - np.minimum(scores, other_scores)))


def uncertainty(found: DetectionColumns, other_scores: Floats) -> Floats:
    """Return for each image the sum of its five most uncertain detections, divided by five, [I]."""
    values = uncertainty_of(found.scores, other_scores)
    kept = np.flatnonzero(_rank_in_image(found, values) < HIGHEST)
    sums = np.bincount(image_places(found)[kept], values[kept], minlength=len(found.starts) - 1)
    return np.asarray(sums / HIGHEST)


def rarity_of(counts: Floats) -> Floats:
    """Return how rare each class is: √(n / nₖ) with n of the rarest class, as in repeat-factor sampling, [K] → [K].

    One is added to each count, for classes that have not been seen.
    """
    return np.asarray(np.sqrt((counts.min(initial=np.inf) + 1) / (counts + 1)))


def rareness(found: DetectionColumns, rarity: Floats) -> Floats:
    """Return for each image the highest product of a detection's score and its class's rarity, [I]."""
    highest = np.zeros(len(found.starts) - 1)
    np.maximum.at(highest, image_places(found), found.scores * rarity[found.category])
    return highest


def disagreement(image_ids: Integers, first: DetectionColumns, second: DetectionColumns) -> Floats:
    """Return how much two runs disagree about each image, [I].

    Objects of both runs are matched within a class, in the order of the product of scores and overlap. The agreement is
    2 · Σ pqo / (Σ p² + Σ q²), with the scores p and q and the overlap o: the Dice coefficient, in which weak detections
    hardly count. The result is 1 − agreement, multiplied by the highest score in the image.
    """
    first, second = (keep_detections(run, _rank_in_image(run, run.scores) < MOST_DETECTIONS) for run in (first, second))
    num_images = len(image_ids)
    labels = as_labels(image_ids, second)
    pairs = overlapping_pairs(labels, first, same_category=True, min_iou=MIN_IOU)
    weights = first.scores[pairs.detection] * second.scores[pairs.truth] * pairs.iou
    image = image_places(first)
    shared = np.zeros(num_images)
    taken: tuple[set[int], set[int]] = set(), set()
    for place in np.argsort(-weights, kind="stable").tolist():
        ends = int(pairs.detection[place]), int(pairs.truth[place])
        if ends[0] not in taken[0] and ends[1] not in taken[1]:
            for side, end in zip(taken, ends, strict=True):
                side.add(end)
            shared[image[ends[0]]] += weights[place]
    total, highest = np.zeros(num_images), np.zeros(num_images)
    for run in (first, second):
        total += np.bincount(image_places(run), run.scores**2, minlength=num_images)
        np.maximum.at(highest, image_places(run), run.scores)
    agreement = np.divide(2 * shared, total, out=np.ones(num_images), where=total > 0)
    return np.asarray(np.clip(1 - agreement, 0, 1) * highest)


def _rank_in_image(found: DetectionColumns, values: npt.NDArray[np.float64]) -> Integers:
    """Return the rank of each detection's value within its image, from 0 for the highest, [D]."""
    image = image_places(found)
    order = np.lexsort((-values, image))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - found.starts[:-1][image[order]]
    return ranks
