"""Mosaic, mixup, copies, crop and flip move boxes together with their pixels."""

import dataclasses

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.augmentation.families import detr_crop
from raydet.augmentation.mixing import copy_small, mixup, mosaic
from raydet.augmentation.samples import (
    FILL,
    MIN_VISIBLE,
    Sample,
    clipped,
    cut,
    flip,
)
from raydet.common.boxes import Boxes


def _colour(number: int) -> tuple[int, int, int]:
    return number, 255 - number, number * 53 % 256


def _sample(size_hw: tuple[int, int], boxes_xywh: list[list[float]], *, first_id: int = 1) -> Sample:
    """Build a sample whose boxes are filled with the colour of their id; object areas are half the box areas."""
    image = np.full((*size_hw, 3), 90, np.uint8)
    boxes = np.array(boxes_xywh, np.float64).reshape(-1, 4)
    ids = np.arange(first_id, first_id + len(boxes))
    for number, (x, y, w, h) in zip(ids, boxes.astype(int), strict=True):
        image[max(y, 0) : y + h, max(x, 0) : x + w] = _colour(int(number))
    return Sample(image, boxes, ids * 7, boxes[:, 2] * boxes[:, 3] / 2, ids % 5 == 0, ids.astype(np.int64))


def _assert_paired(result: Sample) -> None:
    """Check that labels, crowd flags and areas belong to their ids, in any order."""
    assert result.boxes_xywh.shape == (len(result.ids), 4)
    np.testing.assert_array_equal(result.categories, result.ids * 7)
    np.testing.assert_array_equal(result.iscrowd, result.ids % 5 == 0)
    np.testing.assert_allclose(result.areas, result.boxes_xywh[:, 2] * result.boxes_xywh[:, 3] / 2, rtol=1e-9)


def _extent(image: npt.NDArray[np.uint8], number: int) -> list[int]:
    """Return (left, top, right, bottom) of the pixels with a box's colour, allowing for resize blur."""
    near = np.abs(image.astype(int) - _colour(int(number))).max(axis=2) <= 15
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def _corners(boxes_xywh: Boxes) -> npt.NDArray[np.float64]:
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def test_a_sample_refuses_arrays_of_different_lengths() -> None:
    with pytest.raises(AssertionError, match="one category"):
        dataclasses.replace(_sample((9, 9), [[1, 1, 5, 5]]), ids=np.array([1, 2]))


def test_flipping_twice_gives_the_same_and_once_the_mirror_image() -> None:
    sample = _sample((40, 60), [[3.5, 4, 20, 9], [30, 10, 12.25, 20]])
    once, twice = flip(sample), flip(flip(sample))
    assert once.boxes_xywh.tolist() == [[36.5, 4, 20, 9], [17.75, 10, 12.25, 20]]
    np.testing.assert_array_equal(once.image, sample.image[:, ::-1])
    np.testing.assert_array_equal(twice.boxes_xywh, sample.boxes_xywh)
    _assert_paired(once)


@pytest.mark.parametrize(("width", "is_kept"), [(24, False), (25, True), (100, True)])
def test_boxes_are_dropped_by_the_share_that_is_visible(width: int, is_kept: bool) -> None:
    """A window shows the left `width` columns of a box of 100 × 20 pixels."""
    sample = _sample((60, 200), [[50, 10, 100, 20], [0, 30, 10, 10]])
    result = cut(sample, (50 + width - 200 if width > 150 else 0, 0), (60, 50 + width))
    assert MIN_VISIBLE == 0.25
    assert result.ids.tolist() == ([1, 2] if is_kept else [2])
    if is_kept:
        assert result.boxes_xywh[0].tolist() == [50, 10, width, 20]
    _assert_paired(result)


def test_boxes_too_small_after_scaling_are_dropped() -> None:
    sample = _sample((100, 100), [[10, 10, 9, 9], [40, 40, 20, 20]])
    half = cut(sample, (0, 0), (100, 100), (50, 50))
    assert half.ids.tolist() == [2] and half.boxes_xywh.tolist() == [[20, 20, 10, 10]]
    # An area equal to the box area remains exactly equal.
    equal = dataclasses.replace(sample, areas=sample.boxes_xywh[:, 2] * sample.boxes_xywh[:, 3])
    third = cut(equal, (0, 0), (100, 100), (33, 33))
    np.testing.assert_array_equal(third.areas, third.boxes_xywh[:, 2] * third.boxes_xywh[:, 3])


def test_boxes_that_run_out_lose_their_area_in_proportion() -> None:
    result = clipped(_sample((50, 50), [[-10, 0, 20, 20], [60, 60, 5, 5], [10, 10, 0, 9]]))
    assert result.ids.tolist() == [1] and result.areas.tolist() == [100.0]


@settings(max_examples=40, deadline=None)
@given(
    left=st.integers(0, 60),
    top=st.integers(0, 40),
    height=st.integers(30, 60),
    width=st.integers(30, 60),
    scale=st.sampled_from([0.5, 1.0, 1.7, 2.0]),
)
def test_a_scaled_window_keeps_boxes_on_their_pixels(
    left: int, top: int, height: int, width: int, scale: float
) -> None:
    sample = _sample((100, 120), [[5, 5, 50, 30], [70, 10, 40, 40], [20, 50, 90, 45]])
    size_hw = (round(height * scale), round(width * scale))
    result = cut(sample, (left, top), (height, width), size_hw)
    assert result.size_hw == size_hw
    _assert_paired(result)
    for number, corners in zip(result.ids, _corners(result.boxes_xywh), strict=True):
        # When an image shrinks, a pixel next to an edge mixes both sides and counts for neither.
        np.testing.assert_allclose(_extent(result.image, number), corners, atol=max(1.5, scale))


