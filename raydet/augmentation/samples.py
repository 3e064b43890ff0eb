"""Samples, an image with its boxes, and the geometric operations that all augmentations share.

Each function returns a new sample and leaves its arguments unchanged; the new image may be a view of the old one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from raydet.common.boxes import Boxes, as_boxes, clip_xywh, has_area
from raydet.models.geometry import BILINEAR, ResizeRule, SizeHW, resize
from raydet.tables.schema import LABELLED_COLUMN

# One image is too little work for several threads, and the workers already use all cores.
cv2.setNumThreads(0)

MIN_AREA_PX = 25.0
"""Minimum area of a box after augmentation, in pixels of the full-size image, as in the Hugging Face guide."""
FILL = 114
"""Grey value of a mosaic's empty tiles and of areas uncovered by an affine transform."""
MIN_VISIBLE = 0.25
"""Minimum visible share of a box after a crop; less would be hard to recognise."""
OVERSAMPLING = 1.5
"""Images are augmented at this multiple of the model's size, so that a crop to two thirds loses no detail."""
_WORTHWHILE = 0.5


@dataclass(frozen=True)
class WorkingSize:
    """Size at which images are augmented, derived from the size to which the model's resize brings them.

    Attributes:
        rule: The model's resize; where its size changes between steps, the largest.
        oversampling: Multiple of the model's size.
    """

    rule: ResizeRule
    oversampling: float = OVERSAMPLING

    def least_hw(self, size_hw: SizeHW) -> SizeHW:
        """Return the height and width in pixels that an image of this size needs."""
        height, width = self.rule.target_size_hw(size_hw)
        return math.ceil(self.oversampling * height), math.ceil(self.oversampling * width)

    def fitted_hw(self, size_hw: SizeHW) -> SizeHW:
        """Return the size, of the same shape, at which both sides have what they need.

        An image keeps its size if less than half of its pixels would be saved: shrinking it costs more than it gains.
        """
        scale = max(needed / side for needed, side in zip(self.least_hw(size_hw), size_hw, strict=True))
        if scale**2 > _WORTHWHILE:
            return size_hw
        return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))


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
        min_area_px: Boxes with less area after an augmentation are dropped; in square pixels of this image, which may
            be smaller than its source.
        labelled: Classes that the image is labelled for; None for all.
    """

    image: npt.NDArray[np.uint8]
    boxes_xywh: Boxes
    categories: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float64]
    iscrowd: npt.NDArray[np.bool_]
    ids: npt.NDArray[np.int64]
    min_area_px: float = MIN_AREA_PX
    labelled: frozenset[int] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.boxes_xywh), len(self.categories), len(self.areas), len(self.iscrowd), len(self.ids)}
        assert len(lengths) == 1, f"every box needs one category, area, crowd flag and id; got lengths {lengths}"

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[0], self.image.shape[1]


def sample_of(image: npt.NDArray[np.uint8], row: Mapping[str, Any]) -> Sample:
    """Build a sample from a decoded image and its row in an images table, with or without `labelled_categories`."""
    objects, labelled = row["objects"], row.get(LABELLED_COLUMN)
    return Sample(
        image,
        as_boxes(objects["bbox"]),
        np.asarray(objects["category"], np.int64),
        np.asarray(objects["area"], np.float64),
        np.asarray(objects["iscrowd"], bool),
        np.asarray(objects["id"], np.int64),
        labelled=None if labelled is None else frozenset(labelled),
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
    old, new, areas = area_of(sample.boxes_xywh[rows]), area_of(boxes_xywh), sample.areas[rows]
    # An area equal to its box's area stays exactly equal, despite rounding.
    scaled = np.where(areas == old, new, areas * np.divide(new, old, out=np.ones_like(new), where=old > 0))
    return replace(
        sample,
        image=image,
        boxes_xywh=boxes_xywh,
        categories=sample.categories[rows],
        areas=scaled,
        iscrowd=sample.iscrowd[rows],
        ids=sample.ids[rows],
    )


def chosen(sample: Sample, is_chosen: npt.NDArray[np.bool_]) -> Sample:
    """Keep some of a sample's objects, by a mask [N]."""
    return moved(sample, sample.image, sample.boxes_xywh[is_chosen], np.flatnonzero(is_chosen))


def clipped(sample: Sample) -> Sample:
    """Clip boxes to the image and drop those without area."""
    boxes_xywh = clip_xywh(sample.boxes_xywh, sample.size_hw)
    rows = np.flatnonzero(has_area(boxes_xywh))
    return moved(sample, sample.image, boxes_xywh[rows], rows)


