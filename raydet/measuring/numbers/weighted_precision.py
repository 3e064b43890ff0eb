"""COCO's AP with integer image weights, from one matching.

A resample or a subset of a data set is one weight per image. AP over weighted images needs no new matching, only sums
and running maxima over the existing matches.
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
    """AP over weighted images, for any number of weightings.

    Holds about 60 bytes per detection.
    """

    def __init__(self, matches: Matches, *, chunk_entries: int = _CHUNK_ENTRIES) -> None:
        """Sort the matches into the order in which AP is summed, in ranges of classes that fit into the cache."""
        self._num_images = len(matches.image_ids)
        self.shape = (matches.num_categories, len(matches.protocol.areas), len(matches.protocol.iou_thresholds))
        self._chunks = tuple(_chunks(matches, chunk_entries))

    def __call__(self, weights: npt.NDArray[np.integer]) -> Floats:
        """Return AP by class, size class and IoU threshold, float64 [K, A, T]; NaN if no labelled box counts.

        The weights, [I], are how often each image counts, in ascending id order. AP equals that of pycocotools (to
        rounding) on a data set with that many copies of each image, with the copies of a detection next to each other.
        """
        copies: Counts = np.ascontiguousarray(weights, dtype=np.int32)
        if copies.shape != (self._num_images,):
            raise ValueError(f"expected {self._num_images} weights, one per image; got {len(weights)}")
        precision = np.empty(self.shape)
        for chunk in self._chunks:
            precision[chunk.classes] = chunk.average_precision(copies)
        return precision


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A range of classes. A cell is a class and size class; a group is a cell at one threshold.

    Attributes:
        classes: Class range.
        shape: (A, T, classes): the order of the groups; cells have the same order without T.
        truth_image: Image of each box that counts, by cell, int32.
        truth_starts: Start of each cell in `truth_image`, [cells + 1].
        hit_image: Image of each true positive, by group, then descending score, int32 [E].
        groups: Groups that have a true positive.
        starts: Start of each of these groups in `hit_image`.
        lengths: Number of true positives of each of these groups.
        counted_image: Images of the detections that count, as concatenated lists: per cell, those that count at every
            threshold; per group, those that count at this threshold but not at every one. Each by class and descending
            score.
        always: For each true positive, end of the detections up to it in the list of its cell, [E].
        sometimes: The same for the list of its group.
        always_starts: For each of the groups, start of its class in the list of its cell.
        sometimes_starts: The same for the list of the group.
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
        """Return AP, [classes, A, T]."""
        num_areas, num_thresholds, num_classes = self.shape
        num_truth = np.diff(_running(weights[self.truth_image])[self.truth_starts])
        sums = np.zeros(num_areas * num_thresholds * num_classes)
        if self.groups.size:
            sums[self.groups] = self._precision_sums(weights, num_truth)
        means = (sums / len(COCO_RECALLS)).reshape(self.shape)
        means[np.broadcast_to(num_truth.reshape(num_areas, 1, num_classes) == 0, self.shape)] = np.nan
        return means.transpose(2, 0, 1)

    def _precision_sums(self, weights: Counts, num_truth: Counts) -> Floats:
        """Return the sum of the interpolated precisions over COCO's recalls for each group.

        Precision peaks at true positives, so it is computed only there and multiplied by the number of recalls that
        the true positive is the first to reach.
        """
        hits, counted = _running(weights[self.hit_image]), _running(weights[self.counted_image])
        table, table_starts = _recalls_reached(num_truth)
        cells = self._cells_of_groups()
        found = hits[1:] - np.repeat(hits[self.starts], self.lengths)
        before = counted[self.always_starts] + counted[self.sometimes_starts]
        up_to = counted[self.always] + counted[self.sometimes] - np.repeat(before, self.lengths)
        precision = found / (up_to + np.spacing(1))
        # Offset the groups by 2, so that one running maximum from the right serves all of them.
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
    """Return running sums that start with 0, [n] → [n + 1]."""
    sums = np.zeros(len(weights) + 1, dtype=np.int32)
    np.cumsum(weights, out=sums[1:])
    return sums


def _recalls_reached(num_truth: Counts) -> tuple[Counts, Integers]:
    """Return the number of COCO's recalls that k of n boxes reach, for k = 0 … n of every n; and each n's start."""
    sizes = num_truth + 1
    starts = np.cumsum(sizes) - sizes
    found = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    reached = np.searchsorted(COCO_RECALLS, found / np.repeat(np.maximum(num_truth, 1), sizes), side="right")
    reached[starts] = 0
    return reached.astype(np.int32), starts


def _chunks(matches: Matches, chunk_entries: int) -> Iterator[_Chunk]:
    """Split the classes into ranges of similar work that fit into a processor's cache."""
    num_classes = matches.num_categories
    order = np.lexsort((-matches.scores, matches.detection_category))
    starts = np.searchsorted(matches.detection_category[order], np.arange(num_classes + 1))
    hits = np.bitwise_count(matches.true_positive).sum(axis=0, dtype=np.int64)[order]
    work = np.concatenate([np.zeros(1, np.int64), np.cumsum(hits + 1)])[starts]
    first = 0
    while first < num_classes:
        last = max(first + 1, int(np.searchsorted(work, work[first] + chunk_entries, side="right")) - 1)
        yield _chunk(matches, first, last, order[starts[first] : starts[last]])
        first = last


def _chunk(matches: Matches, first: int, last: int, order: Integers) -> _Chunk:
    """Build the chunk of classes first … last - 1; `order` are their detections by class and descending score."""
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
    """Concatenated lists of detections that count."""

    def __init__(self, image: Counts) -> None:
        self.parts: list[Counts] = []
        self._image = image
        self._length = 0

    def append(self, chosen: Flags) -> Integers:
        """Append the chosen detections; return the length of all lists before each detection and after the last."""
        self.parts.append(self._image[chosen])
        places: Integers = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen)]) + self._length
        self._length += len(self.parts[-1])
        return places


def _truth_by_cell(matches: Matches, first: int, last: int) -> tuple[Counts, Integers]:
    """Return the images of the boxes that count, by size class and class, and the start of each of these cells."""
    own = np.flatnonzero((matches.truth_category >= first) & (matches.truth_category < last))
    own = own[np.argsort(matches.truth_category[own], kind="stable")]
    images, lengths = [], []
    for ignored in matches.truth_ignored:
        counts = own[~ignored[own]]
        images.append(matches.truth_image[counts])
        lengths.append(np.bincount(matches.truth_category[counts] - first, minlength=last - first))
    return np.concatenate(images), np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
