"""Vectors of images → the images that are nearly the same as an earlier one."""

import numpy as np
import numpy.typing as npt

from raydet.selection.vectors import ImageVectors
from raydet.tables.columns import Flags, Integers

ROWS_AT_ONCE = 4096
"""A product of two blocks takes 64 MB."""


def near_duplicates(
    vectors: ImageVectors, min_similarity: float, *, rows_at_once: int = ROWS_AT_ONCE
) -> tuple[Integers, npt.NDArray[np.float32]]:
    """Find the images that are similar to an earlier image which is itself no duplicate.

    Every image is compared with all earlier ones, so the result does not depend on the size of the blocks.

    Args:
        vectors: Embeddings of the images.
        min_similarity: Least cosine similarity of a duplicate.
        rows_at_once: Images in a block.

    Returns:
        For each image the position of the most similar earlier image that is no duplicate, int64 [N], -1 for an image
        that is no duplicate, and their similarity, [N].
    """
    num_images = len(vectors.image_ids)
    original = np.full(num_images, -1, np.int64)
    similarity = np.zeros(num_images, np.float32)
    for start, block in vectors.blocks(rows_at_once):
        best = np.full(len(block), -np.inf, np.float32)
        place = np.full(len(block), -1, np.int64)
        for first, earlier in vectors.blocks(rows_at_once, start):
            kept = np.flatnonzero(original[first : first + len(earlier)] < 0)
            if kept.size:
                _improve(best, place, block @ earlier[kept].T, first + kept)
        among = block @ block.T
        is_kept = np.zeros(len(block), np.bool_)
        for row in range(len(block)):
            _improve_within(row, best, place, among[row], is_kept, start)
            is_kept[row] = best[row] < min_similarity
        is_duplicate = ~is_kept
        original[start : start + len(block)][is_duplicate] = place[is_duplicate]
        similarity[start : start + len(block)][is_duplicate] = best[is_duplicate]
    return original, similarity


def _improve(
    best: npt.NDArray[np.float32], place: Integers, products: npt.NDArray[np.float32], places: Integers
) -> None:
    """Take over the most similar of other images, [B, M] products with those at `places`, where it is better."""
    column = products.argmax(axis=1)
    found = products[np.arange(len(products)), column]
    better = found > best
    best[better], place[better] = found[better], places[column[better]]


def _improve_within(
    row: int,
    best: npt.NDArray[np.float32],
    place: Integers,
    products: npt.NDArray[np.float32],
    is_kept: Flags,
    start: int,
) -> None:
    """Do the same for one image and the earlier images of its block that are no duplicates."""
    kept = np.flatnonzero(is_kept[:row])
    if kept.size:
        column = kept[products[kept].argmax()]
        if products[column] > best[row]:
            best[row], place[row] = products[column], start + column
