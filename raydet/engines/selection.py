"""Selection of an image's detections by score, class, mutual overlap and number.

torch is imported only to compare boxes, so that the driver can check class names without it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from raydet.common.boxes import Boxes, intersections, kept_of_pairs, xywh_to_xyxy
from raydet.common.errors import UserError
from raydet.config import Merge
from raydet.tables.schema import Category

if TYPE_CHECKING:
    from raydet.measuring.fitting.operating_point import FittedPoint
    from raydet.models.detector import Detections

LEAST_SCORE_OF_WHOLE = 0.5
"""In the merge of views: a box counts as part of another one if that has at least this fraction of its score."""
_MOST_NAMES_SHOWN = 100
_MOST_COMPARED = 20_000
"""Boxes that are compared each with each; of more, as large pictures have, only those near each other."""
_COMPARED_AT_ONCE = 64

Integers = npt.NDArray[np.int64]


def check_classes(classes: Sequence[str] | None, categories: Sequence[Category]) -> tuple[int, ...] | None:
    """Convert class names, as in `--classes`, to indices.

    Returns:
        Ascending indices of these classes; a name that several classes share has several. None for all.

    Raises:
        UserError: The list is empty or has a class that the model does not know.
    """
    if classes is None:
        return None
    names = [category.name for category in categories]
    shown = ", ".join(names[:_MOST_NAMES_SHOWN])
    if len(names) > _MOST_NAMES_SHOWN:
        shown += f" … and {len(names) - _MOST_NAMES_SHOWN} more"
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise UserError(f"--classes: the model has no class {', '.join(unknown)}; its classes are: {shown}")
    if not classes:
        raise UserError(f"--classes is empty; omit it to keep all classes, or choose from: {shown}")
    return tuple(index for index, name in enumerate(names) if name in classes)


def select(
    found: "Detections",
    *,
    score_threshold: float = 0.0,
    top_k: int | None = None,
    categories: Sequence[int] | None = None,
    class_agnostic_nms: float | None = None,
) -> "Detections":
    """Drop detections that were not requested.

    Args:
        found: Detections of one image, in descending score order.
        score_threshold: Detections at or below it are dropped.
        top_k: Number of the remaining detections to keep, the best ones; None keeps all.
        categories: Indices of the classes to keep; None keeps all.
        class_agnostic_nms: Of two boxes of any classes with an IoU above this, only the first is kept; None keeps
            both. Boxes of classes outside `categories`, or below the threshold, suppress nothing.

    Returns:
        The remaining detections in the same order; `found` itself if nothing is dropped.
    """
    wanted = found.scores > score_threshold
    if categories is not None:
        wanted &= np.isin(found.categories, np.asarray(categories, dtype=np.int64))
    kept = np.flatnonzero(wanted)
    if class_agnostic_nms is not None:
        kept = kept[non_maximum_suppression(found.boxes_xywh[kept], found.scores[kept], class_agnostic_nms)]
    kept = kept[:top_k]
    return found if len(kept) == len(found.scores) else found.take(kept)


def least_score_of_views(score_threshold: float, how: Merge) -> float:
    """Return a score such that detections of views at or below it do not change those above a threshold after `merge`.

    A weaker box than that neither suppresses a wanted one nor counts as the whole of which one is a part. Fusion
    averages boxes of any score.
    """
    return LEAST_SCORE_OF_WHOLE * score_threshold if how == "nms" else 0.0


def at_operating_point(found: "Detections", point: "FittedPoint") -> "Detections":
    """Return the detections that reach the threshold of their class, with calibrated scores, in descending order."""
    passing = found.take(np.flatnonzero(point.passes(found.scores, found.categories)))
    calibrated = dataclasses.replace(passing, scores=point.calibrated(passing.scores, passing.categories))
    return calibrated.take(np.argsort(-calibrated.scores, kind="stable"))


def non_maximum_suppression(
    boxes_xywh: Boxes,
    scores: npt.NDArray[np.float64],
    iou: float,
    categories: Integers | None = None,
) -> Integers:
    """Go through boxes in descending score order and drop each that overlaps a kept one by more than `iou`.

    Args:
        boxes_xywh: Absolute pixels, [N, 4].
        scores: [N], descending; of equal scores the first has priority.
        iou: Threshold of the intersection over union, 0 to 1.
        categories: Category of each box, [N]; only boxes of the same category are compared. None compares all.

    Returns:
        Ascending indices of the boxes to keep.
    """
    if len(scores) > _MOST_COMPARED:
        return _kept_among_neighbours(xywh_to_xyxy(boxes_xywh), iou, categories)
    import torch
    from torchvision.ops import batched_nms, nms

    corners, values = torch.from_numpy(xywh_to_xyxy(boxes_xywh)), torch.from_numpy(np.ascontiguousarray(scores))
    if categories is None:
        kept = nms(corners, values, iou)
    else:
        kept = batched_nms(corners, values, torch.from_numpy(np.ascontiguousarray(categories)), iou)
    # torchvision's order is not stable for equal scores; that of the indices is.
    return np.sort(kept.numpy())


def _kept_among_neighbours(boxes_xyxy: Boxes, iou: float, categories: Integers | None) -> Integers:
    """Return what torchvision returns, in a time that grows with the number of boxes instead of its square."""
    pairs = list(_overlapping_pairs(boxes_xyxy, iou, categories))
    better, worse = (np.concatenate([own[side] for own in pairs]) for side in (0, 1))
    order = np.argsort(better, kind="stable")
    return np.flatnonzero(kept_of_pairs(better[order], worse[order], len(boxes_xyxy)))


def _overlapping_pairs(
    boxes_xyxy: Boxes, iou: float, categories: Integers | None
) -> Iterator[tuple[Integers, Integers]]:
    """Yield, part by part, the pairs of boxes of a category that overlap by more than `iou`: better and worse one.

    Boxes are sorted into vertical strips as wide as the widest box, so that each can overlap only those of its own
    strip and of the next ones to both sides, and within a strip by their upper edges.
    """
    left, top, right, bottom = boxes_xyxy.T
    widest, highest = max(float((right - left).max()), 1.0), float((bottom - top).max())
    strips = np.floor((left - left.min()) / widest).astype(np.int64)
    order = np.lexsort((top, strips))
    strips_in_order = strips[order]
    for strip in np.unique(strips_in_order).tolist():
        start, middle, end = np.searchsorted(strips_in_order, (strip, strip + 1, strip + 2)).tolist()
        own, near = order[start:middle], order[start:end]
        near = near[np.argsort(top[near], kind="stable")]
        tops = top[near]
        for at in range(0, len(own), _COMPARED_AT_ONCE):
            part = own[at : at + _COMPARED_AT_ONCE]
            low, high = np.searchsorted(tops, (top[part[0]] - highest, bottom[part].max())).tolist()
            others = near[low:high]
            is_pair = _ious(boxes_xyxy[part], boxes_xyxy[others]) > iou
            # Each pair of the strip once; those with the next strip are only found here.
            is_pair &= (strips[others] > strip) | (part[:, None] < others)
            if categories is not None:
                is_pair &= categories[part][:, None] == categories[others]
            rows, columns = np.nonzero(is_pair)
            yield np.minimum(part[rows], others[columns]), np.maximum(part[rows], others[columns])


def _ious(boxes_xyxy: Boxes, other_xyxy: Boxes) -> Boxes:
    """Return the intersections over unions [N, M] in torchvision's order of operations; NaN for two empty boxes."""
    shared = intersections(boxes_xyxy[:, None], other_xyxy)
    areas, other_areas = ((own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1]) for own in (boxes_xyxy, other_xyxy))
    with np.errstate(invalid="ignore"):
        return np.asarray(shared / (areas[:, None] + other_areas - shared))
