"""COCO's metrics over images that arrive in any order and in any number of parts.

`CocoAccumulator` accepts images one by one; states of several processes can be merged. `MatchesByClass` accepts parts
that are already matched and keeps them on disk, so only the detections of a few classes are in memory at a time.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raydet.common.boxes import Boxes, as_boxes
from raydet.measuring.numbers.matches import Matches, Protocol, bits_type, concatenate, from_bytes, to_bytes
from raydet.measuring.numbers.matching import match, stable_order
from raydet.measuring.numbers.metrics import (
    CocoResult,
    Judged,
    accumulate,
    count_truth,
    precision_and_recall,
    result_of,
)
from raydet.tables.columns import DetectionColumns, Flags, Floats, Integers, TruthColumns
from raydet.tables.schema import MAX_IMAGE_ID, Category

_FLUSH_IMAGES = 256
_FLUSH_DETECTIONS = 100_000
_STATE_MAGIC = b"raydet-coco-2\n"
_DETECTIONS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class ImageTruth:
    """Labelled boxes of one image.

    Attributes:
        boxes_xywh: Absolute pixels, float64 [N, 4].
        category: Category indices, int64 [N].
        area: Square pixels, which determine COCO's size class, float64 [N].
        iscrowd: True for a crowd; detections inside one do not count, bool [N].
        labelled: The classes that the image is labelled for; unmatched detections of others do not count, int64 [K].
            None for all.
    """

    boxes_xywh: Boxes
    category: Integers
    area: Floats
    iscrowd: Flags
    labelled: Integers | None = None


@dataclass(frozen=True)
class ImageDetections:
    """Detections in one image; of equal scores, the earlier detection is matched first.

    Attributes:
        boxes_xywh: Absolute pixels, float64 [M, 4].
        scores: Finite, higher is more confident, float64 [M].
        category: Category indices, int64 [M].
    """

    boxes_xywh: Boxes
    scores: Floats
    category: Integers


NO_DETECTIONS = ImageDetections(as_boxes([]), np.zeros(0), np.zeros(0, dtype=np.int64))


class CocoAccumulator:
    """Accumulator of images, added one by one, for COCO's metrics over all of them.

    The result depends neither on the order of the images nor on their distribution over accumulators. Within an image,
    the order of the detections breaks ties between equal scores, as in pycocotools.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        """Create an empty accumulator.

        Raises:
            ValueError: `categories` is empty.
        """
        if not categories:
            raise ValueError("COCO metrics require at least one category")
        self._categories = tuple(categories)
        self._pending: list[tuple[int, ImageTruth, ImageDetections]] = []
        self._num_pending_detections = 0
        self._seen: set[int] = set()
        self._num_detections = 0
        self._num_unreadable = 0
        self._parts: list[Matches] = []

    def add(self, image_id: int, truth: ImageTruth, detections: ImageDetections, *, unreadable: bool = False) -> None:
        """Add one image with all its boxes and all its detections; an unreadable one has none, and misses its boxes.

        Raises:
            ValueError: The image was added before, array lengths differ, a category index is out of range or a number
                is not finite.
        """
        self._check(image_id, truth, detections, unreadable)
        count = len(detections.scores)
        self._seen.add(int(image_id))
        self._pending.append((int(image_id), truth, detections))
        self._num_pending_detections += count
        self._num_detections += count
        self._num_unreadable += unreadable
        if len(self._pending) >= _FLUSH_IMAGES or self._num_pending_detections >= _FLUSH_DETECTIONS:
            self._flush()

    def _check(self, image_id: int, truth: ImageTruth, detections: ImageDetections, unreadable: bool) -> None:
        where = f"image {image_id}"
        if not 0 <= image_id < MAX_IMAGE_ID:
            raise ValueError(f"{where}: ids must be at least 0 and below 2**53")
        if image_id in self._seen:
            raise ValueError(f"{where} has already been added")
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
        image_ids = np.array([image_id for image_id, _, _ in self._pending], dtype=np.int64)
        truth = [item for _, item, _ in self._pending]
        detections = [item for _, _, item in self._pending]
        truth_columns = TruthColumns(
            image_ids=image_ids,
            starts=np.cumsum([0, *(len(item.category) for item in truth)]),
            boxes_xywh=as_boxes(np.concatenate([as_boxes([]), *(item.boxes_xywh for item in truth)])),
            category=np.concatenate([np.zeros(0, np.int64), *(item.category for item in truth)]),
            area=np.concatenate([np.zeros(0), *(item.area for item in truth)]),
            iscrowd=np.concatenate([np.zeros(0, bool), *(item.iscrowd for item in truth)]),
            labelled=pa.array([item.labelled for item in truth], pa.list_(pa.int64())),
        )
        detection_columns = DetectionColumns(
            starts=np.cumsum([0, *(len(item.category) for item in detections)]),
            boxes_xywh=as_boxes(np.concatenate([as_boxes([]), *(item.boxes_xywh for item in detections)])),
            scores=np.concatenate([np.zeros(0), *(item.scores for item in detections)]).astype(np.float64),
            category=np.concatenate([np.zeros(0, np.int64), *(item.category for item in detections)]),
        )
        self._parts.append(match(truth_columns, detection_columns, len(self._categories)))
        self._pending, self._num_pending_detections = [], 0

    def to_bytes(self) -> bytes:
        """Return the full state, for `merge` in another process that runs the same version of raydet."""
        header = {
            "categories": [[category.id, category.name] for category in self._categories],
            "num_detections": self._num_detections,
            "num_unreadable": self._num_unreadable,
        }
        encoded = json.dumps(header).encode()
        size = np.array([len(encoded)], dtype="<i8").tobytes()
        return _STATE_MAGIC + size + encoded + to_bytes(self.matches())

    def merge(self, state: bytes) -> None:
        """Add all images of another accumulator, given the state that its `to_bytes` returned.

        Raises:
            ValueError: The state is invalid, its categories differ, or an image is in both accumulators.
        """
        start = len(_STATE_MAGIC) + 8
        if not state.startswith(_STATE_MAGIC) or len(state) < start:
            raise ValueError("not the state of a CocoAccumulator of this version")
        header_end = start + int(np.frombuffer(state[start - 8 : start], dtype="<i8")[0])
        header = json.loads(state[start:header_end])
        categories = tuple(Category(id_, name) for id_, name in header["categories"])
        if categories != self._categories:
            raise ValueError("the states to merge have different categories")
        matches = from_bytes(state[header_end:])
        image_ids = matches.image_ids.tolist()
        both = self._seen.intersection(image_ids)
        if both:
            raise ValueError(f"{len(both)} images are in both states to merge, for example {min(both)}")
        self._seen.update(image_ids)
        self._num_detections += header["num_detections"]
        self._num_unreadable += header["num_unreadable"]
        self._parts.append(matches)

    def matches(self) -> Matches:
        """Return the matches of all images so far."""
        if self._pending or not self._parts:
            self._flush()
        self._parts = [concatenate(self._parts)]
        return self._parts[0]

    def result(self) -> CocoResult:
        """Compute the metrics over all images so far; more may be added afterwards."""
        counts = {"num_detections": self._num_detections, "num_unreadable": self._num_unreadable}
        return accumulate(self.matches(), self._categories, **counts)


