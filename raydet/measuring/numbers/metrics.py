"""COCO's metrics, bit-identical to pycocotools.

`accumulate` computes precision, recall and their means from the result of `matching.match`, in pycocotools' order of
operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from raydet.measuring.numbers.matches import COCO, BitSets, Matches, Protocol, bits_at
from raydet.measuring.numbers.matching import descending_rank, stable_order
from raydet.measuring.numbers.precision import COCO_RECALLS, coco_precision, hits_needed, precision_at
from raydet.measuring.numbers.values import Block, MetricValue
from raydet.tables.columns import Floats, Integers
from raydet.tables.schema import Category


@dataclass(frozen=True)
class Metric:
    """Definition of a metric; `iou` is None for the mean over all thresholds."""

    name: str
    kind: Literal["precision", "recall"]
    iou: float | None
    area: str
    max_detections: int

    def with_value(self, value: float | None, category: str | None = None) -> MetricValue:
        """Return the metric with a measured value, over all classes or for one."""
        return MetricValue(
            metric=self.name,
            value=value,
            category=category,
            iou=self.iou,
            area=self.area,
            max_detections=self.max_detections,
        )


def metrics_of(protocol: Protocol) -> tuple[Metric, ...]:
    """Return the metrics of a protocol in COCO's order; for COCO itself, these are the twelve.

    AP50 and AP75 are included if the protocol has those thresholds. Size classes are named by their first letter.
    """
    (whole, _), *sizes = protocol.areas
    last = protocol.max_detections[-1]
    singled_out = [iou for iou in (0.5, 0.75) if iou in protocol.iou_thresholds]
    return (
        Metric("AP", "precision", None, whole, last),
        *(Metric(f"AP{iou * 100:.0f}", "precision", iou, whole, last) for iou in singled_out),
        *(Metric(f"AP{name[0]}", "precision", None, name, last) for name, _ in sizes),
        *(Metric(f"AR{limit}", "recall", None, whole, limit) for limit in protocol.max_detections),
        *(Metric(f"AR{name[0]}", "recall", None, name, last) for name, _ in sizes),
    )


METRICS = metrics_of(COCO)


class _Named:
    """Attribute for a metric by name; None if it is undefined or the protocol does not have it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, numbers: "CocoNumbers", owner: type) -> float | None:
        return numbers.values.get(self._name)


@dataclass(frozen=True, kw_only=True)
class CocoNumbers:
    """Metric values in [0, 1], None if undefined (no labelled box counts).

    Attributes:
        values: All metrics of the protocol by name, in the order of `metrics_of`. COCO's twelve are also attributes.
    """

    values: dict[str, float | None]

    AP, AP50, AP75, APs, APm, APl = (_Named() for _ in range(6))
    AR1, AR10, AR100, ARs, ARm, ARl = (_Named() for _ in range(6))


@dataclass(frozen=True, kw_only=True)
class CocoResult(CocoNumbers):
    """Metrics over all classes and by class, with the arrays they are computed from.

    Attributes:
        categories: Classes by index; empty if classes count as one.
        num_images: Number of images, with and without boxes.
        num_truth: Number of labelled boxes, crowds included.
        num_detections: Number of detections in the input, including those beyond the limit per image and class.
        num_unreadable: Number of images that the detector could not read; all their boxes count as missed.
        precision: As in pycocotools, at the last limit, [T thresholds, 101 recalls, class, A sizes, 1], -1 without
            truth; classes by index.
        recall: As in pycocotools, [T thresholds, class, A sizes, limit], -1 without truth.
    """

    categories: tuple[Category, ...]
    per_class: tuple[CocoNumbers, ...]
    num_images: int
    num_truth: int
    num_detections: int
    num_unreadable: int
    precision: Floats = field(repr=False, compare=False)
    recall: Floats = field(repr=False, compare=False)
    protocol: Protocol = COCO

    def blocks(self) -> tuple[Block, ...]:
        """Return the values over all classes, then those of each class."""
        named: list[tuple[str | None, dict[str, float | None]]] = [(None, self.values)]
        named += [(category.name, own.values) for category, own in zip(self.categories, self.per_class, strict=True)]
        return tuple(
            tuple(metric.with_value(values[metric.name], name) for metric in metrics_of(self.protocol))
            for name, values in named
        )


def accumulate(
    matches: Matches, categories: Sequence[Category], *, num_detections: int | None = None, num_unreadable: int = 0
) -> CocoResult:
    """Compute COCO's metrics over all images of `matches`, in one piece, bit-identical to pycocotools.

    The counts are copied to the result; `num_detections` are those in the input, if more than were matched.

    Raises:
        ValueError: `categories` do not fit `matches`.
    """
    if not matches.protocol.class_agnostic and len(categories) != matches.num_categories:
        raise ValueError(f"{len(categories)} categories for matches with {matches.num_categories}")
    precision, recall = precision_and_recall(matches, count_truth(matches))
    return result_of(
        precision,
        recall,
        matches.protocol,
        categories,
        num_images=len(matches.image_ids),
        num_truth=len(matches.truth_image),
        num_detections=len(matches.scores) if num_detections is None else num_detections,
        num_unreadable=num_unreadable,
    )


