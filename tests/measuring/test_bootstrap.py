"""AP of a resample equals pycocotools' AP on repeated images, and intervals have their nominal coverage."""

import contextlib
import dataclasses
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydet.measuring.bootstrap import draw, intervals, paired_differences, split
from raydet.measuring.numbers.matches import Matches, Protocol
from raydet.measuring.numbers.matching import match
from raydet.measuring.numbers.values import MetricValue
from raydet.measuring.numbers.weighted_precision import WeightedPrecision
from raydet.tables.columns import DetectionColumns, Floats, Integers, TruthColumns

NUM_CLASSES = 4
RATES = np.array([1.5, 0.5, 0.15])
PLAIN = Protocol(iou_thresholds=(0.5, 0.75), areas=(("all", (0.0, 1e10)),))


def made_up_columns(num_images: int, seed: int) -> tuple[TruthColumns, DetectionColumns]:
    """Return boxes of all sizes with some crowds and some areas unlike their boxes; ties only across images."""
    generator = np.random.default_rng(seed)
    num_truth = generator.integers(0, 6, num_images)
    total = int(num_truth.sum())
    boxes = np.concatenate([generator.uniform(0, 300, (total, 2)), generator.uniform(5, 150, (total, 2))], axis=1)
    category = generator.integers(0, NUM_CLASSES - 1, total)  # the last class has none
    truth = TruthColumns(
        image_ids=np.arange(num_images),
        starts=np.append(0, np.cumsum(num_truth)),
        boxes_xywh=boxes,
        category=category,
        area=boxes[:, 2] * boxes[:, 3] * generator.choice([1.0, 0.6], total),
        iscrowd=generator.random(total) < 0.1,
    )
    detected, scores, labels, lengths = [np.zeros((0, 4))], [np.zeros(0)], [np.zeros(0, np.int64)], []
    for image in range(num_images):
        own = np.repeat(np.arange(truth.starts[image], truth.starts[image + 1]), generator.integers(0, 4))
        noise = generator.normal(0, 6, (len(own), 4))
        near = np.maximum(truth.boxes_xywh[own] + noise, 1.0)
        far = generator.uniform(5, 150, (int(generator.integers(0, 5)), 4))
        right = np.where(generator.random(len(own)) < 0.9, category[own], 0)
        labels.append(np.concatenate([right, generator.integers(0, NUM_CLASSES, len(far))]))
        detected += [near, far]
        scores.append(generator.permutation(60)[: len(near) + len(far)] / 60)
        lengths.append(len(near) + len(far))
    detections = DetectionColumns(
        starts=np.append(0, np.cumsum(lengths)),
        boxes_xywh=np.concatenate(detected),
        scores=np.concatenate(scores),
        category=np.concatenate(labels),
    )
    return truth, detections


def pycocotools_precision(truth: TruthColumns, detections: DetectionColumns, copies: Integers) -> Floats:
    """Return pycocotools' precision on repeated images, [K, A, T]; NaN instead of -1."""
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for image, count in enumerate(copies.tolist()):
        for copy in range(count):
            image_id = image * 100 + copy
            images.append({"id": image_id, "width": 600, "height": 600})
            for row in range(truth.starts[image], truth.starts[image + 1]):
                annotation: dict[str, Any] = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "area": float(truth.area[row]),
                }
                annotation |= {"bbox": truth.boxes_xywh[row].tolist(), "iscrowd": int(truth.iscrowd[row])}
                annotations.append(annotation | {"category_id": int(truth.category[row])})
            for row in range(detections.starts[image], detections.starts[image + 1]):
                result: dict[str, Any] = {"image_id": image_id, "category_id": int(detections.category[row])}
                result |= {"bbox": detections.boxes_xywh[row].tolist(), "score": float(detections.scores[row])}
                results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": images, "annotations": annotations}
        coco.dataset["categories"] = [{"id": index, "name": str(index)} for index in range(NUM_CLASSES)]
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    precision = np.asarray(evaluator.eval["precision"])[..., -1]  # [T, R, K, A]
    means = np.where((precision > -1).all(axis=1), precision.mean(axis=1), np.nan)
    return means.transpose(1, 2, 0)


