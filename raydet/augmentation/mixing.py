"""Samples, and what makes one of several or of a part of one: mosaic, mixup, copies of small objects, crop, flip.

Every function takes samples and gives a new one; the arrays of what it was given are left as they are, and an image
may come back as a view of the old one. A box that a crop hides is dropped by the share of it that is still visible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from raydet.common.boxes import Boxes, as_boxes, clip_xywh, has_area

# One image is too little work to share among threads, and the workers fill the cores already.
cv2.setNumThreads(0)

MIN_AREA_PX = 25.0
"""Boxes smaller than this after augmentation are dropped, as the Hugging Face guide does."""
MIN_VISIBLE = 0.25
"""Boxes of which a crop leaves a smaller share are dropped: too little to be recognised."""
FILL = 114
"""Grey of a mosaic's empty tile and of what an affine transform uncovers."""
MOSAIC_CENTRE = (0.35, 0.65)
"""The four tiles of a mosaic meet between these shares of its width and of its height."""
TILE_ZOOM = (1.0, 1.5)
"""A tile is scaled to cover its cell, and then by a factor between these; what runs over is cut off."""
MIXUP_BETA = 8.0
"""The share of an image in a mixup is drawn from Beta(8, 8): near one half, so that both are to be seen."""
SMALL_SIDE = 0.1
"""An object is small below this side (the root of its area), as a share of the image's."""
MAX_COPIES = 4
"""Most copies of small objects that an image gets at once."""
_PLACING_TRIES = 10
# DETR's own numbers: an image is scaled to one of these short sides, and its crop measures this many pixels.
_DETR_SHORT_SIDES = (400, 500, 600)
_DETR_CROP = (384, 600)


@dataclass(frozen=True)
class Sample:
    """An image and its boxes; row i of each array belongs to box i.

    Attributes:
        image: uint8 RGB, [H, W, 3].
        boxes_xywh: Absolute pixels, float64 [N, 4].
        categories: Category indices, int64 [N].
        areas: Areas of the objects in pixels, which may be less than those of their boxes, float64 [N].
        iscrowd: Whether a box covers many objects, bool [N].
        ids: The annotations' own numbers, int64 [N]; a copied object keeps its original's.
    """

    image: npt.NDArray[np.uint8]
    boxes_xywh: Boxes
    categories: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float64]
    iscrowd: npt.NDArray[np.bool_]
    ids: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        lengths = {len(self.boxes_xywh), len(self.categories), len(self.areas), len(self.iscrowd), len(self.ids)}
        assert len(lengths) == 1, f"every box has one category, area, crowd flag and id; got {lengths} of them"

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[0], self.image.shape[1]


def sample_of(image: npt.NDArray[np.uint8], objects: Mapping[str, Any]) -> Sample:
    """A decoded image with the `objects` of its row in an images table."""
    return Sample(
        image,
        as_boxes(objects["bbox"]),
        np.asarray(objects["category"], np.int64),
        np.asarray(objects["area"], np.float64),
        np.asarray(objects["iscrowd"], bool),
        np.asarray(objects["id"], np.int64),
    )


@dataclass(frozen=True)
class Partners:
    """The other images that one is mixed with; those that cannot be read are left out.

    Attributes:
        mosaic: Up to three, which fill the other tiles; without any there is no mosaic.
        mixup: One that is blended in, or none.
    """

    mosaic: tuple[Sample, ...] = ()
    mixup: tuple[Sample, ...] = ()


def moved(sample: Sample, image: npt.NDArray[np.uint8], boxes_xywh: Boxes, rows: npt.NDArray[np.int64]) -> Sample:
    """A sample's objects in a new image; areas change as the areas of their boxes do.

    Args:
        sample: Where the objects come from.
        image: The new image.
        boxes_xywh: What is to be seen of them there, in its pixels, [M, 4].
        rows: Which row of the sample each of these boxes was, [M].
    """
    old, new, areas = _area(sample.boxes_xywh[rows]), _area(boxes_xywh), sample.areas[rows]
    # Where the area is that of the box it stays so exactly, whatever rounding there is.
    scaled = np.where(areas == old, new, areas * np.divide(new, old, out=np.ones_like(new), where=old > 0))
    return Sample(image, boxes_xywh, sample.categories[rows], scaled, sample.iscrowd[rows], sample.ids[rows])


