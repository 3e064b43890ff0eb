"""Vectors of images → images that are unlike each other, and unlike those that are labelled already."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydet.selection.vectors import Vectors
from raydet.tables.columns import Floats, Integers


@dataclass
class Neighbourhood:
    """Vectors of some images, [N, D], and the cosine similarity of each to the nearest chosen or labelled one.

    Attributes:
        nearest: [N]; -1 if there is none.
    """

    vectors: Vectors
    nearest: npt.NDArray[np.float32]

    def choose(self, place: int) -> None:
        """Take the image at a place as chosen."""
        np.maximum(self.nearest, self.vectors @ self.vectors[place], out=self.nearest)


def farthest_first(
    weights: Floats,
    among: Neighbourhood,
    *,
    num: int,
    by_distance: bool = True,
    twins: Neighbourhood | None = None,
    max_similarity: float = np.inf,
) -> tuple[Integers, npt.NDArray[np.float32]]:
    """Choose one image after the other: the one with the highest weight × distance from all chosen and labelled ones.

    The distance of two images is 1 − the cosine similarity of their vectors. With equal weights this is the greedy
    k-centre algorithm of Gonzalez (1985), which Sener and Savarese (2018) apply to active learning.

    Args:
        weights: Positive, [N]; among equal products the earlier image is chosen.
        among: The images; changed by each choice.
        num: How many to choose.
        by_distance: False to choose by the weights alone.
        twins: The images by other vectors, of which near-duplicates are known; changed by each choice.
        max_similarity: An image at least this similar to a chosen or labelled one, by `twins`, is not chosen.

    Returns:
        Positions of the images in the order of the choice, int64 [M], fewer than `num` if the others are too similar;
        and their similarity to the nearest image chosen before or labelled, by `among`, [M], -1 for none.
    """
    twins = twins or among
    chosen: list[int] = []
    similarity: list[np.float32] = []
    for _ in range(min(num, len(weights))):
        distance = 1 - np.minimum(among.nearest, 1) if by_distance else 1
        gain = np.where(twins.nearest < max_similarity, weights * distance, -1.0)
        gain[chosen] = -1
        place = int(gain.argmax())
        if gain[place] < 0:
            break
        chosen.append(place)
        similarity.append(among.nearest[place])
        among.choose(place)
        if twins is not among:
            twins.choose(place)
    return np.array(chosen, np.int64), np.array(similarity, np.float32)
