"""Confidence intervals for AP, from bootstrap resamples of the images.

An image drawn twice counts twice, so a resample is one integer weight per image. AP is COCO's: 101 recalls, averaged
over thresholds and classes; classes without truth are left out.

COCO's AP is biased upwards on few images: it uses the highest precision at or beyond each recall, and noise raises
maxima. Resamples show the variance of AP, but they contain fewer distinct images and are therefore biased even more,
so plain percentiles miss the true value. Averaging over more classes makes this worse, because it shrinks the variance
but not the bias. The bias is therefore estimated separately, from random splits into two halves: the mean AP of both
halves minus the AP of all images. Using both halves cancels the difference in difficulty between them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

from raydet.common.display.progress import SILENT, Progress
from raydet.common.threads import available_cpus
from raydet.measuring.numbers.matches import Matches, Protocol
from raydet.measuring.numbers.metrics import Metric, metrics_of
from raydet.measuring.numbers.values import MetricValue
from raydet.measuring.numbers.weighted_precision import Counts, WeightedPrecision
from raydet.tables.columns import Floats

LEVEL = 0.95
"""Fraction of the intervals that contain the value for the whole population of images."""
_NUM_SPLITS = 50
_BIAS_OF_HALVES = 2 ** (2 / 3)
"""Ratio of the bias on half of the images to the bias on all of them.

A precision curve estimated under the constraint that it decreases with recall is, like any monotone estimate, biased by
about n ** (-2 / 3) for n images (Prakasa Rao 1969). Where the curve is flat the bias shrinks more slowly; the part
caused by the last boxes found shrinks faster, as 1 / n.
"""
_BLOCK_WEIGHTINGS = 32
_MIN_IMAGES = 3
"""With two images, the correctly widened interval covers nearly all of [0, 1]."""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Metrics with intervals, by COCO name: those of AP, AP50, AP75, APs, APm and APl that the protocol defines.

    An interval is None if fewer than three images have truth for the metric.

    Attributes:
        overall: Mean over the classes that have truth.
        per_class: Metrics by category index.
    """

    num_resamples: int
    overall: dict[str, MetricValue]
    per_class: tuple[dict[str, MetricValue], ...]


@dataclass(frozen=True, kw_only=True)
class PairedDifferences:
    """Metrics of two runs on the same images, and second - first from the same resamples."""

    first: Intervals
    second: Intervals
    difference: Intervals


class _Column(NamedTuple):
    """Metric with its position among the size classes, and the thresholds over which it is the mean."""

    metric: Metric
    area: int
    over: slice


def _columns(protocol: Protocol) -> list[_Column]:
    areas, ious = [name for name, _ in protocol.areas], protocol.iou_thresholds
    metrics = [metric for metric in metrics_of(protocol) if metric.kind == "precision"]
    first = [None if metric.iou is None else ious.index(metric.iou) for metric in metrics]
    over = [slice(None) if place is None else slice(place, place + 1) for place in first]
    return [_Column(metric, areas.index(metric.area), own) for metric, own in zip(metrics, over, strict=True)]


def draw(num_images: int, seed: int, resample: int) -> Counts:
    """Return how often each image is drawn in one resample, int32 [I]; depends only on the arguments."""
    drawn = np.random.default_rng([seed, resample]).integers(0, num_images, num_images)
    return np.bincount(drawn, minlength=num_images).astype(np.int32)


