"""COCO's numbers, equal to pycocotools' to the last bit, from images that arrive in any order and in any parts.

`CocoAccumulator` matches images as they come and keeps only the outcome; states of several processes merge into one.
hotcoco does the matching and builds the precision and recall arrays; the means over them are taken here, in the order
in which pycocotools takes them.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import hotcoco
import numpy as np
import numpy.typing as npt

from raydet.boxes import Boxes, as_boxes
from raydet.schema import MAX_IMAGE_ID, Category

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

MAX_DETECTIONS = 100
"""COCO looks at this many detections of each class in an image, those of the highest scores."""

_AREAS = ("all", "small", "medium", "large")
_DETECTION_LIMITS = (1, 10, MAX_DETECTIONS)
_IOU_INDEX = {None: slice(None), 0.5: slice(0, 1), 0.75: slice(5, 6)}
_FLUSH_IMAGES = 256
_FLUSH_DETECTIONS = 100_000
_STATE_MAGIC = b"raydet-coco-1\n"


@dataclass(frozen=True)
class Metric:
    """One of COCO's twelve: its name and what it is taken over (`iou` None is the mean over .50:.05:.95)."""

    name: str
    kind: Literal["precision", "recall"]
    iou: float | None
    area: str
    max_detections: int


METRICS = (
    Metric("AP", "precision", None, "all", 100),
    Metric("AP50", "precision", 0.5, "all", 100),
    Metric("AP75", "precision", 0.75, "all", 100),
    Metric("APs", "precision", None, "small", 100),
    Metric("APm", "precision", None, "medium", 100),
    Metric("APl", "precision", None, "large", 100),
    Metric("AR1", "recall", None, "all", 1),
    Metric("AR10", "recall", None, "all", 10),
    Metric("AR100", "recall", None, "all", 100),
    Metric("ARs", "recall", None, "small", 100),
    Metric("ARm", "recall", None, "medium", 100),
    Metric("ARl", "recall", None, "large", 100),
)


@dataclass(frozen=True)
class ImageTruth:
    """The labelled boxes of one image.

    Attributes:
        boxes_xywh: Absolute pixels, float64 [N, 4].
        category: Category indices, int64 [N].
        area: Square pixels, by which COCO tells small from large, float64 [N].
        iscrowd: Whether the box stands for a crowd; a detection inside one counts neither way, bool [N].
    """

    boxes_xywh: Boxes
    category: Integers
    area: Floats
    iscrowd: Flags


@dataclass(frozen=True)
class ImageDetections:
    """The detections in one image; among equal scores the earlier one is matched first.

    Attributes:
        boxes_xywh: Absolute pixels, float64 [M, 4].
        scores: Any finite number, higher is surer, float64 [M].
        category: Category indices, int64 [M].
    """

    boxes_xywh: Boxes
    scores: Floats
    category: Integers


