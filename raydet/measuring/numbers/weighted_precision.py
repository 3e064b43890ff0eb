"""COCO's AP of images that count more than once, or not at all, from the outcome of one matching.

Weights are what a resample or a part of a data set is: nothing is matched again, AP over weighted images is a few
sums and running maxima over what the matching left.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydet.measuring.numbers.matches import Matches, bits_at
from raydet.measuring.numbers.precision import COCO_RECALLS, envelope
from raydet.tables.columns import Flags, Floats, Integers

Counts = npt.NDArray[np.int32]

_CHUNK_ENTRIES = 150_000


class WeightedPrecision:
    """AP of some images, each counted as often as its weight says, for any number of weightings one after another.

    It holds about 60 bytes for each detection.
    """

    def __init__(self, matches: Matches) -> None:
        """Puts the outcome of the matching in the order in which AP is summed."""
        self._num_images = len(matches.image_ids)
        self.shape = (matches.num_categories, len(matches.protocol.areas), len(matches.protocol.iou_thresholds))
        self._chunks = tuple(_chunks(matches))

    def __call__(self, weights: npt.NDArray[np.integer]) -> Floats:
        """AP by class, size class and IoU threshold.

        Args:
            weights: How often each image counts, by rising image id, [I].

        Returns:
            float64 [K, A, T]; NaN where no labelled box counts. It equals pycocotools' AP (to rounding) on a data set
            with that many copies of each image; the copies of a detection stand beside each other.
        """
        copies: Counts = np.ascontiguousarray(weights, dtype=np.int32)
        if copies.shape != (self._num_images,):
            raise ValueError(f"{len(weights)} weights for {self._num_images} images")
        precision = np.empty(self.shape)
        for chunk in self._chunks:
            precision[chunk.classes] = chunk.average_precision(copies)
        return precision


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The classes of a range. A cell is a class and size class, a group a cell at one threshold.

    Attributes:
        classes: Which.
        shape: (A, T, classes): the order of the groups; that of the cells is the same without T.
        truth_image: Of the boxes that count, by cell, int32.
        truth_starts: By cell, [cells + 1].
        hit_image: Of the true positives, by group, in it by falling score, int32 [E].
        groups: Those that have a true positive.
        starts: Of these groups among the true positives; `lengths` their number of true positives.
        counted_image: Of the detections that count, as lists: of a cell those that count at every threshold, of a
            group those that count at this threshold but not at all; in each by class and falling score.
        always: For each true positive, where in the first list the detections up to it end; [E].
        sometimes: The same in the second list.
        always_starts: For each of the groups, where its class starts in the first list; `sometimes_starts` alike.
    """

    classes: slice
    shape: tuple[int, int, int]
    truth_image: Counts
    truth_starts: Integers
    hit_image: Counts
    groups: Integers
    starts: Integers
    lengths: Integers
    counted_image: Counts
    always: Counts
    sometimes: Counts
    always_starts: Integers
    sometimes_starts: Integers

    def average_precision(self, weights: Counts) -> Floats:
        """[classes, A, T]."""
        num_areas, num_thresholds, num_classes = self.shape
        num_truth = np.diff(_running(weights[self.truth_image])[self.truth_starts])
        sums = np.zeros(num_areas * num_thresholds * num_classes)
        if self.groups.size:
            sums[self.groups] = self._precision_sums(weights, num_truth)
        means = (sums / len(COCO_RECALLS)).reshape(self.shape)
        means[np.broadcast_to(num_truth.reshape(num_areas, 1, num_classes) == 0, self.shape)] = np.nan
        return means.transpose(2, 0, 1)

    def _precision_sums(self, weights: Counts, num_truth: Counts) -> Floats:
        """For each group the sum of the interpolated precisions over COCO's recalls.

        Precision is highest at a true positive, so only those are looked at: each is multiplied by the number of
        recalls that it is the first to reach.
        """
        hits, counted = _running(weights[self.hit_image]), _running(weights[self.counted_image])
        table, table_starts = _recalls_reached(num_truth)
        cells = self._cells_of_groups()
        found = hits[1:] - np.repeat(hits[self.starts], self.lengths)
        before = counted[self.always_starts] + counted[self.sometimes_starts]
        up_to = counted[self.always] + counted[self.sometimes] - np.repeat(before, self.lengths)
        precision = found / (up_to + np.spacing(1))
        # Two apart for each group, so that one running maximum from the right serves all of them.
        lowered = np.repeat(2.0 * np.arange(len(self.groups)), self.lengths)
        precision -= lowered
        best = envelope(precision) + lowered
        reached = table[found + np.repeat(table_starts[cells], self.lengths)]
        newly = np.diff(reached, prepend=0)
        newly[self.starts] = reached[self.starts]
        sums: Floats = np.add.reduceat(best * newly, self.starts)
        return sums

    def _cells_of_groups(self) -> Integers:
        _, num_thresholds, num_classes = self.shape
        area, rest = np.divmod(self.groups, num_thresholds * num_classes)
        cells: Integers = area * num_classes + rest % num_classes
        return cells


