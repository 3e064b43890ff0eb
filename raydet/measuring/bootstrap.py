"""How sure a measured AP is: intervals by drawing the images anew, with replacement, many times over.

An image that is drawn twice counts twice, so a resample is one weight for each image. AP is COCO's (101 recalls, mean
over thresholds and classes, classes without truth left out).

COCO's AP is too high on few images: it takes the highest precision at or behind each recall, and chance makes maxima
higher. The resamples tell how far AP varies, but as the images of one are fewer, they lie too high themselves, and
percentiles of them miss the truth the more surely, the more classes are averaged: what varies shrinks, the bias does
not. So the bias is measured by itself, from the two halves of random splits: how much higher their mean AP is than
that of all images. What makes one half easier makes the other harder, and cancels out.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtri, stdtrit

from raydet.common.threads import available_cpus
from raydet.measuring.numbers.matches import Matches, Protocol
from raydet.measuring.numbers.metrics import Metric, metrics_of
from raydet.measuring.numbers.values import MetricValue
from raydet.measuring.numbers.weighted_precision import Counts, WeightedPrecision
from raydet.tables.columns import Floats

_NUM_SPLITS = 50
_BIAS_OF_HALVES = 2 ** (2 / 3)
"""How many times as large the bias is on half of the images.

A precision that falls with recall is, like any falling curve that is estimated under that condition, off by about
n ** (-2 / 3) on n images (Prakasa Rao 1969); where it is flat, the bias shrinks more slowly, and the part that comes
from the last of the found boxes faster, as 1 / n.
"""
_BLOCK_WEIGHTINGS = 32
_MIN_IMAGES = 3
"""Of two images the interval, honestly widened, is nearly all of [0, 1]."""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Numbers with their intervals, by COCO's names: AP, AP50, AP75, APs, APm, APl, as far as the protocol has them.

    An interval is None where fewer than three images have anything to measure.

    Attributes:
        level: How often such intervals hold the number that all such images together would give.
        num_resamples: From how many.
        overall: Mean over the classes that have truth.
        per_class: By category index.
    """

    level: float
    num_resamples: int
    overall: dict[str, MetricValue]
    per_class: tuple[dict[str, MetricValue], ...]


@dataclass(frozen=True, kw_only=True)
class PairedDifferences:
    """Two runs on the same images, and second - first, from the same resamples."""

    first: Intervals
    second: Intervals
    difference: Intervals


@dataclass(frozen=True)
class _Column:
    """A metric and where it stands among the size classes and thresholds (None: the mean over these)."""

    metric: Metric
    area: int
    threshold: int | None


def _columns(protocol: Protocol) -> tuple[_Column, ...]:
    areas = [name for name, _ in protocol.areas]
    return tuple(
        _Column(
            metric,
            areas.index(metric.area),
            None if metric.iou is None else protocol.iou_thresholds.index(metric.iou),
        )
        for metric in metrics_of(protocol)
        if metric.kind == "precision"
    )


def draw(num_images: int, seed: int, resample: int) -> Counts:
    """How often each image is drawn in one resample, int32 [I]; it depends on nothing else."""
    drawn = np.random.default_rng([seed, resample]).integers(0, num_images, num_images)
    return np.bincount(drawn, minlength=num_images).astype(np.int32)