def clipped(sample: Sample) -> Sample:
    """Cuts boxes to the image and leaves out those without area in it."""
    boxes_xywh = clip_xywh(sample.boxes_xywh, sample.size_hw)
    rows = np.flatnonzero(has_area(boxes_xywh))
    return moved(sample, sample.image, boxes_xywh[rows], rows)


def flip(sample: Sample) -> Sample:
    """Mirrors left and right."""
    boxes_xywh = sample.boxes_xywh.copy()
    boxes_xywh[:, 0] = sample.size_hw[1] - boxes_xywh[:, 0] - boxes_xywh[:, 2]
    return Sample(sample.image[:, ::-1], boxes_xywh, sample.categories, sample.areas, sample.iscrowd, sample.ids)


def cut(
    sample: Sample, left_top: tuple[int, int], window_hw: tuple[int, int], size_hw: tuple[int, int] | None = None
) -> Sample:
    """Cuts a window out and, on request, scales it.

    Boxes with less than `MIN_VISIBLE` of their area in the window, or less than `MIN_AREA_PX` left in the result, are
    dropped; the others are cut to the window.

    Args:
        sample: Where to cut.
        left_top: The window's corner in whole pixels, inside the image.
        window_hw: Its height and width in whole pixels.
        size_hw: Height and width to scale it to; the window's own by default.
    """
    (left, top), (height, width) = left_top, window_hw
    image = sample.image[top : top + height, left : left + width]
    boxes_xywh = sample.boxes_xywh - np.array([left, top, 0, 0], np.float64)
    if size_hw is not None and size_hw != window_hw:
        shrinks = size_hw[0] * size_hw[1] < height * width
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = np.asarray(cv2.resize(np.ascontiguousarray(image), size_hw[::-1], interpolation=method), np.uint8)
        boxes_xywh = boxes_xywh * (np.array([size_hw[1], size_hw[0]] * 2) / np.array([width, height] * 2))
    whole, visible_xywh = _area(boxes_xywh), clip_xywh(boxes_xywh, (image.shape[0], image.shape[1]))
    visible = np.where(has_area(visible_xywh), _area(visible_xywh), 0.0)
    rows = np.flatnonzero((visible >= MIN_VISIBLE * whole) & (visible >= MIN_AREA_PX))
    return moved(sample, image, visible_xywh[rows], rows)


def detr_crop(sample: Sample, rng: np.random.Generator) -> Sample:
    """DETR's random crop: after scaling to a short side of 400, 500 or 600, from 384 to 600 pixels a side.

    The scaling itself is left to the model's own resize, which follows: the crop is the same part of the image.
    """
    scale = float(rng.choice(_DETR_SHORT_SIDES)) / min(sample.size_hw)
    sides, corner = [], []
    for side in sample.size_hw:
        scaled = side * scale
        length = rng.uniform(min(_DETR_CROP[0], scaled), min(_DETR_CROP[1], scaled)) / scale
        sides.append(min(max(round(length), 1), side))
        corner.append(int(rng.integers(side - sides[-1] + 1)))
    return cut(sample, (corner[1], corner[0]), (sides[0], sides[1]))


