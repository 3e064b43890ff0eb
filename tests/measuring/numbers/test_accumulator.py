"""Accumulating images one by one or matches part by part equals measuring everything in one piece."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.common.boxes import as_boxes
from raydet.measuring.numbers.accumulator import (
    NO_DETECTIONS,
    CocoAccumulator,
    ImageDetections,
    ImageTruth,
    MatchesByClass,
)
from raydet.measuring.numbers.matches import COCO, Protocol
from raydet.measuring.numbers.metrics import CocoResult, accumulate
from raydet.tables.schema import Category
from tests.measuring.numbers.test_metrics import (
    ONE_BOX,
    ONE_CLASS,
    ONE_HIT,
    PROTOCOLS,
    SLOW,
    Case,
    Image,
    cases,
    image_detections,
    image_truth,
    match_all,
    real_images,
)


def test_an_unreadable_image_counts_as_missed() -> None:
    accumulator = CocoAccumulator(ONE_CLASS)
    accumulator.add(1, ONE_BOX, ONE_HIT)
    assert accumulator.result().AR100 == 1.0
    accumulator.add(2, ONE_BOX, NO_DETECTIONS, unreadable=True)
    result = accumulator.result()
    assert (result.num_images, result.num_truth, result.num_detections, result.num_unreadable) == (2, 2, 1, 1)
    assert result.AR100 == 0.5


def test_counts_survive_a_merge_and_a_state_can_be_sent_on() -> None:
    first, second, third = (CocoAccumulator(ONE_CLASS) for _ in range(3))
    first.add(1, ONE_BOX, ONE_HIT)
    second.add(2, ONE_BOX, NO_DETECTIONS, unreadable=True)
    second.merge(first.to_bytes())
    third.merge(second.to_bytes())
    third.add(3, ONE_BOX, ONE_HIT)
    result = third.result()
    assert (result.num_images, result.num_truth, result.num_detections, result.num_unreadable) == (3, 3, 2, 1)
    recalls = [result.AR1, second.result().AR1]
    assert recalls == pytest.approx([2 / 3, 1 / 2])


def test_no_image_at_all_measures_nothing() -> None:
    result = CocoAccumulator(ONE_CLASS).result()
    assert set(result.values.values()) == {None}
    assert result.num_images == 0


def test_an_image_counts_once() -> None:
    accumulator, other = CocoAccumulator(ONE_CLASS), CocoAccumulator(ONE_CLASS)
    accumulator.add(4, ONE_BOX, ONE_HIT)
    other.add(4, ONE_BOX, NO_DETECTIONS)
    with pytest.raises(ValueError, match=r"image 4\b"):
        accumulator.add(4, ONE_BOX, ONE_HIT)
    with pytest.raises(ValueError, match=r"\b1 images.* 4$"):
        accumulator.merge(other.to_bytes())
    assert accumulator.result().num_images == 1


@pytest.mark.parametrize(
    ("image_id", "truth", "detections", "message"),
    [
        (-1, ONE_BOX, ONE_HIT, "at least 0"),
        (2**53, ONE_BOX, ONE_HIT, r"below 2\*\*53"),
        (1, ONE_BOX, image_detections([([0, 0, 1, 1], float("nan"), 0)]), "not a finite number"),
        (1, ONE_BOX, image_detections([([0, 0, float("inf"), 1], 0.5, 0)]), "not a finite number"),
        (1, image_truth([([0, 0, 1, 1], 0, float("nan"), False)]), ONE_HIT, "not a finite number"),
        (1, ONE_BOX, image_detections([([0, 0, 1, 1], 0.5, 1)]), "category"),
        (1, image_truth([([0, 0, 1, 1], -1, 1.0, False)]), ONE_HIT, "category"),
        (1, ONE_BOX, ImageDetections(as_boxes([]), np.zeros(1), np.zeros(1, np.int64)), "differ in length"),
        (
            1,
            ImageTruth(as_boxes([]), np.zeros(1, np.int64), np.zeros(1), np.zeros(1, bool)),
            ONE_HIT,
            "differ in length",
        ),
    ],
)
def test_wrong_input_is_refused(image_id: int, truth: ImageTruth, detections: ImageDetections, message: str) -> None:
    accumulator = CocoAccumulator(ONE_CLASS)
    with pytest.raises(ValueError, match=message):
        accumulator.add(image_id, truth, detections)
    assert accumulator.result().num_images == 0


def test_an_unreadable_image_with_detections_is_refused() -> None:
    with pytest.raises(ValueError, match="could not be read"):
        CocoAccumulator(ONE_CLASS).add(1, ONE_BOX, ONE_HIT, unreadable=True)


def test_states_that_do_not_belong_together_are_refused() -> None:
    accumulator = CocoAccumulator(ONE_CLASS)
    with pytest.raises(ValueError, match="different categories"):
        accumulator.merge(CocoAccumulator([Category(7, "other")]).to_bytes())
    with pytest.raises(ValueError, match="not the state"):
        accumulator.merge(b"something else")
    with pytest.raises(ValueError, match="at least one category"):
        CocoAccumulator([])


def by_class_of(
    images: list[Image],
    categories: list[Category],
    protocol: Protocol,
    folder: Path,
    *,
    num_parts: int,
    seed: int,
    at_once: int = 4_000_000,
) -> CocoResult:
    """Measure images that are distributed at random over parts, some of them empty, added in any order."""
    shuffler = random.Random(seed)
    parts: list[list[Image]] = [[] for _ in range(num_parts)]
    for image in shuffler.sample(images, len(images)):
        shuffler.choice(parts).append(image)
    image_ids = np.sort([image.image_id for image in images])
    folder.mkdir()
    num_classes = 1 if protocol.class_agnostic else len(categories)
    by_class = MatchesByClass(folder, protocol, num_classes, detections_at_once=at_once)
    for part in parts:
        if part:
            matches = match_all(part, categories, protocol)
            by_class.add(matches, np.searchsorted(image_ids, matches.image_ids))
    num_detections = sum(len(image.detections.scores) for image in images)
    return by_class.result(categories, num_images=len(images), num_detections=num_detections, num_unreadable=0)


def assert_equal_bits(found: CocoResult, expected: CocoResult) -> None:
    # The comparison of results ignores precision and recall.
    assert dataclasses.replace(found, num_detections=0) == dataclasses.replace(expected, num_detections=0)
    assert np.array_equal(found.precision, expected.precision)
    assert np.array_equal(found.recall, expected.recall)


@pytest.mark.parametrize("at_once", [1, 40, 4_000_000])
@pytest.mark.parametrize("num_parts", [1, 5])
def test_by_class_is_the_whole_to_the_last_bit(test_data: Path, tmp_path: Path, at_once: int, num_parts: int) -> None:
    images, categories = real_images(test_data / "coco_mini" / "instances_val.json", seed=2)
    found = by_class_of(images, categories, COCO, tmp_path / "rows", num_parts=num_parts, seed=5, at_once=at_once)
    expected = accumulate(match_all(images, categories), categories)
    assert expected.AP is not None and 0 < expected.AP < 1
    assert_equal_bits(found, expected)


@settings(max_examples=25, deadline=None, suppress_health_check=SLOW)
@given(case=cases(), protocol=st.sampled_from(PROTOCOLS), seed=st.integers(0, 2**16), at_once=st.integers(1, 9))
def test_by_class_is_the_whole_on_random_cases(
    tmp_path_factory: pytest.TempPathFactory, case: Case, protocol: Protocol, seed: int, at_once: int
) -> None:
    images, categories = case
    folder = tmp_path_factory.mktemp("rows") / "rows"
    found = by_class_of(images, categories, protocol, folder, num_parts=3, seed=seed, at_once=at_once)
    assert_equal_bits(found, accumulate(match_all(images, categories, protocol), categories))


def test_a_detection_takes_32_bytes_on_disk(tmp_path: Path) -> None:
    image = Image(4, ONE_BOX, ONE_HIT)
    by_class_of([image], ONE_CLASS, COCO, tmp_path / "rows", num_parts=1, seed=0)
    assert [path.stat().st_size for path in (tmp_path / "rows").iterdir()] == [32]