@pytest.mark.parametrize("num_partners", [0, 1, 2, 3])
def test_a_box_in_a_tile_lands_where_its_pixels_do(num_partners: int) -> None:
    sizes = [(90, 120), (120, 90), (64, 64), (100, 300)]
    sources = [
        _sample(size, [[8, 6, size[1] / 2 - 10, size[0] - 12], [size[1] / 2 + 4, 10, size[1] / 2 - 8, size[0] / 2]],
                first_id=40 * (number + 1))
        for number, size in enumerate(sizes[: num_partners + 1])
    ]  # fmt: skip
    num_seen = 0
    for seed in range(25):
        result = mosaic(sources[0], sources[1:], np.random.default_rng(seed))
        assert result.size_hw == (90, 120)
        _assert_paired(result)
        assert len(set(result.ids.tolist())) == len(result.ids)
        for number, corners in zip(result.ids, _corners(result.boxes_xywh), strict=True):
            np.testing.assert_allclose(_extent(result.image, number), corners, atol=2.0)
            num_seen += 1
        share_empty = float((result.image == FILL).all(axis=2).mean())
        assert (share_empty > 0.05) == (num_partners < 3)
    assert num_seen > 25 * (num_partners + 1)


def test_mosaic_tiles_meet_at_one_point_and_fill_their_cells() -> None:
    """Without zoom, images of the canvas size fill their cells, so the geometry is known exactly."""
    sources = [_sample((80, 80), [[20, 10, 40, 60]], first_id=10 * number) for number in range(1, 5)]
    result = mosaic(sources[0], sources[1:], np.random.default_rng(3), centre=(0.5, 0.5), zoom=(1.0, 1.0))
    cells = {tuple(np.floor_divide(box[:2], 40).tolist()) for box in result.boxes_xywh}
    assert cells == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for box in result.boxes_xywh:
        assert (box % 40).tolist() == [10, 5, 20, 30]
    assert sorted(result.ids.tolist()) == [10, 20, 30, 40]


def test_mixup_blends_and_keeps_the_objects_of_both() -> None:
    first, second = _sample((60, 80), [[5, 5, 20, 20]]), _sample((30, 40), [[20, 10, 15, 15]], first_id=9)
    result = mixup(first, second, np.random.default_rng(1))
    assert set(result.ids.tolist()) == {1, 9} and result.size_hw == (60, 80)
    _assert_paired(result)
    x, y, w, h = result.boxes_xywh[result.ids.tolist().index(9)]
    blue = result.image[..., 2].astype(int)
    assert blue[int(y + h / 2), int(x + w / 2)] > 90 + 20 and blue[15, 15] < 90


def test_copies_of_small_objects_lie_where_nothing_was() -> None:
    boxes: list[list[float]] = [
        [10, 10, 12, 8],
        [60, 20, 9.5, 11],
        [100, 90, 90, 60],
        [180, 20, 10, 10],
        [185, 25, 10, 10],
    ]
    sample = _sample((200, 300), boxes)
    before = sample.image.copy()
    num_copies = 0
    for seed in range(30):
        result = copy_small(sample, np.random.default_rng(seed))
        _assert_paired(result)
        assert result.ids[:5].tolist() == [1, 2, 3, 4, 5]
        for number, (x, y, w, h) in zip(result.ids[5:], result.boxes_xywh[5:], strict=True):
            assert number in (1, 2), "only small objects that stand alone and are no crowd"
            inside = result.image[int(np.ceil(y)) : int(y + h), int(np.ceil(x)) : int(x + w), 0]
            assert (inside == number).all()
            num_copies += 1
        low, high = result.boxes_xywh[:, :2], result.boxes_xywh[:, :2] + result.boxes_xywh[:, 2:]
        for new in range(5, len(low)):
            meets = ((low[new] < high) & (low < high[new])).all(axis=1)
            assert meets.sum() == 1
    assert num_copies > 40
    np.testing.assert_array_equal(sample.image, before)
    crowd = dataclasses.replace(sample, iscrowd=np.ones(5, bool))
    assert copy_small(crowd, np.random.default_rng(0)) is crowd


def test_the_crop_of_detr_is_a_part_of_the_image_within_its_limits() -> None:
    sample = _sample((300, 400), [[10, 10, 150, 100], [200, 120, 180, 160]])
    shares = []
    for seed in range(80):
        result = detr_crop(sample, np.random.default_rng(seed))
        _assert_paired(result)
        shares.append((result.size_hw[0] / 300, result.size_hw[1] / 400))
        for number, corners in zip(result.ids, _corners(result.boxes_xywh), strict=True):
            np.testing.assert_allclose(_extent(result.image, number), corners, atol=1e-9)
    heights, widths = np.array(shares).T
    # Short side 600: sides of 384 to 600 of 600 and 800 pixels; short side 400: at least 384 of 400 pixels.
    assert heights.min() >= 384 / 600 - 0.01 and widths.min() >= 384 / 800 - 0.01
    assert 0.98 < heights.max() <= 1.0 and 0.98 < widths.max() <= 1.0
    assert heights.min() < 0.75 and widths.min() < 0.6


def test_tiny_images_survive_everything() -> None:
    dot, line = _sample((1, 1), [[0, 0, 1, 1]]), _sample((2, 400), [[0, 0, 400, 2]])
    for seed in range(10):
        rng = np.random.default_rng(seed)
        assert mosaic(dot, [line], rng) is dot
        assert mosaic(line, [dot, dot, line], rng).size_hw == (2, 400)
        assert mixup(dot, line, rng).size_hw == (1, 1)
        assert detr_crop(line, rng).size_hw[0] >= 1 and detr_crop(dot, rng).size_hw == (1, 1)
        copy_small(dot, rng)
    assert cv2.getNumThreads() == 1
