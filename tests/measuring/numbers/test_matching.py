"""Matching equals pycocotools for every detection and box, regardless of how images are split into parts."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from raydet.measuring.numbers.matches import (
    COCO,
    Matches,
    Protocol,
    bits_at,
    concatenate,
    from_bytes,
    take_images,
    to_bytes,
)
from raydet.measuring.numbers.matching import match, overlapping_pairs
from raydet.tables.schema import Category
from tests.measuring.numbers.test_metrics import (
    ONE_BOX,
    ONE_HIT,
    PROTOCOLS,
    SLOW,
    Case,
    Image,
    cases,
    columns,
    image_detections,
    image_truth,
    match_all,
    real_images,
    reference,
)

COLUMNS = (
    "image_ids",
    "detection_image",
    "detection_category",
    "scores",
    "rank",
    "true_positive",
    "ignored",
    "truth_image",
    "truth_category",
    "truth_ignored",
    "truth_found",
)


def assert_equal(found: Matches, expected: Matches) -> None:
    assert (found.protocol, found.num_categories) == (expected.protocol, expected.num_categories)
    for name in COLUMNS:
        first, second = getattr(found, name), getattr(expected, name)
        assert first.dtype == second.dtype, name
        assert np.array_equal(first, second), name


def assert_as_pycocotools(matches: Matches, evaluator: COCOeval, num_truth: int, num_detections: int) -> None:
    """Compare every threshold and size class of every detection and box; ids are rows counted from 1."""
    areas, thresholds = len(matches.protocol.areas), len(matches.protocol.iou_thresholds)
    right, ignored, seen = np.zeros((3, areas, thresholds, num_detections), dtype=bool)
    truth_ignored, truth_found = np.zeros((areas, num_truth), bool), np.zeros((thresholds, num_truth), bool)
    for cell in evaluator.evalImgs:
        if cell is None:
            continue
        area = [list(bounds) for _, bounds in matches.protocol.areas].index(list(cell["aRng"]))
        rows, boxes = np.array(cell["dtIds"], np.int64) - 1, np.array(cell["gtIds"], np.int64) - 1
        is_ignored = cell["dtIgnore"].astype(bool)
        right[area][:, rows] = (cell["dtMatches"] > 0) & ~is_ignored
        ignored[area][:, rows] = is_ignored
        seen[area][:, rows] = True
        truth_ignored[area][boxes] = np.asarray(cell["gtIgnore"]).astype(bool)
        if area == 0:
            truth_found[:, boxes] = cell["gtMatches"] > 0
    assert sorted(matches.detection_row) == np.flatnonzero(seen[0, 0]).tolist()
    assert sorted(matches.truth_row) == list(range(num_truth))
    for threshold in range(thresholds):
        row = matches.detection_row
        assert np.array_equal(bits_at(matches.true_positive, threshold), right[:, threshold, row])
        assert np.array_equal(bits_at(matches.ignored, threshold), ignored[:, threshold, row])
        assert np.array_equal(bits_at(matches.truth_found, threshold), truth_found[threshold, matches.truth_row])
    assert np.array_equal(matches.truth_ignored, truth_ignored[:, matches.truth_row])


@pytest.mark.parametrize("protocol", [COCO, *PROTOCOLS], ids=range(1 + len(PROTOCOLS)))
@settings(max_examples=20, deadline=None, suppress_health_check=SLOW)
@given(case=cases())
def test_every_outcome_is_pycocotools_own(protocol: Protocol, case: Case) -> None:
    images, categories = case
    categories = sorted(categories, key=lambda category: category.id)
    truth, detections = columns(images)
    matches = match(truth, detections, len(categories), protocol)
    evaluator = reference(images, categories, protocol)
    assert_as_pycocotools(matches, evaluator, len(truth.category), len(detections.category))


@pytest.mark.parametrize("protocol", [COCO, PROTOCOLS[0], PROTOCOLS[-1]], ids=["coco", "as one", "64 thresholds"])
def test_every_outcome_on_real_truth(test_data: Path, protocol: Protocol) -> None:
    images, categories = real_images(test_data / "bccd/instances_val.json", seed=1)
    categories = sorted(categories, key=lambda category: category.id)
    truth, detections = columns(images)
    matches = match(truth, detections, len(categories), protocol)
    evaluator = reference(images, categories, protocol)
    assert_as_pycocotools(matches, evaluator, len(truth.category), len(detections.category))
    assert_equal(match(truth, detections, len(categories), protocol, pairs_at_once=7), matches)


@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
@given(case=cases(), num_parts=st.sampled_from([1, 2, 7, 64]), seed=st.integers(0, 2**16))
def test_parts_put_together_are_the_whole(case: Case, num_parts: int, seed: int) -> None:
    images, categories = case
    shuffler = random.Random(seed)
    parts: list[list[Image]] = [[] for _ in range(num_parts)]
    for image in shuffler.sample(images, len(images)):
        shuffler.choice(parts).append(image)
    nothing = Image(2**53 - 1, image_truth([]), image_detections([]))
    empty = take_images(match_all([nothing], categories), np.array([False]))
    matched = [match_all(part, categories) if part else empty for part in parts]
    whole = match_all(images, categories)
    assert_equal(concatenate(matched), whole)
    assert_equal(concatenate([from_bytes(to_bytes(part)) for part in matched]), whole)
    assert set(concatenate(matched).detection_row) <= {-1}


@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
@given(case=cases(), seed=st.integers(0, 2**16))
def test_some_images_are_as_if_the_others_were_not_there(case: Case, seed: int) -> None:
    images, categories = case
    images = sorted(images, key=lambda image: image.image_id)
    chosen = np.random.default_rng(seed).random(len(images)) < 0.5
    chosen[0] = True
    found = take_images(match_all(images, categories), chosen)
    assert_equal(found, match_all([image for image, is_in in zip(images, chosen, strict=True) if is_in], categories))


def test_what_comes_back_from_bytes_is_the_same() -> None:
    matches = match_all([Image(5, ONE_BOX, ONE_HIT), Image(3, ONE_BOX, ONE_HIT)], [Category(7, "cell")], PROTOCOLS[3])
    found = from_bytes(to_bytes(matches))
    assert_equal(found, matches)
    assert (found.detection_row.tolist(), found.truth_row.tolist()) == ([1, 0], [1, 0])


@pytest.mark.parametrize(
    "state", [b"", b"something else", to_bytes(match_all([Image(1, ONE_BOX, ONE_HIT)], [Category(1, "a")]))[:-40]]
)
def test_other_bytes_are_refused(state: bytes) -> None:
    with pytest.raises(ValueError, match="not the state of Matches"):
        from_bytes(state)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    one = [Category(7, "cell")]
    matches = match_all([Image(4, ONE_BOX, ONE_HIT)], one)
    with pytest.raises(ValueError, match=r"\b1 images .* 4$"):
        concatenate([matches, match_all([Image(4, ONE_BOX, ONE_HIT), Image(5, ONE_BOX, ONE_HIT)], one)])
    with pytest.raises(ValueError, match="protocols or classes"):
        concatenate([matches, match_all([Image(5, ONE_BOX, ONE_HIT)], one, PROTOCOLS[1])])
    with pytest.raises(ValueError, match="no matches"):
        concatenate([])


def test_bits_are_as_wide_as_the_thresholds_are_many() -> None:
    images, categories = [Image(1, ONE_BOX, ONE_HIT)], [Category(7, "cell")]
    for count, dtype in (
        (1, np.uint8),
        (8, np.uint8),
        (9, np.uint16),
        (17, np.uint32),
        (33, np.uint64),
        (64, np.uint64),
    ):
        matches = match_all(images, categories, replace(COCO, iou_thresholds=tuple(np.linspace(0.1, 1, count))))
        assert matches.true_positive.dtype == matches.truth_found.dtype == dtype
        assert int(matches.true_positive[0, 0]) == 2**count - 1
        assert all(bits_at(matches.truth_found, index).all() for index in range(count))


def test_it_is_known_which_detection_is_right() -> None:
    truth = image_truth(
        [([0, 0, 10, 10], 0, 100.0, False), ([50, 0, 10, 10], 0, 100.0, False), ([0, 60, 90, 90], 0, 8100.0, True)]
    )
    detections = image_detections(
        [
            ([0, 0, 10, 9], 0.4, 0),  # would be correct if the next score were lower
            ([0, 0, 10, 8], 0.5, 0),
            ([50, 0, 10, 10], 0.9, 1),  # another class
            ([5, 65, 20, 20], 0.3, 0),  # in the crowd
            ([50, 0, 10, 4.9], 0.8, 0),  # overlaps too little
        ]
    )
    matches = match_all([Image(1, truth, detections)], [Category(1, "a"), Category(2, "b")])
    assert matches.detection_row.tolist() == [4, 1, 0, 3, 2]
    assert matches.rank.tolist() == [0, 1, 2, 3, 0]
    assert bits_at(matches.true_positive[0], 0).tolist() == [False, True, False, False, False]
    assert bits_at(matches.ignored[0], 0).tolist() == [False, False, False, True, False]
    assert bits_at(matches.truth_found, 0).tolist() == [True, False, True]
    assert bits_at(matches.true_positive[0], 6).tolist() == [False, True, False, False, False]
    assert bits_at(matches.true_positive[0], 7).tolist() == [False, False, True, False, False]


def test_of_equal_overlaps_the_last_is_taken_and_of_equal_scores_the_first_takes() -> None:
    truth = image_truth([([0, 0, 10, 10], 0, 100.0, False)] * 2)
    detections = image_detections([([0, 0, 10, 10], 0.5, 0)] * 3)
    matches = match_all([Image(1, truth, detections)], [Category(1, "a")])
    assert bits_at(matches.true_positive[0], 9).tolist() == [True, True, False]
    alone = match_all([Image(1, truth, image_detections([([0, 0, 10, 10], 0.5, 0)]))], [Category(1, "a")])
    assert bits_at(alone.truth_found, 9).tolist() == [False, True]


def test_no_image_gives_no_match() -> None:
    matches = match_all([Image(1, image_truth([]), image_detections([]))], [Category(1, "a")])
    nothing = take_images(matches, np.array([False]))
    for found, count in ((matches, 1), (nothing, 0), (concatenate([nothing]), 0)):
        assert (len(found.image_ids), len(found.scores), len(found.truth_image)) == (count, 0, 0)
        assert found.true_positive.shape == found.truth_ignored.shape == (4, 0)


@pytest.mark.parametrize("same_category", [True, False])
@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
@given(case=cases(), min_iou=st.sampled_from([0.0, 0.1, 0.5]))
def test_pairs_are_all_that_overlap(same_category: bool, case: Case, min_iou: float) -> None:
    images, _ = case
    truth, detections = columns(images)
    pairs = overlapping_pairs(truth, detections, same_category=same_category, min_iou=min_iou)
    expected: list[tuple[int, int, float]] = []
    for (start, end), (box_start, box_end) in zip(
        np.lib.stride_tricks.sliding_window_view(detections.starts, 2).tolist(),
        np.lib.stride_tricks.sliding_window_view(truth.starts, 2).tolist(),
        strict=True,
    ):
        if start == end or box_start == box_end:
            continue
        crowds = truth.iscrowd[box_start:box_end].astype(int).tolist()
        iou: npt.NDArray[np.float64] = mask.iou(
            detections.boxes_xywh[start:end], truth.boxes_xywh[box_start:box_end], crowds
        )
        for row, column in zip(*np.nonzero(iou), strict=True):
            is_same = detections.category[start + row] == truth.category[box_start + column]
            if iou[row, column] >= min_iou and (is_same or not same_category):
                expected.append((start + row, box_start + column, iou[row, column]))
    assert list(zip(pairs.detection, pairs.truth, pairs.iou, strict=True)) == expected