def split(num_images: int, seed: int, number: int) -> Counts:
    """Return 1 for images of a random half (rounded down), 0 for the others, int32 [I]; deterministic like `draw`."""
    half = np.zeros(num_images, np.int32)
    half[np.random.default_rng([seed, number, 1]).permutation(num_images)[: num_images // 2]] = 1
    return half


def intervals(
    matches: Matches,
    *,
    num_resamples: int,
    seed: int,
    num_threads: int | None = None,
    progress: Progress = SILENT,
) -> Intervals:
    """Return AP metrics with confidence intervals for the population that the images are a sample of.

    Each resample draws as many images as there are, with replacement. The bounds are percentiles of AP over the
    resamples, shifted so that their mean is the measured AP minus its bias, and widened by the ratio of Student's t to
    the normal quantile for the number of images that have truth. If the measured AP then lies outside, the nearer
    bound is moved to it. A class that is absent from a resample is left out of its mean.

    1,000 resamples determine the bounds to about a tenth of the interval's width. The result depends on the seed, not
    on the number of threads, by default that of the available processors.
    """
    columns = _columns(matches.protocol)
    progress.begin("intervals", total=_num_rows(num_resamples), unit="resamples")
    sampled = _sample(matches, columns, num_resamples, seed, num_threads, progress)
    return _summary(sampled, columns, matches, bounds=(0.0, 1.0))


def paired_differences(
    first: Matches,
    second: Matches,
    *,
    num_resamples: int,
    seed: int,
    num_threads: int | None = None,
    progress: Progress = SILENT,
) -> PairedDifferences:
    """Return the differences in AP between two runs on the same images, with confidence intervals.

    Both runs have the same truth and protocol, and are measured on the same resamples, so the difficulty that an image
    has for both cancels out. For the other arguments see `intervals`.

    Raises:
        ValueError: Protocol, classes, images or labelled boxes differ.
    """
    _check_same_truth(first, second)
    columns = _columns(first.protocol)
    progress.begin("intervals", total=2 * _num_rows(num_resamples), unit="resamples")
    before, after = (
        _sample(matches, columns, num_resamples, seed, num_threads, progress) for matches in (first, second)
    )
    return PairedDifferences(
        first=_summary(before, columns, first, bounds=(0.0, 1.0)),
        second=_summary(after, columns, first, bounds=(0.0, 1.0)),
        difference=_summary(after.minus(before), columns, first, bounds=None),
    )


def _check_same_truth(first: Matches, second: Matches) -> None:
    if (first.protocol, first.num_categories) != (second.protocol, second.num_categories):
        raise ValueError("the two runs were matched with different protocols or classes")
    if not np.array_equal(first.image_ids, second.image_ids):
        raise ValueError("the two runs have different images")
    for name in ("truth_image", "truth_category", "truth_ignored"):
        if not np.array_equal(getattr(first, name), getattr(second, name)):
            raise ValueError(f"the two runs were matched with different labelled boxes: {name} differs")


@dataclass(frozen=True)
class _Sampled:
    """Metrics by class and over all classes; NaN without truth.

    Attributes:
        per_class: Values for the original images (first) and the resamples, [1 + R, K, metrics].
        overall: Values over all classes in the same order, [1 + R, metrics].
        bias_per_class: Upward bias of the values for the original images, [K, metrics].
        bias_overall: Upward bias over all classes, [metrics].
    """

    per_class: Floats
    overall: Floats
    bias_per_class: Floats
    bias_overall: Floats

    def minus(self, other: "_Sampled") -> "_Sampled":
        """Return the difference of two runs. Their biases nearly cancel; correcting the rest would add more error."""
        return _Sampled(
            self.per_class - other.per_class,
            self.overall - other.overall,
            np.zeros_like(self.bias_per_class),
            np.zeros_like(self.bias_overall),
        )


def _num_rows(num_resamples: int) -> int:
    """Return the number of weightings: the original images, the resamples, and the halves that measure the bias."""
    return 1 + num_resamples + (2 * _NUM_SPLITS if num_resamples else 0)


def _sample(
    matches: Matches,
    columns: Sequence[_Column],
    num_resamples: int,
    seed: int,
    num_threads: int | None,
    progress: Progress,
) -> _Sampled:
    num_images = len(matches.image_ids)

    def weights(row: int) -> Counts:
        if row == 0:
            return np.ones(num_images, np.int32)
        if row <= num_resamples:
            return draw(num_images, seed, row)
        number, side = divmod(row - num_resamples - 1, 2)
        half = split(num_images, seed, number)
        return half if side == 0 else 1 - half

    values = _values(matches, columns, _num_rows(num_resamples), weights, num_threads, progress)
    per_class, halves = values[: 1 + num_resamples], values[1 + num_resamples :]
    excess = _mean((halves[0::2] + halves[1::2]) / 2) - per_class[0]
    bias_per_class = excess / (_BIAS_OF_HALVES - 1)
    # Average the per-class biases, because a half need not contain all classes.
    return _Sampled(per_class, _mean(per_class.swapaxes(0, 1)), bias_per_class, _mean(bias_per_class))


def _values(
    matches: Matches,
    columns: Sequence[_Column],
    num_rows: int,
    weights: Callable[[int], Counts],
    num_threads: int | None,
    progress: Progress,
) -> Floats:
    """Return the metrics of each class for each image weighting, [weightings, K, metrics]."""
    precision_of = WeightedPrecision(matches)
    values = np.empty((num_rows, matches.num_categories, len(columns)))

    def fill(first: int) -> None:
        for row in range(first, min(first + _BLOCK_WEIGHTINGS, num_rows)):
            precision = precision_of(weights(row))
            for place, column in enumerate(columns):
                values[row, :, place] = precision[:, column.area, column.over].mean(axis=-1)
            progress.advance()

    with ThreadPoolExecutor(num_threads or available_cpus()) as pool:
        list(pool.map(fill, range(0, num_rows, _BLOCK_WEIGHTINGS)))
    return values


def _mean(values: Floats) -> Floats:
    """Return the mean over the first axis, ignoring NaN; NaN if all values are NaN."""
    defined = ~np.isnan(values)
    sums, counts = np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0)
    return np.asarray(np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0))