class MatchesByClass:
    """Accumulator of matches of disjoint images; the metrics are bit-identical to those of matching in one piece.

    A detection takes 32 bytes on disk (under COCO's rules). In memory are the detections of as many classes as have
    four million together, or of one larger class.
    """

    def __init__(
        self, folder: Path, protocol: Protocol, num_classes: int, *, detections_at_once: int = _DETECTIONS_AT_ONCE
    ) -> None:
        """Create an empty accumulator with files in an empty folder, which the caller deletes.

        `num_classes` is 1 if they count as one. At most `detections_at_once` are in memory, unless one class has more.
        """
        self._folder, self._protocol, self._detections_at_once = folder, protocol, detections_at_once
        self._num_truth = np.zeros((len(protocol.areas), num_classes), dtype=np.int64)
        self._num_boxes = 0
        self._row_type = _row_type(protocol)
        self._files: list[tuple[Path, Integers]] = []
        self._lock = threading.Lock()

    def add(self, matches: Matches, places: Integers) -> None:
        """Add a part, given the rank of its image ids among all, int64 [I]; threads may call this concurrently."""
        order = stable_order(matches.detection_category.astype(np.int64))
        rows = np.empty(len(order), dtype=self._row_type)
        rows["image"] = places[matches.detection_image][order]
        for name in ("rank", "scores"):
            rows[name] = getattr(matches, name)[order]
        for name in ("true_positive", "ignored"):
            rows[name] = getattr(matches, name).T[order]
        counts = np.bincount(matches.detection_category, minlength=self._num_truth.shape[1])
        num_truth = count_truth(matches)
        with self._lock:
            path = self._folder / f"{len(self._files):06d}.rows"
            self._files.append((path, np.append(0, np.cumsum(counts))))
            self._num_truth += num_truth
            self._num_boxes += len(matches.truth_image)
        rows.tofile(path)

    def result(
        self, categories: Sequence[Category], *, num_images: int, num_detections: int, num_unreadable: int
    ) -> CocoResult:
        """Compute the metrics over all parts; counts are copied to the result."""
        curves = [precision_and_recall(*self._judged(first, last)) for first, last in self._ranges()]
        precision, recall = zip(*curves, strict=True)
        return result_of(
            np.concatenate(precision, axis=2),
            np.concatenate(recall, axis=1),
            self._protocol,
            categories,
            num_images=num_images,
            num_truth=self._num_boxes,
            num_detections=num_detections,
            num_unreadable=num_unreadable,
        )

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the first and last class (exclusive) of each range that is loaded into memory together."""
        num_classes = self._num_truth.shape[1]
        ends = sum((ends for _, ends in self._files), np.zeros(num_classes + 1, dtype=np.int64))
        first = 0
        while first < num_classes:
            last = int(np.searchsorted(ends, ends[first] + self._detections_at_once, side="right")) - 1
            last = min(max(last, first + 1), num_classes)
            yield first, last
            first = last

    def _judged(self, first: int, last: int) -> tuple[Judged, Integers]:
        pieces, categories = [np.zeros(0, self._row_type)], [np.zeros(0, np.int32)]
        for path, ends in self._files:
            begin, end = int(ends[first]), int(ends[last])
            pieces.append(np.fromfile(path, self._row_type, count=end - begin, offset=begin * self._row_type.itemsize))
            categories.append(np.repeat(np.arange(last - first, dtype=np.int32), np.diff(ends[first : last + 1])))
        rows, category = np.concatenate(pieces), np.concatenate(categories)
        # Parts arrive in any order; detections with equal scores are ordered by image.
        order = stable_order(rows["image"].astype(np.int64))
        columns = {name: rows[name][order].T for name in ("rank", "scores", "true_positive", "ignored")}
        judged = Judged(protocol=self._protocol, detection_category=category[order], **columns)
        return judged, self._num_truth[:, first:last]


def _row_type(protocol: Protocol) -> np.dtype[Any]:
    """Return the layout of a detection on disk; its class follows from its position."""
    sets = (bits_type(len(protocol.iou_thresholds)), (len(protocol.areas),))
    numbers = [("scores", np.float64), ("image", np.int32), ("rank", np.int32)]
    return np.dtype([*numbers, ("true_positive", *sets), ("ignored", *sets)])
