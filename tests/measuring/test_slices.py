"""Slices by columns and properties: each image is in exactly one slice, and names are readable."""

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydet.common.boxes import as_boxes
from raydet.common.errors import UserError
from raydet.measuring.slices import Slice, slices_of
from raydet.tables.columns import TruthColumns


def truth_of(num_boxes: list[int], *, area: float = 100.0, crowds: int = 0) -> TruthColumns:
    """Return boxes of images whose ids descend while rows ascend; the first `crowds` boxes are crowds."""
    total = sum(num_boxes)
    return TruthColumns(
        image_ids=np.arange(len(num_boxes), 0, -1),
        starts=np.cumsum([0, *num_boxes]),
        boxes_xywh=as_boxes([[0, 0, 10, 10]] * total),
        category=np.zeros(total, dtype=np.int64),
        area=np.full(total, area),
        iscrowd=np.arange(total) < crowds,
    )


def sliced(name: str, values: Any, truth: TruthColumns | None = None) -> dict[str, Slice]:
    column = values if isinstance(values, pa.ChunkedArray | pa.Array) else pa.array(values)
    truth = truth or truth_of([1] * len(column))
    found = slices_of(name, truth, columns={name: column}, sizes_hw=np.full((len(column), 2), 100))
    assert len({item.name for item in found}) == len(found)
    return {item.name: item for item in found}


def members(item: Slice) -> list[int]:
    """Return the ids of the images; ids are 1 … I."""
    assert item.images is not None
    return (np.flatnonzero(item.images) + 1).tolist()


def test_a_slice_for_each_text_and_null_is_unknown() -> None:
    found = sliced("camera", ["rear", "front", None, "rear"], truth_of([1, 2, 0, 4]))
    assert list(found) == ["camera=front", "camera=rear", "camera=unknown"]
    assert [members(item) for item in found.values()] == [[3], [1, 4], [2]]
    assert [item.num_truth for item in found.values()] == [2, 5, 0]
    assert {item.area for item in found.values()} == {"all"}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([True, False, None], ["is_day=false", "is_day=true", "is_day=unknown"]),
        ([3, 1, 10], ["is_day=1", "is_day=3", "is_day=10"]),
        ([0.25, float("nan"), 2.0], ["is_day=0.25", "is_day=2", "is_day=unknown"]),
        (["unknown", None, "a"], ["is_day=a", "is_day=unknown"]),
        (["", "a", "(empty)", None], ["is_day=(empty)", "is_day=a", "is_day=unknown"]),
        ([0.1, 0.1 + 1e-15, 2.0], ["is_day=0.1", "is_day=2"]),
        ([None, None], ["is_day=unknown"]),
        (pa.array(["b", "a", None]).dictionary_encode(), ["is_day=a", "is_day=b", "is_day=unknown"]),
        (pa.chunked_array([["b"], ["a"]]), ["is_day=a", "is_day=b"]),
        ([datetime.date(2024, 5, 1)], ["is_day=2024-05-01"]),
    ],
)
def test_values_have_readable_names(values: Any, names: list[str]) -> None:
    if values == [None, None]:
        values = pa.array(values, pa.string())
    assert list(sliced("is_day", values)) == names


def test_an_unknown_column_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match="no column or property weather; the columns are camera; the properties are"):
        slices_of("weather", truth_of([1]), columns={"camera": pa.array(["a"])}, sizes_hw=np.zeros((1, 2), np.int64))


def test_many_numbers_make_quarters() -> None:
    found = sliced("exposure", [*range(100, 0, -1), None])
    assert list(found) == [
        "exposure=1 to 25", "exposure=26 to 50", "exposure=51 to 75", "exposure=76 to 100", "exposure=unknown",
    ]  # fmt: skip
    assert members(found["exposure=1 to 25"]) == [*range(2, 27)]
    days = [datetime.date(2024, 1, day) for day in range(1, 21)]
    assert next(iter(sliced("time", days))) == "time=2024-01-01 to 2024-01-05"


@given(values=st.lists(st.one_of(st.none(), st.floats(), st.integers(-5, 5).map(float)), min_size=1, max_size=60))
def test_every_image_is_in_exactly_one_slice(values: list[float | None]) -> None:
    found = sliced("x", pa.array(values, pa.float64()))
    total = sum(np.asarray(item.images, dtype=np.int64) for item in found.values())
    assert np.asarray(total).tolist() == [1] * len(values)
    assert sum(item.num_truth for item in found.values()) == len(values)
    if len(set(values)) > 20:
        assert len(found) <= 5


def test_crowding_counts_the_boxes_of_an_image() -> None:
    truth = truth_of([0, 1, 5, 6, 20, 21], crowds=1)
    found = {
        item.name: item for item in slices_of("crowding", truth, columns={}, sizes_hw=np.zeros((6, 2), dtype=np.int64))
    }
    assert {name: members(item) for name, item in found.items()} == {
        "crowding=0": [5, 6], "crowding=1–5": [4], "crowding=6–20": [2, 3], "crowding=21+": [1],
    }  # fmt: skip
    assert found["crowding=0"].num_truth == 0


def test_image_size_is_that_of_the_longer_side() -> None:
    sizes_hw = np.array([[480, 640], [1280, 20], [0, 0], [100, 641], [4000, 3000]])
    found = slices_of("image_size", truth_of([1] * 5), columns={}, sizes_hw=sizes_hw)
    assert {item.name: members(item) for item in found} == {
        "image_size=up to 640 px": [5],
        "image_size=641–1280 px": [2, 4],
        "image_size=over 2560 px": [1],
        "image_size=unknown": [3],
    }


def test_box_size_is_a_size_class_of_the_labelled_box() -> None:
    found = slices_of(
        "box_size", truth_of([2, 2], area=32.0**2, crowds=1), columns={}, sizes_hw=np.zeros((2, 2), dtype=np.int64)
    )
    # Both ends of COCO's size classes are inclusive.
    assert [(item.name, item.area, item.num_truth) for item in found] == [
        ("box_size=small", "small", 3), ("box_size=medium", "medium", 3), ("box_size=large", "large", 0),
    ]  # fmt: skip
    assert all(item.images is None for item in found)


def test_mistakes_say_what_there_is() -> None:
    columns = {"camera": pa.array(["a"]), "city": pa.array(["b"]), "tags": pa.array([["x"]])}
    truth, sizes_hw = truth_of([1]), np.ones((1, 2), dtype=np.int64)
    with pytest.raises(UserError, match=r"--slice-by: .*kamera.*camera, city"):
        slices_of("kamera", truth, columns=columns, sizes_hw=sizes_hw)
    with pytest.raises(UserError, match=r"--slice-by: .*camera.*box_size, crowding, image_size"):
        slices_of("camera", truth, columns={}, sizes_hw=sizes_hw)
    with pytest.raises(UserError, match=r"tags.*list"):
        slices_of("tags", truth, columns=columns, sizes_hw=sizes_hw)
    names = {"file": pa.array([f"{index}.jpg" for index in range(51)])}
    with pytest.raises(UserError, match=r"file .*51 .*0\.jpg.* 50"):
        slices_of("file", truth_of([1] * 51), columns=names, sizes_hw=np.ones((51, 2), dtype=np.int64))
