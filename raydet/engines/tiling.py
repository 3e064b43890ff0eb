"""The merge of the detections in an image's views (`views.py`) into one set of boxes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from raydet.common.boxes import Boxes, clip_xywh, has_area, intersections, xywh_to_xyxy, xyxy_to_xywh
from raydet.config import Merge
from raydet.engines.selection import LEAST_SCORE_OF_WHOLE, non_maximum_suppression
from raydet.engines.views import TileView
from raydet.models.detector import Detections
from raydet.models.geometry import SizeHW

BEST_OF_VIEW = 100
"""Number of boxes per view that take part in the merge, the best ones."""

# The box of a fragment ends near the edge that cuts it: within this many pixels plus this fraction of its own side.
_REACH_PX = 1.0
_REACH_OF_SIDE = 0.05
_LEAST_COVERED = 0.8

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def merge(
    views: Sequence[TileView],
    detections: Sequence[Detections],
    size_hw: SizeHW,
    *,
    how: Merge,
    iou: float,
    max_detections: int,
) -> Detections:
    """Merge the detections of an image's views.

    A box cut off by the edge of a tile is dropped if another window shows more of the object. Then, among overlapping
    boxes of a class, `nms` keeps the best and `wbf` averages them. An object that no window shows completely remains
    in parts, one per tile. To avoid this, make the overlap as wide as the objects or include the whole image, of which
    only boxes larger than the overlap are used.

    Args:
        views: Views of one image.
        detections: Detections in each view, in descending score order, in pixels of that view.
        size_hw: Height and width of the image in pixels.
        how: Greedy suppression, or weighted box fusion (Solovyev, Wang, Gabruseva 2019, arXiv 1910.13302).
        iou: Boxes of one class that overlap by more than this are one object.
        max_detections: Number of detections to keep, the best ones.

    Returns:
        Detections in descending score order, in pixels of the image and clipped to it. The detections of a single
        unmirrored view are returned unchanged.
    """
    if len(views) == 1 and not views[0].is_mirrored:
        return detections[0]
    found = _without_fragments(_gather(views, detections, size_hw, is_fused=how == "wbf", iou=iou), iou)
    if how == "nms":
        kept = non_maximum_suppression(found.boxes_xywh, found.scores, iou, found.categories)
        merged = Detections(found.boxes_xywh[kept], found.scores[kept], found.categories[kept])
    else:
        merged = _fuse(found, iou)
    clipped = Detections(clip_xywh(merged.boxes_xywh, size_hw), merged.scores, merged.categories)
    return clipped.take(np.flatnonzero(has_area(clipped.boxes_xywh))[:max_detections])


@dataclass(frozen=True)
class _Found:
    """The boxes of all views in pixels of the image, in descending score order.

    Attributes:
        boxes_xywh: [N, 4].
        scores: [N].
        categories: [N].
        views: Index of each box's view, [N].
        windows: Index of each box's window, which a view shares with its mirror image, [N].
        is_cut: True if an edge of the window inside the image cuts the box, [N].
        windows_xyxy: The windows, [W, 4].
        num_views: Number of views of each window, [W].
    """

    boxes_xywh: Boxes
    scores: Floats
    categories: Integers
    views: Integers
    windows: Integers
    is_cut: Flags
    windows_xyxy: Boxes
    num_views: Integers

    def take(self, kept: Integers | Flags) -> "_Found":
        by_box = ("boxes_xywh", "scores", "categories", "views", "windows", "is_cut")
        return replace(self, **{name: getattr(self, name)[kept] for name in by_box})


def _gather(
    views: Sequence[TileView], detections: Sequence[Detections], size_hw: SizeHW, *, is_fused: bool, iou: float
) -> _Found:
    """Convert the boxes of all views to pixels of the image."""
    number_of = {window: number for number, window in enumerate(dict.fromkeys(view.window_xyxy for view in views))}
    window_of_view = np.array([number_of[view.window_xyxy] for view in views])
    least_side = _shared_by_tiles(views)
    least_sides = [least_side if view.is_whole else 0.0 for view in views]
    best = [_best_of(*pair, is_fused=is_fused, iou=iou) for pair in zip(detections, least_sides, strict=True)]
    boxes = [_to_image(found.boxes_xywh, view) for found, view in zip(best, views, strict=True)]
    view_numbers = np.repeat(np.arange(len(views)), [len(found.scores) for found in best])
    scores = np.concatenate([found.scores for found in best])
    gathered = _Found(
        boxes_xywh=np.concatenate(boxes),
        scores=scores,
        categories=np.concatenate([found.categories for found in best]),
        views=view_numbers,
        windows=window_of_view[view_numbers],
        is_cut=np.concatenate([_is_cut(item, view, size_hw) for item, view in zip(boxes, views, strict=True)]),
        windows_xyxy=np.array(list(number_of), dtype=np.float64),
        num_views=np.bincount(window_of_view),
    )
    return gathered.take(np.argsort(-scores, kind="stable"))


def _shared_by_tiles(views: Sequence[TileView]) -> float:
    """Return the minimum overlap of tiles in pixels. A smaller object is complete in at least one tile."""
    tiles = [view for view in views if not view.is_whole]
    if not tiles:
        return 0.0
    starts = ({view.left for view in tiles}, {view.top for view in tiles})
    shared = [
        side - (later - earlier)
        for side, places in zip((tiles[0].width, tiles[0].height), starts, strict=True)
        for earlier, later in pairwise(sorted(places))
    ]
    return float(min(shared, default=0))


def _best_of(found: Detections, least_side: float, *, is_fused: bool, iou: float) -> Detections:
    """Select the boxes of one view that take part in the merge."""
    # Tiles show small objects whole and at a higher resolution than the whole image, whose coarse box, some pixels
    # off, would overlap too little to count as the same object.
    found = found.take(np.flatnonzero(found.boxes_xywh[:, 2:].max(axis=1, initial=0.0) >= least_side))
    # DETR proposes a fixed number of boxes, 300 or more for some families. Beyond the best, nearly all are noise, and
    # the cost of the merge grows with the square of their number.
    kept = np.arange(min(BEST_OF_VIEW, len(found.scores)))
    if is_fused:
        # The paper fuses boxes after suppression. DETR's are not suppressed, and weak duplicates would lower the mean
        # score.
        kept = non_maximum_suppression(found.boxes_xywh[kept], found.scores[kept], iou, found.categories[kept])
    return found.take(kept)


def _to_image(boxes_xywh: Boxes, view: TileView) -> Boxes:
    moved = boxes_xywh.copy()
    if view.is_mirrored:
        moved[:, 0] = view.width - boxes_xywh[:, 0] - boxes_xywh[:, 2]
    moved[:, :2] += (view.left, view.top)
    return moved


def _is_cut(boxes_xywh: Boxes, view: TileView, size_hw: SizeHW) -> Flags:
    """Find boxes, in pixels of the image, that reach an edge of their window that is not the image's border."""
    window_xyxy = np.array(view.window_xyxy)
    gaps = (xywh_to_xyxy(boxes_xywh) - window_xyxy) * (1, 1, -1, -1)
    reaches = _REACH_PX + _REACH_OF_SIDE * boxes_xywh[:, [2, 3, 2, 3]]
    is_inner = window_xyxy != (0, 0, size_hw[1], size_hw[0])
    return np.asarray(((gaps <= reaches) & is_inner).any(axis=1))


