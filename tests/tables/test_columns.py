"""Columns of boxes: selection of images, and values read from Arrow buffers."""

import numpy as np
import pyarrow as pa
import pytest

from raydet.tables.columns import DetectionColumns, TruthColumns, numbers_of, places_in, take_detections, take_truth


def made_columns() -> tuple[TruthColumns, DetectionColumns]:
    boxes = np.arange(16.0).reshape(4, 4)
    starts, category = np.array([0, 1, 1, 4]), np.arange(4)
    truth = TruthColumns(
        image_ids=np.array([3, 5, 8]),
        starts=starts,
        boxes_xywh=boxes,
        category=category,
        area=np.arange(4.0),
        iscrowd=np.zeros(4, bool),
    )
    return truth, DetectionColumns(starts=starts, boxes_xywh=boxes, scores=np.arange(4.0) / 4, category=category)


def test_images_are_taken_in_any_order() -> None:
    truth, found = made_columns()
    taken = take_truth(truth, np.array([2, 0]))
    assert taken.image_ids.tolist() == [8, 3]
    assert (taken.starts.tolist(), taken.category.tolist()) == ([0, 3, 4], [1, 2, 3, 0])
    with_none = take_detections(found, np.array([-1, 2, -1, 0]))
    assert (with_none.starts.tolist(), with_none.category.tolist()) == ([0, 0, 3, 3, 4], [1, 2, 3, 0])
    nothing = DetectionColumns(
        starts=np.zeros(1, np.int64), boxes_xywh=np.zeros((0, 4)), scores=np.zeros(0), category=np.zeros(0, np.int64)
    )
    assert take_detections(nothing, np.array([-1, -1])).starts.tolist() == [0, 0, 0]
    assert take_truth(truth, np.zeros(0, np.int64)).starts.tolist() == [0]


@pytest.mark.parametrize(("first", "last"), [(0, 3), (0, 1), (1, 2), (1, 3), (2, 3)])
def test_images_that_stand_together_are_not_copied(first: int, last: int) -> None:
    truth, found = made_columns()
    images = np.arange(first, last)
    # Reversed images take the copying path to the same boxes.
    for taken, copied in (
        (take_truth(truth, images), take_truth(take_truth(truth, images[::-1]), np.arange(len(images))[::-1])),
        (take_detections(found, images), take_detections(take_detections(found, images[::-1]), images[::-1] - first)),
    ):
        assert vars(taken).keys() == vars(copied).keys()
        for name, values in vars(taken).items():
            np.testing.assert_equal(values, vars(copied)[name], err_msg=name)
    taken_boxes = take_detections(found, images).boxes_xywh
    assert len(taken_boxes) == 0 or np.shares_memory(taken_boxes, found.boxes_xywh)
    assert np.shares_memory(take_truth(truth, np.array([2])).area, truth.area)


def test_places_of_what_is_known_and_of_what_is_not() -> None:
    places, is_known = places_in(np.array([3, 5, 8]), np.array([8, 9, 3, 1, 5]))
    assert is_known.tolist() == [True, False, True, False, True]
    assert places[is_known].tolist() == [2, 0, 1]


@pytest.mark.parametrize("dtype", [pa.int64(), pa.int32(), pa.float64(), pa.float32(), pa.bool_()])
def test_numbers_are_taken_from_memory_as_arrow_has_them(dtype: pa.DataType) -> None:
    array = pa.array([1, 0, None, 1, None, 0, 1, 1, 1, 0, 1], type=pa.int64()).cast(dtype)
    for part in (array, array[3:], array[4:9], array[:0], array.drop_null(), array.drop_null()[2:]):
        expected = part.fill_null(pa.scalar(0, pa.int64()).cast(dtype)).to_numpy(zero_copy_only=False)
        assert numbers_of(part).dtype == expected.dtype
        assert numbers_of(part).tolist() == expected.tolist()