def result_of(
    precision: Floats,
    recall: Floats,
    protocol: Protocol,
    categories: Sequence[Category],
    *,
    num_images: int,
    num_truth: int,
    num_detections: int,
    num_unreadable: int,
) -> CocoResult:
    """Average the arrays of `precision_and_recall` for all classes; counts are copied to the result."""
    by_class = tuple(() if protocol.class_agnostic else categories)
    # pycocotools orders classes by the source's ids, and a mean in another order rounds differently.
    by_source_id = sorted(range(len(by_class)), key=lambda index: by_class[index].id) or [0]
    values: dict[str, float | None] = {}
    values_by_class: list[dict[str, float | None]] = [{} for _ in by_class]
    for metric in metrics_of(protocol):
        chosen = cells(precision, recall, protocol, metric)
        values[metric.name] = mean_of(chosen[..., by_source_id])
        # The values of a class are either all -1 or never -1.
        rows = np.ascontiguousarray(np.moveaxis(chosen, -1, 0)).reshape(chosen.shape[-1], -1)
        for own, value in zip(values_by_class, rows.mean(axis=1).tolist(), strict=bool(by_class)):
            own[metric.name] = None if value == -1 else value
    return CocoResult(
        values=values,
        categories=by_class,
        per_class=tuple(CocoNumbers(values=own) for own in values_by_class),
        num_images=num_images,
        num_truth=num_truth,
        num_detections=num_detections,
        num_unreadable=num_unreadable,
        precision=precision,
        recall=recall,
        protocol=protocol,
    )


def cells(precision: Floats, recall: Floats, protocol: Protocol, metric: Metric) -> Floats:
    """Return the array that a metric averages: [threshold, 101 recalls, class], for a recall [threshold, class]."""
    area = [name for name, _ in protocol.areas].index(metric.area)
    thresholds = slice(None)
    if metric.iou is not None:
        index = protocol.iou_thresholds.index(metric.iou)
        thresholds = slice(index, index + 1)
    if metric.kind == "precision":
        return precision[thresholds, :, :, area, 0]
    return recall[thresholds, :, area, protocol.max_detections.index(metric.max_detections)]


def mean_of(chosen: Floats) -> float | None:
    """Return the mean in pycocotools' order, ignoring -1; None if all values are -1."""
    defined = chosen[chosen > -1]
    return float(np.mean(defined)) if defined.size else None


def by_descending_score(matches: "Matches | Judged") -> Integers:
    """Return positions of the detections by class, descending score, ascending image id and rank, [D]."""
    ranks = descending_rank(matches.scores)
    return stable_order(matches.detection_category * (ranks.max(initial=0) + 1) + ranks)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Fields of `Matches` that determine the curves of some classes, numbered from 0; images in ascending id order."""

    protocol: Protocol
    detection_category: npt.NDArray[np.int32]
    scores: Floats
    rank: npt.NDArray[np.int32]
    true_positive: BitSets
    ignored: BitSets


def count_truth(matches: Matches) -> Integers:
    """Return the number of labelled boxes that count, by size and class, int64 [A, K]."""
    counted = (matches.truth_category[~ignored] for ignored in matches.truth_ignored)
    return np.array([np.bincount(category, minlength=matches.num_categories) for category in counted])


def precision_and_recall(judged: Matches | Judged, num_truth: Integers) -> tuple[Floats, Floats]:
    """Compute the arrays of pycocotools' `COCOeval.accumulate` for some classes, which are independent of each other.

    Returns:
        Precision at the last limit, [T, 101, K, A, 1], and recall, [T, K, A, limit]; -1 for a class without truth.
    """
    protocol, num_classes = judged.protocol, num_truth.shape[1]
    num_thresholds, limits = len(protocol.iou_thresholds), protocol.max_detections
    precision = np.full((len(protocol.areas), num_thresholds, num_classes, len(COCO_RECALLS)), -1.0)
    recall = np.full((num_thresholds, num_classes, len(protocol.areas), len(limits)), -1.0)
    order = by_descending_score(judged)
    category, rank = judged.detection_category[order], judged.rank[order]
    class_starts = np.searchsorted(category, np.arange(num_classes, dtype=np.int32))
    num_before = np.zeros(len(order) + 1, dtype=np.int64)
    for area, total in enumerate(num_truth):
        right, ignored = judged.true_positive[area][order], judged.ignored[area][order]
        known = np.flatnonzero(total)
        needed = hits_needed(total[known], COCO_RECALLS)
        for threshold in range(num_thresholds):
            hits = np.flatnonzero(bits_at(right, threshold))
            np.cumsum(~bits_at(ignored, threshold), out=num_before[1:])
            own = category[hits]
            num_judged = num_before[hits + 1] - num_before[class_starts[own]]
            num_hits = np.bincount(own, minlength=num_classes)
            at_hits = coco_precision(own, num_judged, num_hits)
            precision[area, threshold, known] = precision_at(at_hits, num_hits[known], needed)
            for index, limit in enumerate(limits):
                found = np.bincount(own[rank[hits] < limit], minlength=num_classes)
                recall[threshold, known, area, index] = found[known] / total[known]
    return precision.transpose(1, 3, 2, 0)[..., None], recall