def _without_fragments(found: _Found, iou: float) -> _Found:
    """Drop parts of objects of which another window shows more."""
    boxes_xyxy = xywh_to_xyxy(found.boxes_xywh)
    is_fragment = np.zeros(len(boxes_xyxy), dtype=np.bool_)
    by_window = np.argsort(found.windows, kind="stable")
    starts = np.searchsorted(found.windows[by_window], np.arange(len(found.windows_xyxy) + 1))
    by_left = np.argsort(boxes_xyxy[:, 0])
    lefts, widest = boxes_xyxy[by_left, 0], found.boxes_xywh[:, 2].max(initial=0.0)
    for number, window_xyxy in enumerate(found.windows_xyxy):
        own = by_window[starts[number] : starts[number + 1]]
        cut = own[found.is_cut[own]]
        if not len(cut):
            continue
        # Others further to the left or right do not reach into the window.
        first, last = np.searchsorted(lefts, (window_xyxy[0] - widest, window_xyxy[2])).tolist()
        near = np.sort(by_left[first:last])
        # The model saw both boxes in one window and reported them as two objects.
        others = near[(found.windows[near] != number) & (intersections(boxes_xyxy[near], window_xyxy) > 0)]
        if len(others):
            is_fragment[cut] = _are_parts(found, boxes_xyxy, cut, others, window_xyxy, iou)
    return found.take(~is_fragment)