def _running(weights: Counts) -> Counts:
    """Running sums that start with 0, [n] → [n + 1]."""
    sums = np.zeros(len(weights) + 1, dtype=np.int32)
    np.cumsum(weights, out=sums[1:])
    return sums


def _recalls_reached(num_truth: Counts) -> tuple[Counts, Integers]:
    """How many of COCO's recalls k found boxes of n reach, for k = 0 … n of every n, and where each n starts."""
    sizes = num_truth + 1
    starts = np.cumsum(sizes) - sizes
    found = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    reached = np.searchsorted(COCO_RECALLS, found / np.repeat(np.maximum(num_truth, 1), sizes), side="right")
    reached[starts] = 0
    return reached.astype(np.int32), starts


def _chunks(matches: Matches) -> Iterator[_Chunk]:
    """Splits the classes into ranges of similar work, small enough that a processor's cache holds one."""
    num_classes = matches.num_categories
    order = np.lexsort((-matches.scores, matches.detection_category))
    starts = np.searchsorted(matches.detection_category[order], np.arange(num_classes + 1))
    hits = np.bitwise_count(matches.true_positive).sum(axis=0, dtype=np.int64)[order]
    work = np.concatenate([np.zeros(1, np.int64), np.cumsum(hits + 1)])[starts]
    first = 0
    while first < num_classes:
        last = max(first + 1, int(np.searchsorted(work, work[first] + _CHUNK_ENTRIES, side="right")) - 1)
        yield _chunk(matches, first, last, order[starts[first] : starts[last]])
        first = last


def _chunk(matches: Matches, first: int, last: int, order: Integers) -> _Chunk:
    """The classes first … last - 1, whose detections, by class and falling score, are the rows `order`."""
    num_areas, num_thresholds = len(matches.protocol.areas), len(matches.protocol.iou_thresholds)
    image = matches.detection_image[order]
    class_starts = np.searchsorted(matches.detection_category[order], np.arange(first, last + 1))
    counted = _Lists(image)
    columns: list[tuple[Integers, ...]] = []
    for area in range(num_areas):
        positive, ignored = matches.true_positive[area][order], matches.ignored[area][order]
        counts = [~bits_at(ignored, index) for index in range(num_thresholds)]
        counts_always = np.logical_and.reduce(counts)
        always = counted.append(counts_always)
        for index in range(num_thresholds):
            sometimes = counted.append(counts[index] & ~counts_always)
            hits = np.flatnonzero(bits_at(positive, index))
            lengths = np.diff(np.searchsorted(hits, class_starts))
            before = class_starts[:-1]
            columns.append((hits, always[hits + 1], sometimes[hits + 1], lengths, always[before], sometimes[before]))
    whole = [np.concatenate(arrays) for arrays in zip(*columns, strict=True)]
    hits, always, sometimes, lengths, always_starts, sometimes_starts = whole
    groups = np.flatnonzero(lengths)
    truth_image, truth_starts = _truth_by_cell(matches, first, last)
    return _Chunk(
        classes=slice(first, last),
        shape=(num_areas, num_thresholds, last - first),
        truth_image=truth_image,
        truth_starts=truth_starts,
        hit_image=image[hits],
        groups=groups,
        starts=(np.cumsum(lengths) - lengths)[groups],
        lengths=lengths[groups],
        counted_image=np.concatenate(counted.parts),
        always=always.astype(np.int32),
        sometimes=sometimes.astype(np.int32),
        always_starts=always_starts[groups],
        sometimes_starts=sometimes_starts[groups],
    )


class _Lists:
    """Lists of detections that count, one after another."""

    def __init__(self, image: Counts) -> None:
        self.parts: list[Counts] = []
        self._image = image
        self._length = 0

    def append(self, chosen: Flags) -> Integers:
        """Appends those chosen; how many stand in all lists so far before each detection and behind the last."""
        self.parts.append(self._image[chosen])
        places: Integers = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen)]) + self._length
        self._length += len(self.parts[-1])
        return places


def _truth_by_cell(matches: Matches, first: int, last: int) -> tuple[Counts, Integers]:
    """Images of the boxes that count, by size class and class, and where each of these cells starts."""
    own = np.flatnonzero((matches.truth_category >= first) & (matches.truth_category < last))
    own = own[np.argsort(matches.truth_category[own], kind="stable")]
    images, lengths = [], []
    for ignored in matches.truth_ignored:
        counts = own[~ignored[own]]
        images.append(matches.truth_image[counts])
        lengths.append(np.bincount(matches.truth_category[counts] - first, minlength=last - first))
    return np.concatenate(images), np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
