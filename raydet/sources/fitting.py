"""Fits a source's boxes to the image as it is: upright, inside its edges, with an area."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from raydet.boxes import Boxes, as_boxes, clip_xywh, has_area
from raydet.sources import SourceObjects

ROUNDING_PX = 1e-6
"""What runs out of the image by no more is cut, but not counted: a source's own arithmetic rounds."""


@dataclass(frozen=True)
class FittedObjects:
    """The table's `objects` of one image, and how many boxes were cut to the image and how many left out."""

    objects: dict[str, list[Any]]
    num_clipped: int
    num_dropped: int


def fit_objects(objects: SourceObjects, size_hw: tuple[int, int], *, turn: int = 1) -> FittedObjects:
    """Turns boxes upright, cuts them to the image and leaves out those without area or not finite.

    The area of a box that is cut is that of what is left if it was its box's before; else it stays as it is, but never
    above that of what is left.

    Args:
        objects: As the source has them.
        size_hw: Of the upright image; what normalised boxes are parts of.
        turn: The EXIF orientation, if the boxes were drawn on the unturned picture, else 1; only the quarter turns,
            5 to 8, change them.
    """
    height, width = size_hw
    scale = np.array([width, height, width, height]) if objects.is_normalised else np.ones(4)
    area_scale = float(height * width) if objects.is_normalised else 1.0
    given = _turn_xywh(as_boxes(objects.boxes_xywh) * scale, size_hw, turn)
    usable = has_area(given)
    fitted = clip_xywh(np.where(usable[:, None], given, 0.0), size_hw)
    kept = np.flatnonzero(has_area(fitted))
    result: dict[str, list[Any]] = {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
    num_clipped = 0
    for index in kept:
        area = objects.areas[index] * area_scale
        if (np.abs(fitted[index] - given[index]) > ROUNDING_PX).any():
            num_clipped += 1
            rest = float(fitted[index, 2] * fitted[index, 3])
            was_of_box = np.isclose(area, given[index, 2] * given[index, 3], rtol=1e-6)
            area = rest if was_of_box else min(area, rest)
        result["id"].append(objects.ids[index])
        result["bbox"].append(fitted[index].tolist())
        result["category"].append(objects.categories[index])
        result["area"].append(area)
        result["iscrowd"].append(objects.iscrowd[index])
    return FittedObjects(result, num_clipped, len(given) - len(kept))


def _turn_xywh(boxes_xywh: Boxes, size_hw: tuple[int, int], turn: int) -> Boxes:
    """Boxes on the file's unturned pixels → boxes on the upright image of `size_hw`, [N, 4]."""
    if turn < 5:
        return boxes_xywh
    upright_height, upright_width = size_hw
    left, top, width, height = boxes_xywh.T
    new_left = upright_width - top - height if turn in (6, 7) else top
    new_top = upright_height - left - width if turn in (7, 8) else left
    return np.stack([new_left, new_top, height, width], axis=1)