@pytest.mark.parametrize("seed", range(4))
def test_precision_of_weighted_images_is_that_of_repeated_images(seed: int) -> None:
    truth, detections = made_up_columns(40, seed)
    precision_of = WeightedPrecision(match(truth, detections, NUM_CLASSES))
    generator = np.random.default_rng(seed)
    for weights in (np.ones(40, np.int64), draw(40, seed, 1).astype(np.int64), generator.integers(0, 2, 40) * 7):
        expected = pycocotools_precision(truth, detections, weights)
        assert np.isnan(expected[-1]).all() and np.nanmax(expected) > 0.1
        np.testing.assert_allclose(precision_of(weights), expected, rtol=0, atol=1e-12)


def test_recalls_that_rounding_moves_are_reached_as_in_pycocotools() -> None:
    """np.linspace's 0.57 exceeds 57/100; with 100 boxes, this decides about a hundredth of the precision."""
    num = 100
    boxes = np.tile([[10.0, 10.0, 50.0, 50.0]], (num, 1))
    truth = TruthColumns(
        image_ids=np.arange(num),
        starts=np.arange(num + 1),
        boxes_xywh=boxes,
        category=np.zeros(num, np.int64),
        area=np.full(num, 2500.0),
        iscrowd=np.zeros(num, bool),
    )
    for found in (7, 28, 29, 55, 56, 57, 58, 99, 100):
        detections = DetectionColumns(
            starts=np.minimum(np.arange(num + 1), found),
            boxes_xywh=boxes[:found],
            scores=np.linspace(1, 0.1, found),
            category=np.zeros(found, np.int64),
        )
        ours = WeightedPrecision(match(truth, detections, NUM_CLASSES))(np.ones(num, np.int64))
        np.testing.assert_allclose(ours, pycocotools_precision(truth, detections, np.ones(num, np.int64)), atol=1e-12)


def test_chunks_change_nothing() -> None:
    matches = simulated(100, np.random.default_rng(0))
    whole = WeightedPrecision(matches)(draw(100, 0, 1))
    np.testing.assert_allclose(WeightedPrecision(matches, chunk_entries=1)(draw(100, 0, 1)), whole, rtol=0, atol=1e-13)


def simulated(num_images: int, generator: np.random.Generator, *, skill: float = 0.0) -> Matches:
    """Return matches of images drawn from one fixed synthetic distribution.

    The difficulty of an image is shared by all its boxes; there are three classes, from common to rare.
    """
    return simulated_pair(num_images, generator, skill)[0]


def simulated_pair(
    num_images: int,
    generator: np.random.Generator,
    skill: float = 0.0,
    second_skill: float = 0.2,
    rates: Floats = RATES,
) -> tuple[Matches, Matches]:
    """Return matches of two detectors of different skill on the same images; `rates` are boxes per class and image."""
    ease = generator.normal(0, 1, num_images)
    counts = generator.poisson(rates, (num_images, len(rates)))
    truth_image, truth_category = np.nonzero(counts)
    repeats = counts[truth_image, truth_category]
    truth_image, truth_category = np.repeat(truth_image, repeats), np.repeat(truth_category, repeats)
    first, second = (
        _simulated_run(truth_image, truth_category, ease + own, generator, len(rates)) for own in (skill, second_skill)
    )
    return first, second