NO_DETECTIONS = ImageDetections(as_boxes([]), np.zeros(0), np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class CocoNumbers:
    """COCO's twelve numbers, in [0, 1], or -1 where there is nothing to measure (no truth box of that kind)."""

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float

    def numbers(self) -> dict[str, float]:
        """The twelve by their names, in COCO's order."""
        return {metric.name: getattr(self, metric.name) for metric in METRICS}


@dataclass(frozen=True)
class CocoResult(CocoNumbers):
    """The twelve numbers over all classes, and what they were made of.

    Attributes:
        categories: The classes, by their indices.
        per_class: The twelve numbers of each class.
        num_images: Images, with and without boxes.
        num_truth: Labelled boxes, crowds included.
        num_detections: Detections given, also those beyond the hundredth of an image and class.
        num_unreadable: Images that the detector could not read; all their boxes count as missed.
        precision: [10 IoU, 101 recalls, class, 4 areas, 3 limits], -1 where there is no truth; classes by index.
        recall: [10 IoU, class, 4 areas, 3 limits].
    """

    categories: tuple[Category, ...]
    per_class: tuple[CocoNumbers, ...]
    num_images: int
    num_truth: int
    num_detections: int
    num_unreadable: int
    precision: Floats = field(repr=False, compare=False)
    recall: Floats = field(repr=False, compare=False)

    def table_rows(self, run: str | None, model: str | None, split: str | None) -> list[dict[str, Any]]:
        """Rows of a `metrics` table: the twelve numbers over all classes, then those of each class.

        A number that is -1 (nothing to measure) becomes null.
        """
        over: list[tuple[str | None, CocoNumbers]] = [(None, self)]
        over += [(category.name, numbers) for category, numbers in zip(self.categories, self.per_class, strict=True)]
        return [
            {
                "run": run,
                "model": model,
                "split": split,
                "slice": None,
                "metric": metric.name,
                "iou": metric.iou,
                "area": metric.area,
                "max_detections": metric.max_detections,
                "category": name,
                "value": None if value == -1 else value,
                "low": None,
                "high": None,
            }
            for name, numbers in over
            for metric in METRICS
            for value in [numbers.numbers()[metric.name]]
        ]


@dataclass
class _Counts:
    images: int = 0
    truth: int = 0
    detections: int = 0
    unreadable: int = 0

    def add(self, images: int, truth: int, detections: int, unreadable: int) -> None:
        self.images += images
        self.truth += truth
        self.detections += detections
        self.unreadable += unreadable


class CocoAccumulator:
    """Takes images one by one and gives COCO's numbers over all of them.

    The numbers depend neither on the order of the images nor on how they were spread over accumulators; within an
    image, the order of the detections decides between equal scores, as in pycocotools.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        """Starts with no image.

        Raises:
            ValueError: There is no category.
        """
        if not categories:
            raise ValueError("COCO metrics need at least one category")
        self._categories = tuple(categories)
        self._streaming = hotcoco.StreamingEval([{"id": i, "name": c.name} for i, c in enumerate(categories)], "bbox")
        self._images: list[dict[str, int]] = []
        self._truth: list[dict[str, Any]] = []
        self._detections: list[Floats] = []
        self._num_pending_detections = 0
        self._seen: set[int] = set()
        self._counts = _Counts()
        self._merged_states: list[bytes] = []

    def add(
        self,
        image_id: int,
        size_hw: tuple[int, int],
        truth: ImageTruth,
        detections: ImageDetections,
        *,
        unreadable: bool = False,
    ) -> None:
        """Takes one image with all its boxes and all its detections.

        Args:
            image_id: 0 ≤ image_id < 2⁵³, each once.
            size_hw: Height and width in pixels; kept with the image, the numbers do not depend on it.
            truth: All labelled boxes of the image.
            detections: All detections in the image.
            unreadable: The image could not be read: it has no detections, and all its boxes count as missed.

        Raises:
            ValueError: An image that was there before, arrays that do not fit each other, an index that is no
                category, a number that is not finite.
        """
        self._check(image_id, truth, detections, unreadable)
        height, width = size_hw
        self._seen.add(int(image_id))
        self._images.append({"id": int(image_id), "width": int(width), "height": int(height)})
        columns = (truth.boxes_xywh, truth.category, truth.area, truth.iscrowd)
        for box_xywh, category, area, iscrowd in zip(*(column.tolist() for column in columns), strict=True):
            self._truth.append(
                {
                    # From 1 and unique within what is matched together: an id of 0 would read as "not matched".
                    "id": len(self._truth) + 1,
                    "image_id": int(image_id),
                    "category_id": category,
                    "bbox": box_xywh,
                    "area": area,
                    "iscrowd": int(iscrowd),
                }
            )
        count = len(detections.scores)
        if count:
            rows = np.empty((count, 7))
            rows[:, 0] = image_id
            rows[:, 1:5] = detections.boxes_xywh
            rows[:, 5] = detections.scores
            rows[:, 6] = detections.category
            self._detections.append(rows)
        self._num_pending_detections += count
        self._counts.add(1, len(truth.category), count, int(unreadable))
        if len(self._images) >= _FLUSH_IMAGES or self._num_pending_detections >= _FLUSH_DETECTIONS:
            self._flush()

    def _check(self, image_id: int, truth: ImageTruth, detections: ImageDetections, unreadable: bool) -> None:
        where = f"image {image_id}"
        if not 0 <= image_id < MAX_IMAGE_ID:
            raise ValueError(f"{where}: ids must be at least 0 and below 2**53")
        if image_id in self._seen:
            raise ValueError(f"{where} was added before")
        if unreadable and len(detections.scores):
            raise ValueError(f"{where} has detections although it could not be read")
        num_truth, num_detections = len(truth.category), len(detections.category)
        shapes = (truth.boxes_xywh.shape, truth.area.shape, truth.iscrowd.shape)
        if shapes != ((num_truth, 4), (num_truth,), (num_truth,)):
            raise ValueError(f"{where}: the arrays of the truth differ in length: {shapes}, {num_truth} categories")
        shapes = (detections.boxes_xywh.shape, detections.scores.shape, (num_detections,))
        if shapes != ((num_detections, 4), (num_detections,), (num_detections,)):
            raise ValueError(f"{where}: the arrays of the detections differ in length: {shapes}")
        for category in (truth.category, detections.category):
            if category.size and (category.min() < 0 or category.max() >= len(self._categories)):
                raise ValueError(f"{where} has a category that is not one of 0 … {len(self._categories) - 1}")
        for values in (truth.boxes_xywh, truth.area, detections.boxes_xywh, detections.scores):
            if not np.isfinite(values).all():
                raise ValueError(f"{where} has a box, area or score that is not a finite number")

    def _flush(self) -> None:
        if self._images:
            rows = np.concatenate(self._detections) if self._detections else np.zeros((0, 7))
            self._streaming.update(self._images, self._truth, rows)
        self._images, self._truth, self._detections, self._num_pending_detections = [], [], [], 0

    def to_bytes(self) -> bytes:
        """The whole state, for `merge` in another process that runs the same version of raydet."""
        header = {
            "categories": [[category.id, category.name] for category in self._categories],
            "counts": asdict(self._counts),
        }
        encoded = json.dumps(header).encode()
        image_ids = np.fromiter(self._seen, dtype="<i8", count=len(self._seen)).tobytes()
        sizes = np.array([len(encoded), len(image_ids)], dtype="<i8").tobytes()
        return _STATE_MAGIC + sizes + encoded + image_ids + self._merged().to_bytes()

    def merge(self, state: bytes) -> None:
        """Takes in all images of another accumulator, given as what its `to_bytes` returned.

        Raises:
            ValueError: It is no such state, it has other categories, or an image is in both.
        """
        start = len(_STATE_MAGIC) + 16
        if not state.startswith(_STATE_MAGIC) or len(state) < start:
            raise ValueError("not the state of a CocoAccumulator of this version")
        header_size, ids_size = (int(size) for size in np.frombuffer(state[start - 16 : start], dtype="<i8"))
        header = json.loads(state[start : start + header_size])
        categories = tuple(Category(id_, name) for id_, name in header["categories"])
        if categories != self._categories:
            raise ValueError("the states to be merged have different categories")
        image_ids = np.frombuffer(state[start + header_size : start + header_size + ids_size], dtype="<i8").tolist()
        both = self._seen.intersection(image_ids)
        if both:
            raise ValueError(f"{len(both)} images are in both of the states to be merged, such as {min(both)}")
        self._seen.update(image_ids)
        self._counts.add(**header["counts"])
        self._merged_states.append(state[start + header_size + ids_size :])

    def _merged(self) -> hotcoco.StreamingEval:
        """One new evaluator over all images; this object's own stays as it is."""
        self._flush()

        def parts() -> Iterable[hotcoco.StreamingEval]:
            yield self._streaming
            for state in self._merged_states:
                yield hotcoco.StreamingEval.from_bytes(state)

        return hotcoco.StreamingEval.merge(parts())

    def result(self) -> CocoResult:
        """The numbers over all images so far; more may be added afterwards."""
        num_classes = len(self._categories)
        evaluator = self._merged().finalize()
        evaluator.accumulate()
        arrays = evaluator.eval
        assert arrays is not None
        precision, recall = np.asarray(arrays["precision"]), np.asarray(arrays["recall"])
        # pycocotools puts classes in the order of the source's ids, and a mean in another order rounds differently.
        by_source_id = sorted(range(num_classes), key=lambda index: self._categories[index].id)
        return CocoResult(
            **_numbers(precision, recall, by_source_id).numbers(),
            categories=self._categories,
            per_class=tuple(_numbers(precision, recall, [index]) for index in range(num_classes)),
            num_images=self._counts.images,
            num_truth=self._counts.truth,
            num_detections=self._counts.detections,
            num_unreadable=self._counts.unreadable,
            precision=precision,
            recall=recall,
        )


def _numbers(precision: Floats, recall: Floats, classes: list[int]) -> CocoNumbers:
    """The twelve means over some classes, skipping what is -1, as in pycocotools' `summarize`."""
    values = {}
    for metric in METRICS:
        array = precision if metric.kind == "precision" else recall
        area, limit = _AREAS.index(metric.area), _DETECTION_LIMITS.index(metric.max_detections)
        chosen = array[_IOU_INDEX[metric.iou]][..., classes, area, limit]
        defined = chosen[chosen > -1]
        values[metric.name] = float(np.mean(defined)) if defined.size else -1.0
    return CocoNumbers(**values)


TRUE_POSITIVE, FALSE_POSITIVE, NOT_COUNTED = 1, 0, -1


def match_image(truth: ImageTruth, detections: ImageDetections, iou_threshold: float = 0.5) -> npt.NDArray[np.int8]:
    """Says of each detection of an image whether it is right, by COCO's greedy matching at one IoU threshold.

    By falling score each detection takes the free box of its class that it overlaps most. What is kept above any
    score is matched as if the rest were not there, so one matching serves all score thresholds.

    Returns:
        int8 [M]: TRUE_POSITIVE, FALSE_POSITIVE, or NOT_COUNTED for one that lies in a crowd or that comes after the
        hundredth of its class.
    """
    outcome = np.full(len(detections.scores), FALSE_POSITIVE, dtype=np.int8)
    order = np.argsort(-detections.scores, kind="stable")
    category = detections.category[order]
    iou = _iou(detections.boxes_xywh[order], truth.boxes_xywh, truth.iscrowd)
    overlaps = (iou >= iou_threshold) & (category[:, None] == truth.category)
    for repeated in np.unique(category) if len(order) > MAX_DETECTIONS else ():
        too_many = np.flatnonzero(category == repeated)[MAX_DETECTIONS:]
        outcome[order[too_many]] = NOT_COUNTED
        overlaps[too_many] = False
    rows, columns = np.nonzero(overlaps)
    is_free, iscrowd = (~truth.iscrowd).tolist(), truth.iscrowd.tolist()
    pairs = zip(rows.tolist(), columns.tolist(), iou[rows, columns].tolist(), strict=True)
    for row, own_pairs in itertools.groupby(pairs, key=lambda pair: pair[0]):
        best, best_iou, in_crowd = None, iou_threshold, False
        for _, column, overlap in own_pairs:
            in_crowd = in_crowd or iscrowd[column]
            # Of equal overlaps pycocotools takes the last.
            if is_free[column] and overlap >= best_iou:
                best, best_iou = column, overlap
        if best is not None:
            is_free[best] = False
            outcome[order[row]] = TRUE_POSITIVE
        elif in_crowd:
            outcome[order[row]] = NOT_COUNTED
    return outcome


def _iou(first_xywh: Boxes, second_xywh: Boxes, second_iscrowd: Flags) -> Floats:
    """Overlap of every first with every second box, [M, 4] × [N, 4] → [M, N]; over a crowd, as a part of the first."""
    first, second = first_xywh[:, None], second_xywh[None]
    ends = np.minimum(first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:])
    sides = np.maximum(ends - np.maximum(first[..., :2], second[..., :2]), 0.0)
    shared = sides[..., 0] * sides[..., 1]
    first_area = first[..., 2] * first[..., 3]
    union = np.where(second_iscrowd[None], first_area, first_area + second[..., 2] * second[..., 3] - shared)
    # Boxes without area overlap nothing, not even each other.
    iou: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
    return iou
