"""Calibration: scores and the outcomes of detections → maps from a score to the probability of a correct detection.

Maps are strictly increasing, so that the order of the detections of a class, and with it AP, stays the same.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit

from raydet.measuring.diagnosis.scores import Outcomes
from raydet.measuring.fitting.scores import LEAST_SCORE, ScoreMap, map_scores
from raydet.tables.columns import Flags, Floats, Integers

Method = Literal["isotonic", "temperature"]
METHODS: tuple[Method, ...] = ("isotonic", "temperature")

NUM_FOLDS = 5
_MIN_EACH = 50
"""Correct and wrong detections that a class needs for a map of its own; with fewer it takes that of all classes."""


def fit_map(method: Method, scores: Floats, is_right: Flags) -> ScoreMap:
    """Fit a map to the scores, [D], and outcomes, [D], of at least one detection."""
    return _isotonic(scores, is_right) if method == "isotonic" else _temperature(scores, is_right)


def _isotonic(scores: Floats, is_right: Flags) -> ScoreMap:
    distinct, place = np.unique(scores, return_inverse=True)
    weights = np.bincount(place).astype(np.float64)
    fitted = isotonic_regression(np.bincount(place, is_right) / weights, weights=weights)
    starts = fitted.blocks[:-1]
    knots = np.add.reduceat(distinct * weights, starts) / fitted.weights
    return ScoreMap(scores=tuple(knots.tolist()), values=tuple(np.clip(fitted.x[starts], 0, 1).tolist()))


def _temperature(scores: Floats, is_right: Flags) -> ScoreMap:
    odds = logit(np.clip(scores, LEAST_SCORE, 1 - LEAST_SCORE))

    def loss(parameters: Floats) -> tuple[float, Floats]:
        """Return the mean log loss and its gradient."""
        z = parameters[0] * odds + parameters[1]
        excess = (expit(z) - is_right) / len(odds)
        value = float(np.mean(np.logaddexp(0, z) - z * is_right))
        return value, np.array([excess @ odds, excess.sum()])

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(0.02, 50), (-20, 20)])
    slope, offset = found.x.tolist()
    return ScoreMap(temperature=1 / slope, offset=offset)


def fit_maps(
    method: Method, scores: Floats, is_right: Flags, category: Integers, num_classes: int
) -> tuple[ScoreMap, ...]:
    """Fit a map for each class; classes with too few correct or wrong detections share that of all detections."""
    pooled = fit_map(method, scores, is_right)
    maps = []
    for index in range(num_classes):
        own = category == index
        num_right = int(is_right[own].sum())
        is_enough = min(num_right, int(own.sum()) - num_right) >= _MIN_EACH
        maps.append(fit_map(method, scores[own], is_right[own]) if is_enough else pooled)
    return tuple(maps)


def folds_of(num_images: int, seed: int) -> Integers:
    """Return the fold of each image, int64 [I], at random."""
    return np.random.default_rng([seed, 2]).permutation(num_images) % NUM_FOLDS


@dataclass(frozen=True)
class Calibration:
    """Chosen calibration.

    Attributes:
        method: None if no method predicts outcomes better than the scores themselves.
        maps: By class [C].
        held_out: Calibrated score of each detection of the outcomes, from maps fitted on other images, float64 [D].
    """

    method: Method | None
    maps: tuple[ScoreMap | None, ...]
    held_out: Floats


def calibrate(outcomes: Outcomes, *, seed: int) -> Calibration:
    """Choose the method with the lowest Brier score on held-out images, five folds, and fit it on all images."""
    scores, is_right, category = outcomes.scores, outcomes.is_right, outcomes.category.astype(np.int64)
    best = Calibration(None, (None,) * outcomes.num_categories, scores)
    if min(int(is_right.sum()), int((~is_right).sum())) < _MIN_EACH or len(outcomes.image_ids) < 2 * NUM_FOLDS:
        return best
    fold = folds_of(len(outcomes.image_ids), seed)[outcomes.image]
    lowest = _brier(scores, is_right)
    for method in METHODS:
        held_out = np.empty_like(scores)
        for number in range(NUM_FOLDS):
            own = fold == number
            maps = fit_maps(method, scores[~own], is_right[~own], category[~own], outcomes.num_categories)
            held_out[own] = map_scores(maps, scores[own], category[own])
        error = _brier(held_out, is_right)
        if error < lowest:
            lowest, best = error, Calibration(method, (), held_out)
    if best.method is None:
        return best
    maps = fit_maps(best.method, scores, is_right, category, outcomes.num_categories)
    return Calibration(best.method, maps, best.held_out)


def _brier(probabilities: Floats, is_right: Flags) -> float:
    return float(np.mean((probabilities - is_right) ** 2))
