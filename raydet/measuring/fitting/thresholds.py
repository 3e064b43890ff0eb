"""Score thresholds of a class: outcomes of its detections → the threshold, and intervals of what passes it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv

from raydet.measuring.diagnosis.scores import IOU, Outcomes
from raydet.measuring.numbers.values import Block, MetricValue
from raydet.tables.columns import Flags, Floats, Integers

LEVEL = 0.95
"""Probability with which a threshold keeps its precision on all images of this kind, and of the intervals."""
_STEP = 1.25
"""Ratio of the numbers of detections that two consecutive thresholds select: a finer grid costs certainty."""


class Ratio(NamedTuple):
    """Ratio of two sums over images, with its interval; None if undefined."""

    value: float | None
    low: float | None
    high: float | None


def lower_bound(hits: Floats, totals: Floats, error: float) -> float:
    """Bound the ratio of two sums from below.

    The bound is that of Clopper and Pearson, for as many independent trials as tell as much as these, of which those of
    an image may depend on each other (Korn and Graubard 1998).

    Args:
        hits: Correct detections, or the like, of each image [I].
        totals: All detections, or the like, of each image, of which at least one is not 0 [I].
        error: Probability with which the true ratio is below the bound.
    """
    share, num = float(hits.sum() / totals.sum()), _effective(hits, totals)
    return float(betaincinv(share * num, (1 - share) * num + 1, error)) if share > 0 else 0.0


def _effective(hits: Floats, totals: Floats) -> float:
    """Return the number of independent trials with the variance of the ratio, at most the actual number."""
    total, used = float(totals.sum()), int(np.count_nonzero(totals))
    share = float(hits.sum()) / total
    independent = share * (1 - share) / total
    if used < 2 or independent <= 0:
        return total
    actual = used / (used - 1) * float(((hits - share * totals) ** 2).sum()) / total**2
    return total * min(1.0, independent / actual) if actual > 0 else total


def ratio(hits: Floats, totals: Floats) -> Ratio:
    """Return the ratio of two sums over images with its two-sided 95 % interval; arguments as of `lower_bound`."""
    if not totals.sum():
        return Ratio(None, None, None)
    error = (1 - LEVEL) / 2
    low, high = lower_bound(hits, totals, error), 1 - lower_bound(totals - hits, totals, error)
    return Ratio(float(hits.sum() / totals.sum()), low, high)


def point_values(outcomes: Outcomes, names: Sequence[str] | None = None) -> list[Block]:
    """Return precision, recall and F1 of the detections, over all classes, then by class, with 95 % intervals.

    `names` are those of the classes, for values that name theirs.
    """
    num_images = len(outcomes.image_ids)
    blocks = []
    for index in (None, *range(outcomes.num_categories)):
        of_class = slice(None) if index is None else outcomes.category == index
        of_truth = slice(None) if index is None else outcomes.truth_category == index
        image, is_right = outcomes.image[of_class], outcomes.is_right[of_class]
        right = np.bincount(image[is_right], minlength=num_images).astype(np.float64)
        found = np.bincount(image, minlength=num_images).astype(np.float64)
        labelled = np.bincount(outcomes.truth_image[of_truth], minlength=num_images).astype(np.float64)
        totals = {"precision": found, "recall": labelled, "F1": (found + labelled) / 2}
        category = names[index] if names is not None and index is not None else None
        blocks.append(
            tuple(
                MetricValue(metric=metric, category=category, iou=IOU, area="all", **ratio(right, total)._asdict())
                for metric, total in totals.items()
            )
        )
    return blocks


def threshold_with_precision(scores: Floats, is_right: Flags, image: Integers, target: float) -> float | None:
    """Return a low score threshold at which the precision reaches a target on all images of this kind.

    It does with a probability of 95 %, although several thresholds are tried: these select numbers of detections that
    depend on the scores alone, and share the probability of an error (Bonferroni).

    Args:
        scores: [D].
        is_right: [D].
        image: Image of each detection, int [D].
        target: Precision, above 0 and below 1.

    Returns:
        The lowest of the thresholds that reach the target; None if none is proved to.
    """
    order = np.argsort(-scores, kind="stable")
    scores, is_right, image = scores[order], is_right[order], image[order]
    numbers = _numbers_kept(scores, target)
    for num_kept in reversed(numbers):
        totals = np.bincount(image[:num_kept]).astype(np.float64)
        right = image[:num_kept][is_right[:num_kept]]
        hits = np.bincount(right, minlength=len(totals)).astype(np.float64)
        if lower_bound(hits, totals, (1 - LEVEL) / len(numbers)) >= target:
            return float(scores[num_kept - 1])
    return None


def _numbers_kept(scores: Floats, target: float) -> list[int]:
    """Return the numbers of detections that the thresholds to be tried select, ascending; scores descend."""
    fewest = np.log(1 - LEVEL) / np.log(target)  # so many, all correct, prove the target with one threshold
    if len(scores) < fewest:
        return []
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]) + 1, len(scores))
    num_steps = int(np.log(len(scores) / fewest) / np.log(_STEP)) + 1
    wished = np.append(fewest * _STEP ** np.arange(num_steps), len(scores))
    numbers: list[int] = np.unique(ends[np.searchsorted(ends, np.minimum(wished, len(scores)))]).tolist()
    return numbers