def _simulated_run(
    truth_image: Integers, truth_category: Integers, ease: Floats, generator: np.random.Generator, num_classes: int
) -> Matches:
    def sigmoid(values: Floats) -> Floats:
        return 1 / (1 + np.exp(-values))

    num_images, num_truth = len(ease), len(truth_image)
    own_ease = ease[truth_image]
    found = generator.random(num_truth) < sigmoid(1.5 + 0.8 * own_ease)
    is_tight = generator.random(num_truth) < sigmoid(0.8 + 0.8 * own_ease)
    score = sigmoid(generator.normal(0.8 + 0.6 * own_ease, 1.0))
    num_false = generator.poisson(0.6 * np.exp(-0.3 * ease)[:, None], (num_images, num_classes))
    false_image, false_category = np.nonzero(num_false)
    repeats = num_false[false_image, false_category]
    false_image, false_category = np.repeat(false_image, repeats), np.repeat(false_category, repeats)
    image = np.concatenate([truth_image[found], false_image])
    category = np.concatenate([truth_category[found], false_category])
    scores = np.concatenate([score[found], sigmoid(generator.normal(-1.0, 1.0, len(false_image)))])
    bits = np.concatenate([np.where(is_tight[found], 3, 1), np.zeros(len(false_image), np.int64)]).astype(np.uint8)
    order = np.lexsort((-scores, category, image))
    return Matches(
        protocol=PLAIN,
        num_categories=num_classes,
        image_ids=np.arange(num_images),
        detection_image=image[order].astype(np.int32),
        detection_category=category[order].astype(np.int32),
        detection_row=order,
        scores=scores[order],
        rank=np.zeros(len(order), np.int32),
        true_positive=bits[order][None],
        ignored=np.zeros((1, len(order)), np.uint8),
        truth_image=truth_image.astype(np.int32),
        truth_category=truth_category.astype(np.int32),
        truth_row=np.arange(num_truth),
        truth_ignored=np.zeros((1, num_truth), bool),
        truth_found=np.where(found, np.where(is_tight, 3, 1), 0).astype(np.uint8),
    )


def true_precision(matches: Matches) -> tuple[float, Floats]:
    """Return AP over all classes and by class, from a sample large enough to represent the distribution."""
    by_class = WeightedPrecision(matches)(np.ones(len(matches.image_ids), np.int64))[:, 0].mean(axis=-1)
    return float(by_class.mean()), by_class


def covers(interval: MetricValue, truth: float) -> bool:
    assert interval.low is not None and interval.high is not None
    return interval.low <= truth <= interval.high


def measured_coverage(num_datasets: int, num_images: int, num_resamples: int) -> dict[str, float]:
    """Return the coverage of the 95 % intervals: AP of one run, difference of two, AP of the rarest class."""
    worlds = simulated_pair(200_000, np.random.default_rng(1234))
    (first_true, first_classes), (second_true, _) = (true_precision(matches) for matches in worlds)
    held: dict[str, list[bool]] = {"AP": [], "difference": [], "rare class": []}
    for number in range(num_datasets):
        pair = simulated_pair(num_images, np.random.default_rng([number, 7]))
        numbers = paired_differences(*pair, num_resamples=num_resamples, seed=number, num_threads=1)
        held["AP"].append(covers(numbers.first.overall["AP"], first_true))
        held["difference"].append(covers(numbers.difference.overall["AP"], second_true - first_true))
        held["rare class"].append(covers(numbers.first.per_class[-1]["AP"], float(first_classes[-1])))
    return {name: float(np.mean(values)) for name, values in held.items()}


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    for name, part in measured_coverage(40, 150, 100).items():
        assert 0.8 <= part <= 1.0, name


@pytest.mark.slow
def test_intervals_hold_the_truth_in_95_of_100_data_sets() -> None:
    """The standard error of a coverage of 0.95 over 800 data sets is 0.8 %."""
    coverage = measured_coverage(800, 300, 400)
    assert 0.93 <= coverage["AP"] <= 0.97
    assert 0.93 <= coverage["difference"] <= 0.97
    assert 0.92 <= coverage["rare class"] <= 0.98