def flip(sample: Sample) -> Sample:
    """Mirror a sample horizontally."""
    boxes_xywh = sample.boxes_xywh.copy()
    boxes_xywh[:, 0] = sample.size_hw[1] - boxes_xywh[:, 0] - boxes_xywh[:, 2]
    return replace(sample, image=sample.image[:, ::-1], boxes_xywh=boxes_xywh)


def shrunk(sample: Sample, size_hw: SizeHW) -> Sample:
    """Shrink an image; boxes and areas scale by the exact factor of each side."""
    if size_hw == sample.size_hw:
        return sample
    factors_xy = (size_hw[1] / sample.size_hw[1], size_hw[0] / sample.size_hw[0])
    return rescaled(sample, resize(sample.image, size_hw, BILINEAR), factors_xy)


def rescaled(sample: Sample, image: npt.NDArray[np.uint8], factors_xy: tuple[float, float]) -> Sample:
    """Move the objects to the same image in another size.

    Args:
        sample: Source of the objects.
        image: The image in its new size.
        factors_xy: New pixels per old pixel, in x and y.
    """
    boxes_xywh = sample.boxes_xywh * np.array(factors_xy * 2)
    result = moved(sample, image, boxes_xywh, np.arange(len(sample.ids)))
    return replace(result, min_area_px=sample.min_area_px * factors_xy[0] * factors_xy[1])


def cut(
    sample: Sample,
    left_top: tuple[int, int],
    window_hw: SizeHW,
    size_hw: SizeHW | None = None,
    *,
    fill: int = FILL,
    min_visible: float = MIN_VISIBLE,
    min_area_px: float | None = None,
) -> Sample:
    """Take a window of an image and optionally resize it; a part of the window outside of the image is filled.

    Boxes with less than `min_visible` of their area in the window, or less than `min_area_px` of area in the result,
    are dropped; the others are clipped to the window.

    Args:
        sample: Sample to cut from.
        left_top: Upper left corner of the window in pixels of the image; may be negative.
        window_hw: Height and width of the window in pixels; it must meet the image.
        size_hw: Height and width of the result; the window's size by default.
        fill: Grey value of what lies outside of the image.
        min_visible: Minimum visible share of a box.
        min_area_px: Minimum visible area of a box in square pixels of the result; by default that of the sample.
    """
    size_hw = size_hw or window_hw
    spans = [
        _span(start, length, side, new_length)
        for start, length, side, new_length in zip(left_top[::-1], window_hw, sample.size_hw, size_hw, strict=True)
    ]
    (top, bottom, new_top, new_bottom), (left, right, new_left, new_right) = spans
    new_hw = (new_bottom - new_top, new_right - new_left)
    image = resize(sample.image[top:bottom, left:right], new_hw, BILINEAR)
    if new_hw != size_hw:
        canvas = np.full((*size_hw, 3), fill, np.uint8)
        canvas[new_top:new_bottom, new_left:new_right] = image
        image = canvas
    # The boxes follow the pixels: where a side of the part was rounded, so is its factor.
    factors_xy = np.array([new_hw[1] / (right - left), new_hw[0] / (bottom - top)] * 2)
    boxes_xywh = (sample.boxes_xywh - np.array([left, top, 0, 0], np.float64)) * factors_xy
    boxes_xywh += np.array([new_left, new_top, 0, 0], np.float64)
    areas, visible_xywh = area_of(boxes_xywh), clip_xywh(boxes_xywh, size_hw)
    visible = area_of(visible_xywh)
    is_kept = has_area(visible_xywh) & (visible >= min_visible * areas)
    rows = np.flatnonzero(is_kept & (visible >= (sample.min_area_px if min_area_px is None else min_area_px)))
    return moved(sample, image, visible_xywh[rows], rows)


def _span(start: int, length: int, side: int, new_length: int) -> tuple[int, int, int, int]:
    """Return the part of a window's side that lies in the image, and its place in the result."""
    first, last = max(start, 0), min(start + length, side)
    assert first < last, "the window lies outside of the image"
    scale = new_length / length
    new_first, new_last = (round((place - start) * scale) for place in (first, last))
    if new_first == new_last:
        new_first = min(new_first, new_length - 1)
        new_last = new_first + 1
    return first, last, new_first, new_last


def area_of(boxes_xywh: Boxes) -> npt.NDArray[np.float64]:
    """Return the areas of boxes [N, 4] in square pixels, [N]."""
    return np.asarray(boxes_xywh[:, 2] * boxes_xywh[:, 3])
