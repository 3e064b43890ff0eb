"""Repeats of images per epoch, from the weights of tables and of rare classes: an image need not be shown once.

This module imports neither Ray nor torch.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

_ORDER_STREAM, _EPOCH_STREAM = 3, 4
_GOLDEN = (5**0.5 - 1) / 2
"""Step of the offset from epoch to epoch; its multiples spread evenly over 0 … 1."""


@dataclass(frozen=True, eq=False)
class Repeats:
    """Mean number of times that each row is shown per epoch.

    An image is shown at least as often as the whole part of its factor. The fractions of all images are dealt out by
    systematic sampling: the images lie along a line, in a random order that is fixed for a run, each as long as its
    fraction, and equidistant points on the line choose the images that are shown once more. The points move on in each
    epoch by the golden ratio of their distance. So all epochs have the same number of images, and over the epochs an
    image is shown almost exactly as often as its factor says: with a factor of 0.3, in three of ten epochs.

    Attributes:
        factors: Non-negative, float64 [N].
    """

    factors: npt.NDArray[np.float64]

    @cached_property
    def num_shown(self) -> int:
        """Images per epoch: the sum of all factors, rounded; at least 1."""
        return max(1, round(float(self.factors.sum())))

    def counts(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return how often each row is shown in an epoch, int64 [N]; their sum is `num_shown`."""
        whole = np.floor(self.factors)
        counts = whole.astype(np.int64)
        num_more = self.num_shown - int(counts.sum())
        if num_more <= 0:
            return counts
        order = np.random.default_rng([seed, 0, _ORDER_STREAM]).permutation(len(counts))
        ends = np.cumsum((self.factors - whole)[order])
        first = np.random.default_rng([seed, 0, _EPOCH_STREAM]).random()
        points = (np.arange(num_more) + (first + epoch * _GOLDEN) % 1) * (ends[-1] / num_more)
        np.add.at(counts, order[np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)], 1)
        return counts
