"""Samples and geometric operations on them: mosaic, mixup, copies of small objects, crop, flip.

Each function returns a new sample and leaves its arguments unchanged; the new image may be a view of the old one. Boxes
of which a crop leaves too little visible are dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from raydet.common.boxes import Boxes, as_boxes, clip_xywh, has_area

# One image is too little work for several threads, and the workers already use all cores.
cv2.setNumThreads(0)

MIN_AREA_PX = 25.0
"""Minimum area of a box after augmentation, as in the Hugging Face guide."""
MIN_VISIBLE = 0.25
"""Minimum visible share of a box after a crop; less would be hard to recognise."""
FILL = 114
"""Grey value for a mosaic's empty tiles and the areas uncovered by an affine transform."""
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
# DETR's recipe: an image is scaled to one of these short sides, and the sides of its crop are in this range, in pixels.
_DETR_SHORT_SIDES = (400, 500, 600)
_DETR_CROP = (384, 600)


@dataclass(frozen=True)
class Sample:
    """An image with its boxes; row i of each array belongs to box i.

    Attributes:
        image: uint8 RGB, [H, W, 3].
        boxes_xywh: Absolute pixels, float64 [N, 4].
        categories: Category indices, int64 [N].
        areas: Areas of the objects in square pixels, which may be smaller than their boxes, float64 [N].
        iscrowd: True if a box covers many objects, bool [N].
        ids: Annotation ids, int64 [N]; a copied object keeps the id of its original.
    """

    image: npt.NDArray[np.uint8]
    boxes_xywh: Boxes
    categories: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float64]
    iscrowd: npt.NDArray[np.bool_]
    ids: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        lengths = {len(self.boxes_xywh), len(self.categories), len(self.areas), len(self.iscrowd), len(self.ids)}
        assert len(lengths) == 1, f"every box needs one category, area, crowd flag and id; got lengths {lengths}"

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[0], self.image.shape[1]


def sample_of(image: npt.NDArray[np.uint8], objects: Mapping[str, Any]) -> Sample:
    """Build a sample from a decoded image and the `objects` of its row in an images table."""
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
    """Images to mix with another image; unreadable ones are omitted.

    Attributes:
        mosaic: Up to three images for the other tiles; empty disables the mosaic.
        mixup: One image to blend in; empty disables mixup.
    """

    mosaic: tuple[Sample, ...] = ()
    mixup: tuple[Sample, ...] = ()


def moved(sample: Sample, image: npt.NDArray[np.uint8], boxes_xywh: Boxes, rows: npt.NDArray[np.int64]) -> Sample:
    """Move a sample's objects to a new image; object areas scale with their boxes.

    Args:
        sample: Source of the objects.
        image: The new image.
        boxes_xywh: Visible parts of the boxes in pixels of the new image, [M, 4].
        rows: Row of the sample for each of these boxes, [M].
    """
    old, new, areas = _area(sample.boxes_xywh[rows]), _area(boxes_xywh), sample.areas[rows]
    # An area equal to its box's area stays exactly equal, despite rounding.
    scaled = np.where(areas == old, new, areas * np.divide(new, old, out=np.ones_like(new), where=old > 0))
    return Sample(image, boxes_xywh, sample.categories[rows], scaled, sample.iscrowd[rows], sample.ids[rows])


def clipped(sample: Sample) -> Sample:
    """Clip boxes to the image and drop those without area."""
    boxes_xywh = clip_xywh(sample.boxes_xywh, sample.size_hw)
    rows = np.flatnonzero(has_area(boxes_xywh))
    return moved(sample, sample.image, boxes_xywh[rows], rows)


def flip(sample: Sample) -> Sample:
    """Mirror a sample horizontally."""
    boxes_xywh = sample.boxes_xywh.copy()
    boxes_xywh[:, 0] = sample.size_hw[1] - boxes_xywh[:, 0] - boxes_xywh[:, 2]
    return Sample(sample.image[:, ::-1], boxes_xywh, sample.categories, sample.areas, sample.iscrowd, sample.ids)


