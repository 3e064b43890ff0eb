"""Precision over recall: where each protocol reads it, and the best precision at each recall or beyond it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from raydet.tables.columns import Floats, Integers

COCO_RECALLS: Floats = np.linspace(0.0, 1.0, 101)
VOC07_RECALLS: Floats = np.arange(11.0) * 0.1


def envelope(precision: Floats) -> Floats:
    """The highest precision at each place or behind it, along the last axis."""
    best: Floats = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    return best


def hits_needed(num_truth: Integers, recalls: Floats) -> Integers:
    """How many labelled boxes must be found for each recall, at least 1: [K] above 0, [R] → [K, R]."""
    total = num_truth[:, None].astype(np.float64)
    needed = np.ceil(recalls * total)
    # The product is rounded; what counts is the quotient that the reference implementations compare.
    needed -= (needed - 1) / total >= recalls
    needed += needed / total < recalls
    return np.maximum(needed, 1).astype(np.int64)


def precision_at(precision: Floats, num_hits: Integers, needed: Integers) -> Floats:
    """The best precision at each recall or beyond it, which is always that of a right detection.

    Args:
        precision: At each right detection, by class, then falling score, [N].
        num_hits: Right detections of each class, [K]; their sum is N.
        needed: What `hits_needed` gives for each class and recall, [K, R].

    Returns:
        [K, R], 0 where a recall is not reached.
    """
    result = np.zeros(needed.shape)
    has_any = num_hits > 0
    if has_any.any():
        found, first = num_hits[has_any, None], (np.cumsum(num_hits) - num_hits)[has_any, None]
        needed = needed[has_any]
        # The best from each recall's detection up to the next recall's, then from the right over all recalls.
        starts = first + np.minimum(needed, found) - 1
        best = envelope(np.maximum.reduceat(precision, starts.ravel()).reshape(starts.shape))
        result[has_any] = np.where(needed <= found, best, 0.0)
    return result


def place_in_class(category: npt.NDArray[np.signedinteger[Any]], num_hits: Integers) -> Integers:
    """Each right detection's number among those of its class, from 1: sorted classes [N], their counts [K] → [N]."""
    nth: Integers = np.arange(len(category)) - (np.cumsum(num_hits) - num_hits)[category] + 1
    return nth


def coco_precision(category: npt.NDArray[np.signedinteger[Any]], num_judged: Integers, num_hits: Integers) -> Floats:
    """COCO's precision at each right detection, [N].

    Args:
        category: Of each right detection, by class, then falling score, [N].
        num_judged: Detections that count up to and with it, in its class, [N].
        num_hits: Right detections of each class, [K].
    """
    precision: Floats = place_in_class(category, num_hits) / (num_judged + np.spacing(1))
    return precision
