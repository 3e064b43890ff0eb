"""Conversion between box formats, clipping, and area checks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raydet.common.boxes import (
    as_boxes,
    clip_xywh,
    enclosing_xywh,
    has_area,
    xywh_to_normalised_cxcywh,
    xywh_to_xyxy,
    xyxy_to_xywh,
)

_side = st.floats(0, 2000, allow_nan=False)
_boxes = st.lists(st.tuples(st.floats(-500, 2000), st.floats(-500, 2000), _side, _side), max_size=8).map(as_boxes)


@given(_boxes)
def test_corners_and_back(boxes_xywh: np.ndarray) -> None:
    np.testing.assert_allclose(xyxy_to_xywh(xywh_to_xyxy(boxes_xywh)), boxes_xywh, atol=1e-9)


@given(_boxes, st.integers(1, 900), st.integers(1, 900))
def test_clipped_boxes_lie_in_the_image_and_those_inside_keep_their_numbers(
    boxes_xywh: np.ndarray, height: int, width: int
) -> None:
    clipped = clip_xywh(boxes_xywh, (height, width))
    corners = xywh_to_xyxy(clipped)
    assert (corners >= 0).all() and (corners <= np.array([width, height] * 2) + 1e-9).all()
    inside = (boxes_xywh[:, :2] >= 0).all(1) & (xywh_to_xyxy(boxes_xywh) <= [width, height] * 2).all(1)
    assert np.array_equal(clipped[inside], boxes_xywh[inside])


def test_clipping_cuts_what_runs_out() -> None:
    boxes_xywh = as_boxes([[-10, 5, 30, 30], [90, 40, 20, 20], [200, 200, 5, 5]])
    assert clip_xywh(boxes_xywh, (50, 100)).tolist() == [[0, 5, 20, 30], [90, 40, 10, 10], [100, 50, 0, 0]]


def test_boxes_without_area() -> None:
    boxes_xywh = as_boxes([[0, 0, 1, 1], [0, 0, 0, 5], [0, 0, 5, -1], [np.nan, 0, 1, 1], [0, 0, np.inf, 1]])
    assert has_area(boxes_xywh).tolist() == [True, False, False, False, False]


def test_normalised_centres() -> None:
    assert xywh_to_normalised_cxcywh(as_boxes([[10, 20, 40, 20]]), (100, 200)).tolist() == [[0.15, 0.3, 0.2, 0.2]]


def test_no_boxes_keep_their_shape() -> None:
    assert as_boxes([]).shape == clip_xywh(as_boxes([]), (5, 5)).shape == (0, 4)


def test_the_box_around_a_rotated_one() -> None:
    box = (4.0, 6.0, 8.0, 4.0)
    assert enclosing_xywh(box, 360, (0, 0)) == box
    # A quarter turn clockwise around its own corner: what was right is below, what was below is left.
    np.testing.assert_allclose(enclosing_xywh(box, 90, (4, 6)), (0, 6, 4, 8))
    np.testing.assert_allclose(enclosing_xywh((-1, -1, 2, 2), 45, (0, 0)), (-(2**0.5), -(2**0.5), 8**0.5, 8**0.5))
