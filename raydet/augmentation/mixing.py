"""Mixing of images and objects: mosaic, mixup, and copies of small objects."""

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt

from raydet.augmentation.samples import FILL, Sample, area_of, cut, moved
from raydet.augmentation.taught import is_labels
from raydet.models.geometry import SizeHW

MOSAIC_CENTRE = (0.35, 0.65)
"""Range of the point where a mosaic's tiles meet, as fractions of width and height."""
TILE_ZOOM = (1.0, 1.5)
"""Range of the extra zoom after a tile is scaled to cover its cell; the overhang is cropped."""
MIXUP_BETA = 8.0
"""Images of a mixup are weighted by Beta(8, 8), near one half, so that both remain visible."""
SMALL_SIDE = 0.1
"""Upper limit of the side (root of the area) of a small object, as a fraction of the image's side."""
MAX_COPIES = 4
"""Maximum number of copied small objects per image."""
_PLACING_TRIES = 10


def mosaic(
    sample: Sample,
    partners: Sequence[Sample],
    rng: np.random.Generator,
    *,
    centre: tuple[float, float] = MOSAIC_CENTRE,
    zoom: tuple[float, float] = TILE_ZOOM,
) -> Sample:
    """Combine up to four images as tiles of one image with the size of the first.

    Args:
        sample: The first image.
        partners: Up to three other images; tiles without an image stay grey.
        rng: Source of the meeting point, the order of the tiles, and the visible part of each image.
        centre: Range of the meeting point, as in `MOSAIC_CENTRE`.
        zoom: Range of the extra zoom, as in `TILE_ZOOM`.
    """
    height, width = sample.size_hw
    if min(height, width) < 2:
        return sample
    middle_y = min(max(round(height * rng.uniform(*centre)), 1), height - 1)
    middle_x = min(max(round(width * rng.uniform(*centre)), 1), width - 1)
    tops, lefts = (0, middle_y, height), (0, middle_x, width)
    canvas = np.full((height, width, 3), FILL, np.uint8)
    pieces = []
    for cell, source in zip(rng.permutation(4)[: 1 + len(partners)], [sample, *partners], strict=True):
        row, column = divmod(int(cell), 2)
        top, left = tops[row], lefts[column]
        cell_hw = (tops[row + 1] - top, lefts[column + 1] - left)
        piece = _tile(source, cell_hw, rng, zoom, min_area_px=sample.min_area_px)
        canvas[top : tops[row + 1], left : lefts[column + 1]] = piece.image
        boxes_xywh = piece.boxes_xywh + np.array([left, top, 0, 0], np.float64)
        pieces.append(replace(piece, boxes_xywh=boxes_xywh))
    return _merged(sample, canvas, pieces)


def mixup(sample: Sample, partner: Sample, rng: np.random.Generator) -> Sample:
    """Blend two images; the objects of both are kept."""
    other = _tile(partner, sample.size_hw, rng, TILE_ZOOM, min_area_px=sample.min_area_px)
    share = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
    image = cv2.addWeighted(np.ascontiguousarray(sample.image), share, other.image, 1 - share, 0.0)
    return _merged(sample, np.asarray(image, np.uint8), [sample, other])


def copy_small(sample: Sample, rng: np.random.Generator) -> Sample:
    """Copy up to `MAX_COPIES` small objects, with their bounding rectangles, to positions without objects.

    Only objects whose rectangle overlaps no other box are candidates, so that no part of another object is copied.
    """
    height, width = sample.size_hw
    low = np.floor(sample.boxes_xywh[:, :2]).astype(np.int64)
    high = np.ceil(sample.boxes_xywh[:, :2] + sample.boxes_xywh[:, 2:]).astype(np.int64)
    high = np.minimum(high, (width, height))
    is_label = is_labels(sample)
    alone = is_label & ((_overlaps(low, high, low, high) & is_label).sum(axis=1) == 1)
    labels_low, labels_high = low[is_label], high[is_label]
    is_small = np.sqrt(area_of(sample.boxes_xywh)) < SMALL_SIDE * np.sqrt(height * width)
    candidates = np.flatnonzero(alone & is_small & ~sample.iscrowd)
    if not len(candidates):
        return sample
    image, rows, boxes = sample.image.copy(), list(range(len(sample.ids))), list(sample.boxes_xywh)
    for row in rng.choice(candidates, size=int(rng.integers(1, MAX_COPIES + 1))):
        (left, top), (right, bottom) = low[row], high[row]
        for _ in range(_PLACING_TRIES):
            new_left, new_top = (int(rng.integers(room + 1)) for room in (width - right + left, height - bottom + top))
            new_low = np.array([[new_left, new_top]])
            new_high = new_low + high[row] - low[row]
            if _overlaps(new_low, new_high, labels_low, labels_high).any():
                continue
            patch = sample.image[top:bottom, left:right]
            image[new_top : new_top + bottom - top, new_left : new_left + right - left] = patch
            labels_low, labels_high = np.concatenate([labels_low, new_low]), np.concatenate([labels_high, new_high])
            rows.append(int(row))
            boxes.append(sample.boxes_xywh[row] + np.array([new_left - left, new_top - top, 0, 0], np.float64))
            break
    return moved(sample, image, np.array(boxes), np.array(rows, np.int64))


def _tile(
    sample: Sample, cell_hw: SizeHW, rng: np.random.Generator, zoom: tuple[float, float], *, min_area_px: float
) -> Sample:
    """Return a random part of an image with the cell's aspect ratio, scaled to the cell."""
    (height, width), (cell_height, cell_width) = sample.size_hw, cell_hw
    scale = max(cell_height / height, cell_width / width) * rng.uniform(*zoom)
    window_hw = (min(max(round(cell_height / scale), 1), height), min(max(round(cell_width / scale), 1), width))
    left, top = int(rng.integers(width - window_hw[1] + 1)), int(rng.integers(height - window_hw[0] + 1))
    return cut(sample, (left, top), window_hw, cell_hw, min_area_px=min_area_px)


def _merged(sample: Sample, image: npt.NDArray[np.uint8], pieces: Sequence[Sample]) -> Sample:
    """Merge the objects of several samples into one image, the size of the first sample.

    The result is labelled for the classes that all samples are labelled for.
    """
    labelled = [piece.labelled for piece in pieces if piece.labelled is not None]
    return replace(
        sample,
        labelled=frozenset.intersection(*labelled) if labelled else None,
        image=image,
        boxes_xywh=np.concatenate([piece.boxes_xywh for piece in pieces]),
        categories=np.concatenate([piece.categories for piece in pieces]),
        areas=np.concatenate([piece.areas for piece in pieces]),
        iscrowd=np.concatenate([piece.iscrowd for piece in pieces]),
        ids=np.concatenate([piece.ids for piece in pieces]),
    )


def _overlaps(
    low: npt.NDArray[np.int64],
    high: npt.NDArray[np.int64],
    others_low: npt.NDArray[np.int64],
    others_high: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """Return a mask of the rectangles, given by corners (x, y), that share a pixel: [N, 2] and [M, 2] → [N, M]."""
    meet = (low[:, None] < others_high[None]) & (others_low[None] < high[:, None])
    return np.asarray(meet.all(axis=2))
