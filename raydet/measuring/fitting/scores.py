"""Scores of detections at an operating point → which detections pass, and calibrated scores.

Every scoring process imports this module, which therefore does not import scipy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from raydet.tables.columns import Flags, Floats, Integers

_SLOPE = 1e-3
"""Share of the score itself in an isotonic map, which makes the map strictly increasing."""
LEAST_SCORE = 1e-9
"""Scores are kept so far from 0 and 1, where their log-odds are infinite."""
_MOST_KNOTS = 100_000


@dataclass(frozen=True, kw_only=True)
class ScoreMap:
    """Strictly increasing map from a score to a probability.

    Either logit(p) = logit(s) / temperature + offset (Guo et al. 2017, with the offset of Platt 1999), or, with knots,
    linear interpolation between them (centred isotonic regression, Oron and Flournoy 2017).

    Attributes:
        temperature: Above 0.
        offset: In log-odds.
        scores: Knots, strictly increasing.
        values: Probability at each knot, increasing.
    """

    temperature: float = 1.0
    offset: float = 0.0
    scores: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    def __call__(self, scores: Floats) -> Floats:
        """Return the probabilities of scores, float64 of the same shape, above 0 and at most 1."""
        if self.scores:
            mapped: Floats = (1 - _SLOPE) * np.interp(scores, self.scores, self.values) + _SLOPE * scores
            return mapped
        from scipy.special import expit, logit  # slow to import

        mapped = expit(logit(np.clip(scores, LEAST_SCORE, 1 - LEAST_SCORE)) / self.temperature + self.offset)
        return mapped

    @classmethod
    def of_content(cls, content: Mapping[str, Any]) -> Self:
        """Check the fields as JSON holds them.

        Raises:
            ValueError: They do not describe such a map.
        """
        knots, values = (tuple(map(float, content[name])) for name in ("scores", "values"))
        own = cls(
            temperature=float(content["temperature"]), offset=float(content["offset"]), scores=knots, values=values
        )
        numbers = np.array([own.temperature, own.offset, *knots, *values])
        steps = [np.diff(knots), np.diff(values)]
        is_map = len(knots) == len(values) <= _MOST_KNOTS and (steps[0] > 0).all() and (steps[1] >= 0).all()
        in_range = min([*knots, *values], default=0) >= 0 and max([*knots, *values], default=0) <= 1
        if not (np.isfinite(numbers).all() and own.temperature > 0 and is_map and in_range):
            raise ValueError("a calibration is not an increasing map of scores")
        return own


def map_scores(maps: Sequence[ScoreMap | None], scores: Floats, category: Integers) -> Floats:
    """Return each score, [D], as the map of its class converts it; None leaves it as it is."""
    result = scores.copy()
    for index, own in enumerate(maps):
        if own is not None:
            chosen = category == index
            result[chosen] = own(scores[chosen])
    return result


def passing(thresholds: Sequence[float | None], scores: Floats, category: Integers) -> Flags:
    """Return True for each score, [D], that reaches the threshold of its class; of a class with None, none does."""
    limits = np.array([np.inf if limit is None else limit for limit in thresholds], np.float64)
    reached: Flags = scores >= limits[category]
    return reached