def cut(
    sample: Sample, left_top: tuple[int, int], window_hw: tuple[int, int], size_hw: tuple[int, int] | None = None
) -> Sample:
    """Crop a window and optionally resize it.

    Boxes with less than `MIN_VISIBLE` of their area in the window, or less than `MIN_AREA_PX` of area in the result,
    are dropped; the others are clipped to the window.

    Args:
        sample: Sample to crop.
        left_top: Upper left corner of the window in pixels, inside the image.
        window_hw: Height and width of the window in pixels.
        size_hw: Height and width of the result; the window's size by default.
    """
    (left, top), (height, width) = left_top, window_hw
    image = sample.image[top : top + height, left : left + width]
    boxes_xywh = sample.boxes_xywh - np.array([left, top, 0, 0], np.float64)
    if size_hw is not None and size_hw != window_hw:
        shrinks = size_hw[0] * size_hw[1] < height * width
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = np.asarray(cv2.resize(np.ascontiguousarray(image), size_hw[::-1], interpolation=method), np.uint8)
        boxes_xywh = boxes_xywh * (np.array([size_hw[1], size_hw[0]] * 2) / np.array([width, height] * 2))
    areas, visible_xywh = _area(boxes_xywh), clip_xywh(boxes_xywh, (image.shape[0], image.shape[1]))
    visible = np.where(has_area(visible_xywh), _area(visible_xywh), 0.0)
    rows = np.flatnonzero((visible >= MIN_VISIBLE * areas) & (visible >= MIN_AREA_PX))
    return moved(sample, image, visible_xywh[rows], rows)


def detr_crop(sample: Sample, rng: np.random.Generator) -> Sample:
    """Apply DETR's random crop: 384 to 600 pixels per side, at a short side of 400, 500 or 600 pixels.

    The image is not scaled here, since the model's resize follows; the crop selects the same part of the image.
    """
    scale = float(rng.choice(_DETR_SHORT_SIDES)) / min(sample.size_hw)
    sides, corner = [], []
    for side in sample.size_hw:
        scaled = side * scale
        length = rng.uniform(min(_DETR_CROP[0], scaled), min(_DETR_CROP[1], scaled)) / scale
        sides.append(min(max(round(length), 1), side))
        corner.append(int(rng.integers(side - sides[-1] + 1)))
    return cut(sample, (corner[1], corner[0]), (sides[0], sides[1]))


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
        piece = _tile(source, (tops[row + 1] - top, lefts[column + 1] - left), rng, zoom)
        canvas[top : tops[row + 1], left : lefts[column + 1]] = piece.image
        boxes_xywh = piece.boxes_xywh + np.array([left, top, 0, 0], np.float64)
        pieces.append(Sample(canvas, boxes_xywh, piece.categories, piece.areas, piece.iscrowd, piece.ids))
    return _merged(canvas, pieces)


def mixup(sample: Sample, partner: Sample, rng: np.random.Generator) -> Sample:
    """Blend two images; the objects of both are kept."""
    other = _tile(partner, sample.size_hw, rng)
    share = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
    image = cv2.addWeighted(np.ascontiguousarray(sample.image), share, other.image, 1 - share, 0.0)
    return _merged(np.asarray(image, np.uint8), [sample, other])


def copy_small(sample: Sample, rng: np.random.Generator) -> Sample:
    """Copy up to `MAX_COPIES` small objects, with their bounding rectangles, to positions without objects.

    Only objects whose rectangle overlaps no other box are candidates, so that no part of another object is copied.
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


def _tile(
    sample: Sample, cell_hw: tuple[int, int], rng: np.random.Generator, zoom: tuple[float, float] = TILE_ZOOM
) -> Sample:
    """Return a random part of an image with the cell's aspect ratio, scaled to the cell."""
    (height, width), (cell_height, cell_width) = sample.size_hw, cell_hw
    scale = max(cell_height / height, cell_width / width) * rng.uniform(*zoom)
    window_hw = (min(max(round(cell_height / scale), 1), height), min(max(round(cell_width / scale), 1), width))
    left, top = int(rng.integers(width - window_hw[1] + 1)), int(rng.integers(height - window_hw[0] + 1))
    return cut(sample, (left, top), window_hw, cell_hw)


def _merged(image: npt.NDArray[np.uint8], pieces: Sequence[Sample]) -> Sample:
    """Merge the objects of several samples into one image."""
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
    """Return a mask of the rectangles, given by corners (x, y), that share a pixel: [N, 2] and [M, 2] → [N, M]."""
    meet = (low[:, None] < others_high[None]) & (others_low[None] < high[:, None])
    return np.asarray(meet.all(axis=2))