def split(num_images: int, seed: int, number: int) -> Counts:
    """1 for the images of a random half (rounded down), 0 for those of the other, int32 [I]; as `draw`."""
    half = np.zeros(num_images, np.int32)
    half[np.random.default_rng([seed, number, 1]).permutation(num_images)[: num_images // 2]] = 1
    return half


def intervals(
    matches: Matches, *, num_resamples: int, seed: int, level: float = 0.95, num_threads: int | None = None
) -> Intervals:
    """Says how far AP may be from what all such images together would give.

    Images are drawn with replacement, as many as there are. The bounds are percentiles of AP over the resamples,
    moved so that their mean is the measured AP without its bias, and widened as Student's t is beside the normal
    distribution, for the number of images that have truth. Where that leaves the measured AP outside, the nearer
    bound is moved to it. A resample without a class leaves that class out.

    Args:
        matches: The outcome of the matching.
        num_resamples: 1,000 give the bounds to about a tenth of the interval's width.
        seed: The result depends on it, not on the number of threads.
        level: Part of the time that the interval is to hold the true number.
        num_threads: As many as there are processors by default.
    """
    columns = _columns(matches.protocol)
    sampled = _sample(matches, columns, num_resamples, seed, num_threads)
    return _summary(sampled, columns, matches, level, bounds=(0.0, 1.0))


def paired_differences(
    first: Matches,
    second: Matches,
    *,
    num_resamples: int,
    seed: int,
    level: float = 0.95,
    num_threads: int | None = None,
) -> PairedDifferences:
    """Says how much better the second of two runs on the same images is.

    Both are measured on the same resamples, so what makes an image hard for both cancels out.

    Args:
        first: The outcome of the matching of one run.
        second: Of the other, with the same truth and protocol.
        num_resamples: As in `intervals`, and so are the rest.
        seed: The same resamples as those of `intervals` with this seed.
        level: Part of the time that an interval is to hold the true number.
        num_threads: As many as there are processors by default.

    Raises:
        ValueError: Protocol, classes, images or labelled boxes are not the same.
    """
    _check_same_truth(first, second)
    columns = _columns(first.protocol)
    before, after = (_sample(matches, columns, num_resamples, seed, num_threads) for matches in (first, second))
    return PairedDifferences(
        first=_summary(before, columns, first, level, bounds=(0.0, 1.0)),
        second=_summary(after, columns, first, level, bounds=(0.0, 1.0)),
        difference=_summary(after.minus(before), columns, first, level, bounds=None),
    )


def _check_same_truth(first: Matches, second: Matches) -> None:
    if (first.protocol, first.num_categories) != (second.protocol, second.num_categories):
        raise ValueError("the two runs were matched by different protocols or classes")
    if not np.array_equal(first.image_ids, second.image_ids):
        raise ValueError("the two runs are of different images")
    for name in ("truth_image", "truth_category", "truth_ignored"):
        if not np.array_equal(getattr(first, name), getattr(second, name)):
            raise ValueError(f"the two runs were matched with different labelled boxes: {name} differs")


@dataclass(frozen=True)
class _Sampled:
    """Metrics by class and over all classes; NaN where there is no truth.

    Attributes:
        per_class: In the images as they are (first) and in the resamples, [1 + R, K, metrics].
        overall: Alike, [1 + R, metrics].
        bias_per_class: By how much the value in the images as they are is too high, [K, metrics].
        bias_overall: [metrics].
    """

    per_class: Floats
    overall: Floats
    bias_per_class: Floats
    bias_overall: Floats

    def minus(self, other: "_Sampled") -> "_Sampled":
        """The difference of two runs, whose biases nearly cancel; to estimate what is left adds more than it takes."""
        return _Sampled(
            self.per_class - other.per_class,
            self.overall - other.overall,
            np.zeros_like(self.bias_per_class),
            np.zeros_like(self.bias_overall),
        )


def _sample(
    matches: Matches, columns: Sequence[_Column], num_resamples: int, seed: int, num_threads: int | None
) -> _Sampled:
    num_images = len(matches.image_ids)
    num_halves = 2 * _NUM_SPLITS if num_resamples else 0

    def weights(row: int) -> Counts:
        if row == 0:
            return np.ones(num_images, np.int32)
        if row <= num_resamples:
            return draw(num_images, seed, row)
        number, side = divmod(row - num_resamples - 1, 2)
        half = split(num_images, seed, number)
        return half if side == 0 else 1 - half

    values = _values(matches, columns, 1 + num_resamples + num_halves, weights, num_threads)
    per_class, halves = values[: 1 + num_resamples], values[1 + num_resamples :]
    excess = _mean((halves[0::2] + halves[1::2]) / 2) - per_class[0]
    bias_per_class = excess / (_BIAS_OF_HALVES - 1)
    # Over the classes' own biases, for the halves need not hold all of them.
    return _Sampled(per_class, _mean(per_class.swapaxes(0, 1)), bias_per_class, _mean(bias_per_class))


def _values(
    matches: Matches,
    columns: Sequence[_Column],
    num_weightings: int,
    weights: Callable[[int], Counts],
    num_threads: int | None,
) -> Floats:
    """The metrics of each class, with the images so weighted, [weightings, K, metrics]."""
    precision_of = WeightedPrecision(matches)
    values = np.empty((num_weightings, matches.num_categories, len(columns)))

    def fill(first: int) -> None:
        for row in range(first, min(first + _BLOCK_WEIGHTINGS, num_weightings)):
            precision = precision_of(weights(row))
            for place, column in enumerate(columns):
                over = slice(None) if column.threshold is None else slice(column.threshold, column.threshold + 1)
                values[row, :, place] = precision[:, column.area, over].mean(axis=-1)

    with ThreadPoolExecutor(num_threads or available_cpus()) as pool:
        list(pool.map(fill, range(0, num_weightings, _BLOCK_WEIGHTINGS)))
    return values


def _mean(values: Floats) -> Floats:
    """Mean over the first axis without what is NaN; NaN where nothing is left."""
    defined = ~np.isnan(values)
    counts = defined.sum(axis=0)
    means: Floats = np.full(counts.shape, np.nan)
    np.divide(np.where(defined, values, 0.0).sum(axis=0), counts, out=means, where=counts > 0)
    return means


def _summary(
    sampled: _Sampled,
    columns: Sequence[_Column],
    matches: Matches,
    level: float,
    *,
    bounds: tuple[float, float] | None,
) -> Intervals:
    by_class, by_area = _num_images_with_truth(matches)
    areas = [column.area for column in columns]
    effective = _effective_images(sampled.per_class[1:], by_class[:, areas], by_area[areas])

    def named(values: Floats, biases: Floats, num_images: Floats) -> dict[str, MetricValue]:
        found = {}
        of_columns = zip(columns, values.T, biases.tolist(), num_images.tolist(), strict=True)
        for column, drawn, bias, count in of_columns:
            low, high = _bounds(drawn[0], drawn[1:], bias, count, level, bounds)
            metric = column.metric.with_value(None if np.isnan(drawn[0]) else float(drawn[0]))
            found[metric.metric] = replace(metric, low=low, high=high)
        return found

    return Intervals(
        level=level,
        num_resamples=len(sampled.overall) - 1,
        overall=named(sampled.overall, sampled.bias_overall, effective),
        per_class=tuple(
            named(sampled.per_class[:, index], sampled.bias_per_class[index], by_class[index, areas])
            for index in range(matches.num_categories)
        ),
    )


def _effective_images(per_class: Floats, num_by_class: Floats, num_images: Floats) -> Floats:
    """How many images of one class would tell as well how much the mean over classes varies, [metrics].

    A mean varies mostly by its rare classes, and so does what is known of it (Satterthwaite 1946).

    Args:
        per_class: Resamples, [R, K, metrics].
        num_by_class: Images with truth, [K, metrics].
        num_images: Images with truth of any class, [metrics].
    """
    variance = np.nan_to_num(_mean(per_class**2) - _mean(per_class) ** 2)
    spread = (variance**2 / np.maximum(num_by_class - 1, 1)).sum(axis=0)
    freedom = np.divide(variance.sum(axis=0) ** 2, spread, out=np.full(len(spread), np.inf), where=spread > 0)
    effective: Floats = np.minimum(np.maximum(freedom + 1, _MIN_IMAGES), num_images)
    return effective


def _num_images_with_truth(matches: Matches) -> tuple[Floats, Floats]:
    """Images that have a box that counts, by class and size class [K, A], and by size class [A]."""
    num_images, num_classes = len(matches.image_ids), matches.num_categories
    by_class, by_area = [], []
    for ignored in matches.truth_ignored:
        pairs = np.unique(
            matches.truth_category[~ignored].astype(np.int64) * num_images + matches.truth_image[~ignored]
        )
        by_class.append(np.bincount(pairs // max(num_images, 1), minlength=num_classes))
        by_area.append(len(np.unique(matches.truth_image[~ignored])))
    return np.stack(by_class, axis=1).astype(np.float64), np.array(by_area, dtype=np.float64)


def _bounds(
    value: float, samples: Floats, bias: float, num_images: float, level: float, bounds: tuple[float, float] | None
) -> tuple[float, float] | tuple[None, None]:
    """The ends of the interval of a number measured in so many images, None where too few tell it.

    `bounds` are the smallest and the largest that the number can be, None for a difference.

    See Hesterberg 2015, "What teachers should know about the bootstrap", for the widening: a resample of n images
    varies less by sqrt((n - 1) / n), and n images do not tell how much they vary.
    """
    samples = samples[~np.isnan(samples)]
    if np.isnan(value) or num_images < _MIN_IMAGES or np.isnan(bias) or not samples.size:
        return None, None
    tail = (1 - level) / 2
    wider = stdtrit(num_images - 1, tail) / ndtri(tail) * np.sqrt(num_images / (num_images - 1))
    low, high = value - bias + wider * (np.quantile(samples, [tail, 1 - tail]) - samples.mean())
    smallest, largest = bounds or (-1.0, 1.0)
    if bounds and np.abs(samples - value).max() < _ROUNDING:
        # All images say the same; so they would, this often, were it otherwise in that part of all such images.
        unseen = 1 - tail ** (1 / num_images)
        low = low - unseen if value > largest - _ROUNDING else low
        high = high + unseen if value < smallest + _ROUNDING else high
    return float(max(smallest, min(low, value))), float(min(largest, max(high, value)))
