"""Box formats: convert, clip, drop what has no area.

Formats, by the end of a name: ``xywh`` is COCO's (left, top, width, height), ``xyxy`` the corners, ``cxcywh`` the
centre with width and height. Arrays are float64 of shape [N, 4], in absolute pixels unless the name says
``normalised``.
"""

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.float64]


def as_boxes(boxes: object) -> Boxes:
    """Turns a list of boxes, possibly empty, into float64 [N, 4]."""
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def xywh_to_xyxy(boxes_xywh: Boxes) -> Boxes:
    """(left, top, width, height) → (left, top, right, bottom), [N, 4]."""
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def xyxy_to_xywh(boxes_xyxy: Boxes) -> Boxes:
    """(left, top, right, bottom) → (left, top, width, height), [N, 4]."""
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)


def xywh_to_normalised_cxcywh(boxes_xywh: Boxes, size_hw: tuple[int, int]) -> Boxes:
    """Pixels (left, top, width, height) → centre form in parts of the image, which is what DETR models learn.

    Args:
        boxes_xywh: Absolute pixels, [N, 4].
        size_hw: Height and width in pixels of the image itself, not of its padding.
    """
    height, width = size_hw
    scale = np.array([width, height, width, height], dtype=np.float64)
    centres = boxes_xywh[:, :2] + boxes_xywh[:, 2:] / 2
    return np.concatenate([centres, boxes_xywh[:, 2:]], axis=1) / scale


def normalised_cxcywh_to_xywh(boxes_cxcywh: Boxes, size_hw: tuple[int, int]) -> Boxes:
    """Invert `xywh_to_normalised_cxcywh`, [N, 4] → [N, 4]."""
    height, width = size_hw
    boxes = boxes_cxcywh * np.array([width, height, width, height], dtype=np.float64)
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)


def clip_xywh(boxes_xywh: Boxes, size_hw: tuple[int, int]) -> Boxes:
    """Cuts boxes to the image; a box that lies wholly outside is left with no width or no height. [N, 4] → [N, 4]."""
    height, width = size_hw
    limits = np.array([width, height, width, height], dtype=np.float64)
    clipped = np.clip(xywh_to_xyxy(boxes_xywh), 0.0, limits)
    corners = xywh_to_xyxy(boxes_xywh)
    inside = np.all((corners >= 0) & (corners <= limits), axis=1)
    # A box inside keeps its exact numbers: (x + w) - x is not always w in floating point.
    return np.where(inside.reshape(-1, 1), boxes_xywh, xyxy_to_xywh(clipped))


def has_area(boxes_xywh: Boxes) -> npt.NDArray[np.bool_]:
    """Which boxes are finite and have a width and a height above zero, [N]."""
    finite = np.isfinite(boxes_xywh).all(axis=1)
    return np.asarray(finite & (boxes_xywh[:, 2] > 0) & (boxes_xywh[:, 3] > 0))
