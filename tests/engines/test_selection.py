"""Selection of detections, and valid class names."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydet.common.boxes import Boxes
from raydet.common.errors import UserError
from raydet.engines import selection
from raydet.engines.selection import check_classes, non_maximum_suppression, select
from raydet.models.detector import Detections
from raydet.tables.schema import Category

CATEGORIES = (Category(7, "cat"), Category(3, "dog"), Category(9, "remote control"), Category(11, "cat"))
ALL_OFF = {"score_threshold": 0.0, "top_k": None, "categories": None, "class_agnostic_nms": None}


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    values = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return Detections(values[:, :4], values[:, 4], values[:, 5].astype(np.int64))


FOUND = detections(
    (0, 0, 10, 10, 0.9, 0),
    (1, 0, 10, 10, 0.8, 1),
    (50, 50, 4, 4, 0.5, 1),
    (0, 1, 10, 10, 0.5, 0),
    (70, 0, 5, 5, 0.2, 2),
)


def chosen(**options: object) -> list[int]:
    """Return the left and top edges of the rows of FOUND that remain."""
    left = select(FOUND, **{**ALL_OFF, **options})  # type: ignore[arg-type]
    places = [tuple(box) for box in FOUND.boxes_xywh.tolist()]
    rows = [places.index(tuple(box)) for box in left.boxes_xywh.tolist()]
    np.testing.assert_array_equal(left.scores, FOUND.scores[rows])
    np.testing.assert_array_equal(left.categories, FOUND.categories[rows])
    assert [str(values.dtype) for values in (left.boxes_xywh, left.scores, left.categories)] == [
        "float64",
        "float64",
        "int64",
    ]
    return rows


@pytest.mark.parametrize("widest", [30.0, 400.0])
def test_suppression_among_neighbours_keeps_what_torchvision_keeps(
    monkeypatch: pytest.MonkeyPatch, widest: float
) -> None:
    rng = np.random.default_rng(int(widest))
    num = 2_000
    centres, sides = rng.uniform(-50, 500, (num, 2)), rng.uniform(0, 30, (num, 2))
    sides[:40] = rng.uniform(0, widest, (40, 2))
    boxes = np.concatenate([centres, sides], axis=1)
    boxes[200:400] = boxes[:200]  # equal boxes, and boxes without area
    boxes[50:60, 2:] = 0
    order = rng.permutation(num)
    boxes, scores = boxes[order], np.sort(rng.integers(1, 100, num) / 100)[::-1]
    for categories in (None, rng.integers(0, 3, num)):
        expected = non_maximum_suppression(boxes, scores, 0.4, categories)
        with monkeypatch.context() as patch:
            patch.setattr("raydet.engines.selection._MOST_COMPARED", 0)
            found = non_maximum_suppression(boxes, scores, 0.4, categories)
        assert 0 < len(expected) < num
        np.testing.assert_array_equal(found, expected)


def test_few_boxes_of_a_large_picture_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    num_compared = 0

    def counted(boxes_xyxy: Boxes, other_xyxy: Boxes) -> Boxes:
        nonlocal num_compared
        num_compared += len(boxes_xyxy) * len(other_xyxy)
        return real(boxes_xyxy, other_xyxy)

    real = selection._ious
    monkeypatch.setattr(selection, "_ious", counted)
    rng = np.random.default_rng(0)
    num = 25_000
    boxes = np.concatenate([rng.uniform(0, 10_000, (num, 2)), rng.uniform(5, 60, (num, 2))], axis=1)
    kept = non_maximum_suppression(boxes, np.linspace(1, 0.1, num), 0.3)
    assert 0.9 * num < len(kept) < num and 0 < num_compared < 250 * num


def test_with_all_off_the_same_object_comes_back() -> None:
    assert select(FOUND, **ALL_OFF) is FOUND  # type: ignore[arg-type]
    nothing = detections()
    assert select(nothing, score_threshold=0.5, top_k=3, categories=[1], class_agnostic_nms=0.5) is nothing


def test_each_option_leaves_out_what_it_says() -> None:
    assert chosen(score_threshold=0.5) == [0, 1]
    assert chosen(score_threshold=0.49) == [0, 1, 2, 3]
    assert chosen(top_k=2) == [0, 1]
    assert chosen(top_k=9) == [0, 1, 2, 3, 4]
    assert chosen(categories=[1, 2]) == [1, 2, 4]
    assert chosen(categories=[3]) == []
    assert chosen(class_agnostic_nms=0.5) == [0, 2, 4]
    # The IoU of the first two is 9 / 11.
    assert chosen(class_agnostic_nms=0.82) == [0, 1, 2, 3, 4]


def test_a_box_that_is_not_wanted_suppresses_none_and_the_best_are_counted_last() -> None:
    assert chosen(categories=[1], class_agnostic_nms=0.5) == [1, 2]
    assert chosen(class_agnostic_nms=0.5, top_k=2) == [0, 2]
    assert chosen(score_threshold=0.3, categories=[0, 1], class_agnostic_nms=0.5, top_k=5) == [0, 2]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0.2, 0.5, 0.8]))))
def test_order_is_kept_and_no_two_left_overlap(boxes: list[tuple[int, int, float]]) -> None:
    rows = sorted(
        ((x, y, 10, 10, score, number % 3) for number, (x, y, score) in enumerate(boxes)), key=lambda r: -r[4]
    )
    found = detections(*rows)
    left = select(found, score_threshold=0.2, top_k=None, categories=None, class_agnostic_nms=0.3)
    kept: list[int] = []
    for row in range(len(rows)):
        if found.scores[row] > 0.2 and all(
            _iou(found.boxes_xywh[row], found.boxes_xywh[other]) <= 0.3 for other in kept
        ):
            kept.append(row)
    np.testing.assert_array_equal(left.boxes_xywh, found.boxes_xywh[kept])
    np.testing.assert_array_equal(left.categories, found.categories[kept])


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    sides = np.minimum(first[:2] + first[2:], second[:2] + second[2:]) - np.maximum(first[:2], second[:2])
    shared = float(np.maximum(sides, 0).prod())
    return float(shared / (first[2] * first[3] + second[2] * second[3] - shared))


def test_names_of_classes_become_their_indices() -> None:
    assert check_classes(None, CATEGORIES) is None
    assert check_classes(["remote control", "dog"], CATEGORIES) == (1, 2)
    assert check_classes(["cat"], CATEGORIES) == (0, 3)


def test_an_unknown_class_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"cow, Cat.*cat, dog, remote control"):
        check_classes(["dog", "cow", "Cat"], CATEGORIES)
    with pytest.raises(UserError, match="--classes"):
        check_classes([], CATEGORIES)
    many = [Category(number, f"c{number}") for number in range(365)]
    with pytest.raises(UserError, match=r"c99 .*265"):
        check_classes(["c365"], many)


def test_classes_are_checked_without_torch() -> None:
    heavy = {"torch", "torchvision", "transformers", "ray"}
    code = f"import sys, raydet.engines.selection; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
