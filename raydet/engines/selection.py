"""Selection of an image's detections by score, class, mutual overlap and number.

torch is imported only to compare boxes, so that the driver can check class names without it.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from raydet.common.boxes import Boxes, xywh_to_xyxy
from raydet.common.errors import UserError
from raydet.config import Merge
from raydet.tables.schema import Category

if TYPE_CHECKING:
    from raydet.measuring.fitting.operating_point import FittedPoint
    from raydet.models.detector import Detections

LEAST_SCORE_OF_WHOLE = 0.5
"""In the merge of views: a box counts as part of another one if that has at least this fraction of its score."""
_MOST_NAMES_SHOWN = 100


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
    categories: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Go through boxes in descending score order and drop each that overlaps a kept one by more than `iou`.

    Args:
        boxes_xywh: Absolute pixels, [N, 4].
        scores: [N], descending; of equal scores the first has priority.
        iou: Threshold of the intersection over union, 0 to 1.
        categories: Category of each box, [N]; only boxes of the same category are compared. None compares all.

    Returns:
        Ascending indices of the boxes to keep.
    """
    import torch
    from torchvision.ops import batched_nms, nms

    corners, values = torch.from_numpy(xywh_to_xyxy(boxes_xywh)), torch.from_numpy(np.ascontiguousarray(scores))
    if categories is None:
        kept = nms(corners, values, iou)
    else:
        kept = batched_nms(corners, values, torch.from_numpy(np.ascontiguousarray(categories)), iou)
    # torchvision's order is not stable for equal scores; that of the indices is.
    return np.sort(kept.numpy())
