"""Conversion between box formats, clipping, and area checks.

The suffix of a name states the format: ``xywh`` is COCO's (left, top, width, height), ``xyxy`` the corners, ``cxcywh``
the centre, width and height. Arrays are float64 [N, 4], in absolute pixels unless the name contains ``normalised``.
"""

import math

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.float64]


def as_boxes(boxes: object) -> Boxes:
    """Convert a list of boxes, possibly empty, to float64 [N, 4]."""
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def xywh_to_xyxy(boxes_xywh: Boxes) -> Boxes:
    """Convert (left, top, width, height) to (left, top, right, bottom), [N, 4]."""
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def xyxy_to_xywh(boxes_xyxy: Boxes) -> Boxes:
    """Convert (left, top, right, bottom) to (left, top, width, height), [N, 4]."""
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)


def _sides(size_hw: tuple[int, int]) -> Boxes:
    """Return width, height, width, height, [4]."""
    return np.array([size_hw[1], size_hw[0]] * 2, np.float64)


def xywh_to_normalised_cxcywh(boxes_xywh: Boxes, size_hw: tuple[int, int]) -> Boxes:
    """Convert pixel boxes [N, 4] (left, top, width, height) to normalised centre form, the target of DETR models.

    The size is that of the image in pixels, without padding.
    """
    centres = boxes_xywh[:, :2] + boxes_xywh[:, 2:] / 2
    return np.concatenate([centres, boxes_xywh[:, 2:]], axis=1) / _sides(size_hw)


def normalised_cxcywh_to_xywh(boxes_cxcywh: Boxes, size_hw: tuple[int, int]) -> Boxes:
    """Invert `xywh_to_normalised_cxcywh`, [N, 4] → [N, 4]."""
    boxes = boxes_cxcywh * _sides(size_hw)
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)


def clip_xywh(boxes_xywh: Boxes, size_hw: tuple[int, int]) -> Boxes:
    """Clip boxes to the image, [N, 4] → [N, 4]; a box entirely outside gets zero width or height."""
    limits, corners = _sides(size_hw), xywh_to_xyxy(boxes_xywh)
    clipped = np.clip(corners, 0.0, limits)
    inside = np.all((corners >= 0) & (corners <= limits), axis=1)
    # Boxes inside the image keep their exact values: (x + w) - x does not always equal w in floating point.
    return np.where(inside.reshape(-1, 1), boxes_xywh, xyxy_to_xywh(clipped))


def intersections(boxes_xyxy: Boxes, other_xyxy: Boxes) -> Boxes:
    """Return pairwise intersection areas in square pixels; the last axis of both arguments holds the corners."""
    width = np.minimum(boxes_xyxy[..., 2], other_xyxy[..., 2]) - np.maximum(boxes_xyxy[..., 0], other_xyxy[..., 0])
    height = np.minimum(boxes_xyxy[..., 3], other_xyxy[..., 3]) - np.maximum(boxes_xyxy[..., 1], other_xyxy[..., 1])
    return np.asarray(np.maximum(width, 0.0) * np.maximum(height, 0.0))


def kept_of_pairs(better: npt.NDArray[np.int64], worse: npt.NDArray[np.int64], num_boxes: int) -> npt.NDArray[np.bool_]:
    """Return which boxes remain if each that remains drops the worse ones that it overlaps: greedy suppression.

    Args:
        better: Index of the better box of each overlapping pair, [P], best first, so that each is decided at its turn.
        worse: Index of the worse one, [P].
        num_boxes: Number of boxes.
    """
    is_kept = np.ones(num_boxes, np.bool_)
    for first, second in zip(better.tolist(), worse.tolist(), strict=True):
        if is_kept[first]:
            is_kept[second] = False
    return is_kept


def has_area(boxes_xywh: Boxes) -> npt.NDArray[np.bool_]:
    """Return a mask of the boxes that are finite and have positive width and height, [N]."""
    finite = np.isfinite(boxes_xywh).all(axis=1)
    return np.asarray(finite & (boxes_xywh[:, 2] > 0) & (boxes_xywh[:, 3] > 0))


def enclosing_xywh(
    box_xywh: tuple[float, float, float, float], degrees: float, pivot: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Return the upright box around a rotated one; without rotation, exactly the same box.

    Args:
        box_xywh: Box before the rotation, absolute pixels.
        degrees: Clockwise rotation, as seen on the image.
        pivot: Point (x, y) that the rotation leaves in place, absolute pixels.
    """
    if degrees % 360 == 0:
        return box_xywh
    left, top, width, height = box_xywh
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    offsets = [(x - pivot[0], y - pivot[1]) for x in (left, left + width) for y in (top, top + height)]
    xs = [pivot[0] + x * cosine - y * sine for x, y in offsets]
    ys = [pivot[1] + x * sine + y * cosine for x, y in offsets]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
