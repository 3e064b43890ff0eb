"""Vectors of images → the images that are nearly the same as an earlier one."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import numpy.typing as npt

from raydet.selection.vectors import ImageVectors, Vectors
from raydet.tables.columns import Flags, Integers

ROWS_AT_ONCE = 4096
"""A product of two blocks takes 64 MB."""

Nearest = tuple[npt.NDArray[np.float32], Integers]
"""For each vector of a block the highest cosine similarity to some others, −∞ if there are none, and the place of the
one that has it, −1 if there are none; of equally similar ones the first."""
Search = Callable[[int, Vectors, Flags], Nearest]
"""Function that compares the vectors from some place on with all earlier ones that are no duplicates, whose flags it
gets."""


def near_duplicates(
    vectors: ImageVectors, min_similarity: float, *, rows_at_once: int = ROWS_AT_ONCE, search: Search | None = None
) -> tuple[Integers, npt.NDArray[np.float32]]:
    """Find the images that are similar to an earlier image which is itself no duplicate.

    Every image is compared with all earlier ones, so the result does not depend on the size of the blocks.

    Args:
        vectors: Vectors of the images.
        min_similarity: Least cosine similarity of a duplicate.
        rows_at_once: Images in a block.
        search: Comparison of a block with all earlier images; by default in this process.

    Returns:
        For each image the position of the most similar earlier image that is no duplicate, int64 [N], -1 for an image
        that is no duplicate, and their similarity, [N].
    """
    search = search or partial(_search_here, vectors, rows_at_once)
    num_images = len(vectors.image_ids)
    original = np.full(num_images, -1, np.int64)
    similarity = np.zeros(num_images, np.float32)
    for start, block in vectors.blocks(rows_at_once):
        best, place = search(start, block, original[:start] < 0)
        among = block @ block.T
        is_kept = np.zeros(len(block), np.bool_)
        for row in range(len(block)):
            _improve_within(row, best, place, among[row], is_kept, start)
            is_kept[row] = best[row] < min_similarity
        is_duplicate = ~is_kept
        original[start : start + len(block)][is_duplicate] = place[is_duplicate]
        similarity[start : start + len(block)][is_duplicate] = best[is_duplicate]
    return original, similarity


def _search_here(vectors: ImageVectors, rows_at_once: int, start: int, block: Vectors, is_kept: Flags) -> Nearest:
    return nearest_kept(block, vectors.blocks(rows_at_once, start), is_kept)


def nearest_kept(block: Vectors, others: Iterable[tuple[int, Vectors]], is_kept: Flags) -> Nearest:
    """Compare vectors with those of other blocks, each with its first place, that are kept."""
    best = np.full(len(block), -np.inf, np.float32)
    place = np.full(len(block), -1, np.int64)
    for first, other in others:
        kept = np.flatnonzero(is_kept[first : first + len(other)])
        if kept.size:
            products = block @ other[kept].T
            column = products.argmax(axis=1)
            improve((best, place), (products[np.arange(len(products)), column], first + kept[column]))
    return best, place


def improve(nearest: Nearest, found: Nearest) -> None:
    """Take over what is more similar in `found`."""
    better = found[0] > nearest[0]
    nearest[0][better], nearest[1][better] = found[0][better], found[1][better]


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