def mosaic(sample: Sample, partners: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """Four images as the tiles of one, which has the first one's size.

    Args:
        sample: The image itself; its tile is drawn.
        partners: Up to three others; a tile for which there is none stays grey.
        rng: Draws where the tiles meet, which image is where, and which part of each is to be seen.
    """
    height, width = sample.size_hw
    if min(height, width) < 2:
        return sample
    middle_y = min(max(round(height * rng.uniform(*MOSAIC_CENTRE)), 1), height - 1)
    middle_x = min(max(round(width * rng.uniform(*MOSAIC_CENTRE)), 1), width - 1)
    tops, lefts = (0, middle_y, height), (0, middle_x, width)
    canvas = np.full((height, width, 3), FILL, np.uint8)
    pieces = []
    for cell, source in zip(rng.permutation(4)[: 1 + len(partners)], [sample, *partners], strict=True):
        row, column = divmod(int(cell), 2)
        top, left = tops[row], lefts[column]
        piece = _tile(source, (tops[row + 1] - top, lefts[column + 1] - left), rng)
        canvas[top : tops[row + 1], left : lefts[column + 1]] = piece.image
        boxes_xywh = piece.boxes_xywh + np.array([left, top, 0, 0], np.float64)
        pieces.append(Sample(canvas, boxes_xywh, piece.categories, piece.areas, piece.iscrowd, piece.ids))
    return _together(canvas, pieces)


def mixup(sample: Sample, partner: Sample, rng: np.random.Generator) -> Sample:
    """Two images blended; the objects of both count in full."""
    other = _tile(partner, sample.size_hw, rng)
    share = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
    image = cv2.addWeighted(np.ascontiguousarray(sample.image), share, other.image, 1 - share, 0.0)
    return _together(np.asarray(image, np.uint8), [sample, other])


def copy_small(sample: Sample, rng: np.random.Generator) -> Sample:
    """Copies up to `MAX_COPIES` small objects, with the rectangle around them, to where there is none yet.

    Only objects are copied whose rectangle touches no other box, since a part of another object would come along.
    """
    height, width = sample.size_hw
    low = np.floor(sample.boxes_xywh[:, :2]).astype(np.int64)
    high = np.ceil(sample.boxes_xywh[:, :2] + sample.boxes_xywh[:, 2:]).astype(np.int64)
    high = np.minimum(high, (width, height))
    alone = _overlaps(low, high, low, high).sum(axis=1) == 1
    is_small = np.sqrt(_area(sample.boxes_xywh)) < SMALL_SIDE * np.sqrt(height * width)
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
            if _overlaps(new_low, new_high, low, high).any():
                continue
            patch = sample.image[top:bottom, left:right]
            image[new_top : new_top + bottom - top, new_left : new_left + right - left] = patch
            low, high = np.concatenate([low, new_low]), np.concatenate([high, new_high])
            rows.append(int(row))
            boxes.append(sample.boxes_xywh[row] + np.array([new_left - left, new_top - top, 0, 0], np.float64))
            break
    return moved(sample, image, np.array(boxes), np.array(rows, np.int64))


def _tile(sample: Sample, cell_hw: tuple[int, int], rng: np.random.Generator) -> Sample:
    """A drawn part of an image with the cell's proportions, scaled to the cell."""
    (height, width), (cell_height, cell_width) = sample.size_hw, cell_hw
    scale = max(cell_height / height, cell_width / width) * rng.uniform(*TILE_ZOOM)
    window_hw = (min(max(round(cell_height / scale), 1), height), min(max(round(cell_width / scale), 1), width))
    left, top = int(rng.integers(width - window_hw[1] + 1)), int(rng.integers(height - window_hw[0] + 1))
    return cut(sample, (left, top), window_hw, cell_hw)


def _together(image: npt.NDArray[np.uint8], pieces: Sequence[Sample]) -> Sample:
    """The objects of several samples in one image."""
    return Sample(
        image,
        np.concatenate([piece.boxes_xywh for piece in pieces]),
        np.concatenate([piece.categories for piece in pieces]),
        np.concatenate([piece.areas for piece in pieces]),
        np.concatenate([piece.iscrowd for piece in pieces]),
        np.concatenate([piece.ids for piece in pieces]),
    )


def _area(boxes_xywh: Boxes) -> npt.NDArray[np.float64]:
    return np.asarray(boxes_xywh[:, 2] * boxes_xywh[:, 3])


def _overlaps(
    low: npt.NDArray[np.int64],
    high: npt.NDArray[np.int64],
    others_low: npt.NDArray[np.int64],
    others_high: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """Which rectangles, by their corners (x, y), share a pixel: [N, 2] and [M, 2] → [N, M]."""
    meet = (low[:, None] < others_high[None]) & (others_low[None] < high[:, None])
    return np.asarray(meet.all(axis=2))
