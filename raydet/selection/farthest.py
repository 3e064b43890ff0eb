"""Vectors of images → images that are unlike each other, and unlike those that are labelled already."""

import numpy as np
import numpy.typing as npt

from raydet.selection.vectors import Vectors
from raydet.tables.columns import Floats, Integers


def farthest_first(
    vectors: Vectors,
    weights: Floats,
    nearest: npt.NDArray[np.float32],
    *,
    num: int,
    max_similarity: float,
    by_distance: bool = True,
) -> tuple[Integers, npt.NDArray[np.float32]]:
    """Choose one image after the other: the one with the highest weight × distance from all chosen and labelled ones.

    The distance of two images is 1 − the cosine similarity of their vectors. With equal weights this is the greedy
    k-centre algorithm of Gonzalez (1985), which Sener and Savarese (2018) apply to active learning.

    Args:
        vectors: [N, D].
        weights: Positive, [N]; among equal products the earlier image is chosen.
        nearest: Similarity to the nearest labelled image, [N]; -1 if there is none.
        num: How many to choose.
        max_similarity: An image at least this similar to a chosen or labelled one is not chosen.
        by_distance: False to choose by the weights alone.

    Returns:
        Positions of the images in the order of the choice, int64 [M], fewer than `num` if the others are too similar;
        and their similarity to the nearest image chosen before or labelled, [M], -1 for none.
    """
    nearest = nearest.copy()
    chosen: list[int] = []
    similarity: list[np.float32] = []
    for _ in range(min(num, len(vectors))):
        distance = 1 - np.minimum(nearest, 1) if by_distance else 1
        gain = np.where(nearest < max_similarity, weights * distance, -1.0)
        gain[chosen] = -1
        place = int(gain.argmax())
        if gain[place] < 0:
            break
        chosen.append(place)
        similarity.append(nearest[place])
        np.maximum(nearest, vectors @ vectors[place], out=nearest)
    return np.array(chosen, np.int64), np.array(similarity, np.float32)