def test_intervals_know_the_bias_of_many_classes() -> None:
    """With many classes the variance is small compared to the bias, and plain percentiles almost never cover."""
    rates = np.full(40, 0.3)
    truth, _ = true_precision(simulated_pair(10_000, np.random.default_rng(1234), rates=rates)[0])
    held, values = [], []
    for number in range(12):
        matches = simulated_pair(60, np.random.default_rng([number, 3]), rates=rates)[0]
        overall = intervals(matches, num_resamples=40, seed=number, num_threads=1).overall["AP"]
        held.append(covers(overall, truth))
        values.append(overall.value)
    assert np.mean(np.array(values) > truth) > 0.7
    assert sum(held) >= 9


def test_halves_are_halves() -> None:
    halves = np.stack([split(7, 0, number) for number in range(200)])
    assert (halves.sum(axis=1) == 3).all() and set(np.unique(halves)) == {0, 1}
    assert np.abs(halves.mean(axis=0) - 3 / 7).max() < 0.15
    np.testing.assert_array_equal(split(7, 0, 5), halves[5])
    assert (split(7, 1, 5) != halves[5]).any() or (split(7, 1, 6) != halves[6]).any()


def perfect(num_images: int, *, is_found: bool) -> Matches:
    """Return one box per image, and either all of them found well or none."""
    boxes = np.tile([[10.0, 10.0, 50.0, 50.0]], (num_images, 1))
    starts = np.arange(num_images + 1)
    category = np.zeros(num_images, np.int64)
    truth = TruthColumns(
        image_ids=np.arange(num_images),
        starts=starts,
        boxes_xywh=boxes,
        category=category,
        area=np.full(num_images, 2500.0),
        iscrowd=np.zeros(num_images, bool),
    )
    count = num_images if is_found else 0
    detections = DetectionColumns(
        starts=np.minimum(starts, count),
        boxes_xywh=boxes[:count],
        scores=np.linspace(1, 0.5, count),
        category=category[:count],
    )
    return match(truth, detections, 1)


@pytest.mark.parametrize("is_found", [True, False])
def test_images_that_all_say_the_same_do_not_make_sure(is_found: bool) -> None:
    """If one image in three differed, ten equal ones would be drawn with a probability of 1.7 %."""
    few, many = (
        intervals(perfect(count, is_found=is_found), num_resamples=30, seed=0).per_class[0]["AP"] for count in (10, 400)
    )
    assert few.value == pytest.approx(1.0 if is_found else 0.0)
    assert width(few) == pytest.approx(1 - 0.025 ** (1 / 10), abs=1e-6)
    assert width(many) < 0.01


def bounds(interval: MetricValue) -> tuple[float | None, float | None, float | None]:
    return interval.value, interval.low, interval.high


def width(interval: MetricValue) -> float:
    assert interval.low is not None and interval.high is not None
    return interval.high - interval.low


def test_intervals_depend_on_the_seed_alone() -> None:
    matches = simulated(80, np.random.default_rng(3))
    once = intervals(matches, num_resamples=100, seed=5, num_threads=1)
    assert intervals(matches, num_resamples=100, seed=5, num_threads=4) == once
    assert intervals(matches, num_resamples=100, seed=6, num_threads=1) != once


def test_values_are_those_of_the_images_as_they_are() -> None:
    matches = simulated(80, np.random.default_rng(3))
    found = intervals(matches, num_resamples=10, seed=0)
    expected, by_class = true_precision(matches)
    assert found.overall["AP"].value == pytest.approx(expected, abs=1e-12)
    assert [numbers["AP"].value for numbers in found.per_class] == pytest.approx(by_class.tolist(), abs=1e-12)
    assert set(found.overall) == {"AP", "AP50", "AP75"}


def test_all_of_cocos_metrics_have_intervals_where_there_is_something_to_measure() -> None:
    found = intervals(match(*made_up_columns(60, 1), NUM_CLASSES), num_resamples=50, seed=0)
    assert set(found.overall) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    for interval in found.overall.values():
        assert interval.value is not None and interval.low is not None and interval.high is not None
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert {bounds(interval) for interval in found.per_class[-1].values()} == {(None, None, None)}


def test_more_images_narrow_the_interval() -> None:
    few, many = (
        intervals(simulated(count, np.random.default_rng(8)), num_resamples=200, seed=0) for count in (100, 1600)
    )
    assert width(many.overall["AP"]) < 0.5 * width(few.overall["AP"])