def _are_parts(
    found: _Found, boxes_xyxy: Boxes, cut: Integers, others: Integers, window_xyxy: Floats, iou: float
) -> Flags:
    """Find the `cut` boxes of a window that are parts of objects shown by `others`, boxes of other windows."""
    areas = found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3]
    # A weak box around a strong one is noise rather than the whole object.
    may_hold = (
        (found.categories[cut, None] == found.categories[others])
        & (areas[cut, None] < areas[others])
        & (found.scores[others] >= LEAST_SCORE_OF_WHOLE * found.scores[cut, None])
    )
    rows, columns = np.nonzero(may_hold)
    part, whole = cut[rows], others[columns]
    shared = intersections(boxes_xyxy[part], boxes_xyxy[whole])
    is_inside = (shared > 0) & (shared >= _LEAST_COVERED * areas[part])
    # A thin part that is a pixel off is not inside, but it matches the part of the object that the window shows.
    shown_xyxy = _within(boxes_xyxy[whole], window_xyxy)
    matched = intersections(boxes_xyxy[part], shown_xyxy)
    united = areas[part] + intersections(shown_xyxy, window_xyxy) - matched
    is_shown = ~found.is_cut[whole] & (matched > iou * united)
    is_part = np.zeros(len(cut), dtype=np.bool_)
    is_part[rows[is_inside | is_shown]] = True
    return is_part


def _within(boxes_xyxy: Boxes, window_xyxy: Floats) -> Boxes:
    """Clip boxes to a window that they intersect."""
    limits_low, limits_high = np.tile(window_xyxy[:2], 2), np.tile(window_xyxy[2:], 2)
    return np.clip(boxes_xyxy, limits_low, limits_high)


def _fuse(found: _Found, iou: float) -> Detections:
    """Fuse matching boxes into their mean, weighted by their scores (weighted box fusion).

    The score of a fused box is the mean score of its boxes times the fraction of the views of their windows that found
    it. A box found in only one of two mirrored views thus loses half of its score; other windows have no effect.
    """
    boxes_xyxy = xywh_to_xyxy(found.boxes_xywh)
    clusters, num_clusters = np.zeros(len(boxes_xyxy), dtype=np.int64), 0
    for category in np.unique(found.categories):
        members = np.flatnonzero(found.categories == category)
        numbers = _cluster(boxes_xyxy[members], found.scores[members], iou)
        clusters[members] = numbers + num_clusters
        num_clusters += int(numbers.max()) + 1
    weights = np.bincount(clusters, found.scores, num_clusters)
    weighted = found.scores[:, None] * boxes_xyxy
    fused_xyxy = np.stack([np.bincount(clusters, side, num_clusters) for side in weighted.T], axis=1) / weights[:, None]
    scores = weights / np.bincount(clusters, minlength=num_clusters)
    seen_by = np.unique(np.stack([clusters, found.views]), axis=1)
    shown_in = np.unique(np.stack([clusters, found.windows]), axis=1)
    num_seen = np.bincount(seen_by[0], minlength=num_clusters)
    num_possible = np.bincount(shown_in[0], found.num_views[shown_in[1]], num_clusters)
    scores *= num_seen / num_possible
    categories = np.zeros(num_clusters, dtype=np.int64)
    categories[clusters] = found.categories
    order = np.argsort(-scores, kind="stable")
    return Detections(xyxy_to_xywh(fused_xyxy)[order], scores[order], categories[order])


def _cluster(boxes_xyxy: Boxes, scores: Floats, iou: float) -> Integers:
    """Assign boxes of one class, in descending score order, to clusters.

    A box joins the cluster whose fused box it overlaps most, if by more than `iou`, or starts a new one.

    Returns:
        Cluster indices from 0, [N].
    """
    numbers = np.empty(len(boxes_xyxy), dtype=np.int64)
    sums, weights = np.zeros((4, len(boxes_xyxy))), np.zeros(len(boxes_xyxy))
    fused, areas = np.zeros((4, len(boxes_xyxy))), np.zeros(len(boxes_xyxy))
    num_clusters = 0
    for index, (box, score) in enumerate(zip(boxes_xyxy, scores, strict=True)):
        left, top, right, bottom = box
        # The width first: it rules out most clusters and makes the rest cheap.
        shared_width = np.minimum(fused[2, :num_clusters], right) - np.maximum(fused[0, :num_clusters], left)
        near = np.flatnonzero(shared_width > 0)
        shared_height = np.minimum(fused[3, near], bottom) - np.maximum(fused[1, near], top)
        shared = shared_width[near] * np.maximum(shared_height, 0.0)
        ious = shared / (areas[near] + (right - left) * (bottom - top) - shared)
        best = int(near[np.argmax(ious)]) if len(near) and ious.max() > iou else num_clusters
        num_clusters = max(num_clusters, best + 1)
        numbers[index] = best
        sums[:, best] += score * box
        weights[best] += score
        fused[:, best] = sums[:, best] / weights[best]
        areas[best] = (fused[2, best] - fused[0, best]) * (fused[3, best] - fused[1, best])
    return numbers