def _summary(
    sampled: _Sampled, columns: Sequence[_Column], matches: Matches, *, bounds: tuple[float, float] | None
) -> Intervals:
    by_class, by_area = _num_images_with_truth(matches)
    areas = [column.area for column in columns]
    effective = _effective_images(sampled.per_class[1:], by_class[:, areas], by_area[areas])

    def named(values: Floats, biases: Floats, num_images: Floats) -> dict[str, MetricValue]:
        found = {}
        for column, drawn, bias, count in zip(columns, values.T, biases.tolist(), num_images.tolist(), strict=True):
            low, high = _bounds(drawn[0], drawn[1:], bias, count, bounds)
            metric = column.metric.with_value(None if np.isnan(drawn[0]) else float(drawn[0]))
            found[metric.metric] = replace(metric, low=low, high=high)
        return found

    return Intervals(
        num_resamples=len(sampled.overall) - 1,
        overall=named(sampled.overall, sampled.bias_overall, effective),
        per_class=tuple(
            named(sampled.per_class[:, index], sampled.bias_per_class[index], by_class[index, areas])
            for index in range(matches.num_categories)
        ),
    )


def _effective_images(per_class: Floats, num_by_class: Floats, num_images: Floats) -> Floats:
    """Return the effective number of images behind the mean over classes, [metrics].

    The variance of the mean is dominated by rare classes, and so are its degrees of freedom (Satterthwaite 1946). The
    values are those of the resamples, [R, K, metrics]; the numbers count images with truth, [K, metrics] and [metrics].
    """
    variance = np.nan_to_num(_mean(per_class**2) - _mean(per_class) ** 2)
    spread = (variance**2 / np.maximum(num_by_class - 1, 1)).sum(axis=0)
    freedom = np.divide(variance.sum(axis=0) ** 2, spread, out=np.full(len(spread), np.inf), where=spread > 0)
    return np.asarray(np.minimum(np.maximum(freedom + 1, _MIN_IMAGES), num_images))


def _num_images_with_truth(matches: Matches) -> tuple[Floats, Floats]:
    """Return the number of images with a box that counts, by class and size class [K, A], and by size class [A]."""
    num_images, num_classes = len(matches.image_ids), matches.num_categories
    by_class, by_area = [], []
    for ignored in matches.truth_ignored:
        category, image = matches.truth_category[~ignored].astype(np.int64), matches.truth_image[~ignored]
        pairs = np.unique(category * num_images + image)
        by_class.append(np.bincount(pairs // max(num_images, 1), minlength=num_classes))
        by_area.append(len(np.unique(image)))
    return np.stack(by_class, axis=1).astype(np.float64), np.array(by_area, dtype=np.float64)


def _bounds(
    value: float, samples: Floats, bias: float, num_images: float, bounds: tuple[float, float] | None
) -> tuple[float, float] | tuple[None, None]:
    """Return the bounds of the interval of a metric, (None, None) if too few images have truth.

    `bounds` are the smallest and largest possible values, None for a difference.

    For the widening see Hesterberg 2015, "What teachers should know about the bootstrap": resampling n images
    underestimates the standard deviation by sqrt((n - 1) / n), and the deviation itself is estimated from n images.
    """
    samples = samples[~np.isnan(samples)]
    if np.isnan(value) or num_images < _MIN_IMAGES or np.isnan(bias) or not samples.size:
        return None, None
    tail = (1 - LEVEL) / 2
    wider = stdtrit(num_images - 1, tail) / ndtri(tail) * np.sqrt(num_images / (num_images - 1))
    low, high = value - bias + wider * (np.quantile(samples, [tail, 1 - tail]) - samples.mean())
    smallest, largest = bounds or (-1.0, 1.0)
    if bounds and np.abs(samples - value).max() < _ROUNDING:
        # All images agree; widen by the share of differing images that a sample of this size may miss.
        unseen = 1 - tail ** (1 / num_images)
        low = low - unseen if value > largest - _ROUNDING else low
        high = high + unseen if value < smallest + _ROUNDING else high
    return float(max(smallest, min(low, value))), float(min(largest, max(high, value)))