def with_class_in(matches: Matches, num_images: int) -> Matches:
    """Return the matches with the last class present only in the first few of the images that have it."""
    kept_images = np.unique(matches.truth_image[matches.truth_category == 2])[:num_images]
    kept = (matches.truth_category != 2) | np.isin(matches.truth_image, kept_images)
    truth = {name: getattr(matches, name)[..., kept] for name in ("truth_image", "truth_category", "truth_row")}
    truth |= {name: getattr(matches, name)[..., kept] for name in ("truth_ignored", "truth_found")}
    alone = without(matches, (matches.detection_category == 2) & ~np.isin(matches.detection_image, kept_images))
    return dataclasses.replace(alone, **truth)


def test_a_class_in_one_or_two_images_has_a_value_and_no_interval() -> None:
    matches = simulated(80, np.random.default_rng(2))
    for count in (1, 2):
        lonely = intervals(with_class_in(matches, count), num_resamples=50, seed=0).per_class[2]["AP"]
        assert lonely.value is not None and lonely.low is None and lonely.high is None and not lonely.excludes_zero


def test_a_class_in_few_images_has_a_wide_interval() -> None:
    matches = simulated(160, np.random.default_rng(2))
    few, more = (
        intervals(with_class_in(matches, count), num_resamples=100, seed=0).per_class[2]["AP"] for count in (3, 15)
    )
    assert width(few) > 0.6 and width(more) < 0.6


def test_a_run_does_not_differ_from_itself() -> None:
    matches = simulated(60, np.random.default_rng(4))
    numbers = paired_differences(matches, matches, num_resamples=60, seed=0)
    for interval in (*numbers.difference.overall.values(), *numbers.difference.per_class[0].values()):
        assert bounds(interval) == (0.0, 0.0, 0.0) and not interval.excludes_zero


def without(matches: Matches, removed: npt.NDArray[np.bool_]) -> Matches:
    """Return the matches without some detections."""
    names = ("detection_image", "detection_category", "detection_row", "scores", "rank", "true_positive", "ignored")
    return dataclasses.replace(matches, **{name: getattr(matches, name)[..., ~removed] for name in names})


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    first = simulated(200, np.random.default_rng(5))
    is_right = first.true_positive[0] > 0
    second = without(first, is_right & (np.random.default_rng(1).random(len(is_right)) < 0.05))
    numbers = paired_differences(first, second, num_resamples=300, seed=0)
    difference, before, after = (side.overall["AP"] for side in (numbers.difference, numbers.first, numbers.second))
    assert before == intervals(first, num_resamples=300, seed=0).overall["AP"]
    assert after == intervals(second, num_resamples=300, seed=0).overall["AP"]
    assert before.value is not None and after.value is not None and difference.low is not None
    assert difference.value == after.value - before.value < 0
    assert width(difference) < 0.5 * np.hypot(width(before), width(after))
    assert difference.excludes_zero
    assert after.high is not None and before.low is not None and after.high > before.low


def test_runs_on_other_truth_are_refused() -> None:
    first = simulated(30, np.random.default_rng(0))
    other_ids = dataclasses.replace(first, image_ids=first.image_ids + 1)
    other_boxes = dataclasses.replace(first, truth_category=(first.truth_category + 1) % 3)
    other_rules = dataclasses.replace(first, protocol=dataclasses.replace(PLAIN, iou_thresholds=(0.5, 0.8)))
    for second, what in ((other_ids, "images"), (other_boxes, "labelled boxes"), (other_rules, "protocols")):
        with pytest.raises(ValueError, match=what):
            paired_differences(first, second, num_resamples=5, seed=0)


def test_weights_must_fit_the_images() -> None:
    with pytest.raises(ValueError, match=r"\b30 .*\b29\b"):
        WeightedPrecision(simulated(30, np.random.default_rng(0)))(np.ones(29, np.int64))
