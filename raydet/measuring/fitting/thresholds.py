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
_STEP = 1.05
"""Ratio of the numbers of detections that pass two consecutive thresholds to be tested."""
_STARTS = (1, 2, 4, 8)
"""Where the sequences of tests begin, as multiples of the fewest detections that can prove a precision."""


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

    It does with a probability of 95 %, although many thresholds are tried: they are tested from the highest on, until a
    test fails (fixed-sequence testing, as in Angelopoulos et al. 2021, arXiv 2110.01052). A few sequences begin at
    different numbers of detections and share the probability of an error, because a test on few detections fails at a
    single wrong one.

    Args:
        scores: [D].
        is_right: [D].
        image: Image of each detection, int [D].
        target: Precision, above 0 and below 1.

    Returns:
        None if no threshold is proved to reach the target.
    """
    order = np.argsort(-scores, kind="stable")
    scores, is_right, image = scores[order], is_right[order], image[order]
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]) + 1, len(scores)) if len(scores) else []
    error = (1 - LEVEL) / len(_STARTS)
    fewest = np.log(error) / np.log(target)
    best = 0
    passed: dict[int, bool] = {}
    for start in _STARTS:
        for num_kept in _numbers_kept(ends, start * fewest):
            if num_kept not in passed:
                kept = slice(0, num_kept)
                totals = np.bincount(image[kept]).astype(np.float64)
                hits = np.bincount(image[kept], is_right[kept], minlength=len(totals))
                passed[num_kept] = lower_bound(hits, totals, error) >= target
            if not passed[num_kept]:
                break
            best = max(best, num_kept)
    return float(scores[best - 1]) if best else None


def _numbers_kept(ends: Sequence[int] | Integers, first: float) -> list[int]:
    """Return numbers of best-scoring detections, ascending, that thresholds select and that depend on scores alone."""
    if not len(ends) or ends[-1] < first:
        return []
    num_steps = int(np.log(ends[-1] / first) / np.log(_STEP)) + 1
    wished = np.append(first * _STEP ** np.arange(num_steps), ends[-1])
    return np.unique(np.asarray(ends)[np.searchsorted(ends, np.minimum(wished, ends[-1]))]).tolist()
