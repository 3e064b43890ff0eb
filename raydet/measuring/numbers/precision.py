"""Precision at given recalls: the best precision at or beyond each recall that a protocol samples."""

from typing import Any

import numpy as np
import numpy.typing as npt

from raydet.tables.columns import Floats, Integers

COCO_RECALLS: Floats = np.linspace(0.0, 1.0, 101)
VOC07_RECALLS: Floats = np.arange(11.0) * 0.1


def envelope(precision: Floats) -> Floats:
    """Return the highest precision at or after each position, along the last axis."""
    best: Floats = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    return best


def hits_needed(num_truth: Integers, recalls: Floats) -> Integers:
    """Return the number of boxes to find for each recall, at least 1: [K] above 0, [R] → [K, R]."""
    total = num_truth[:, None].astype(np.float64)
    needed = np.ceil(recalls * total)
    # The product is rounded; the reference implementations compare the quotient.
    needed -= (needed - 1) / total >= recalls
    needed += needed / total < recalls
    return np.maximum(needed, 1).astype(np.int64)


def precision_at(precision: Floats, num_hits: Integers, needed: Integers) -> Floats:
    """Return the best precision at or beyond each recall, which always occurs at a true positive.

    From the precision at each true positive, by class, then descending score, [N], their number in each class, [K], and
    the result of `hits_needed`, [K, R], to [K, R]; 0 for a recall that is not reached.
    """
    result = np.zeros(needed.shape)
    has_any = num_hits > 0
    if has_any.any():
        found, first = num_hits[has_any, None], (np.cumsum(num_hits) - num_hits)[has_any, None]
        needed = needed[has_any]
        # Take the best between each recall's detection and the next recall's, then accumulate from the right.
        starts = first + np.minimum(needed, found) - 1
        best = envelope(np.maximum.reduceat(precision, starts.ravel()).reshape(starts.shape))
        result[has_any] = np.where(needed <= found, best, 0.0)
    return result


def place_in_class(category: npt.NDArray[np.signedinteger[Any]], num_hits: Integers) -> Integers:
    """Number the true positives of each class from 1: sorted classes [N], their counts [K] → [N]."""
    nth: Integers = np.arange(len(category)) - (np.cumsum(num_hits) - num_hits)[category] + 1
    return nth


def coco_precision(category: npt.NDArray[np.signedinteger[Any]], num_judged: Integers, num_hits: Integers) -> Floats:
    """Return COCO's precision at each true positive, [N].

    `category` is the class of each, by class, then descending score, [N], `num_judged` the number of detections of its
    class that count, up to and including it, [N], and `num_hits` the number of true positives of each class, [K].
    """
    precision: Floats = place_in_class(category, num_hits) / (num_judged + np.spacing(1))
    return precision
