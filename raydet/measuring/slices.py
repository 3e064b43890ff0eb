"""Slices of a data set by a column of the images table or by a property of images and boxes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.errors import UserError
from raydet.measuring.numbers.matches import COCO_AREAS
from raydet.tables.columns import Flags, Floats, Integers, TruthColumns

PROPERTIES = ("box_size", "crowding", "image_size")
"""Properties that need no column; a column with one of these names is ignored."""
UNKNOWN = "unknown"
"""Group of the images without a value."""
EMPTY = "(empty)"
"""Name of a text without a character."""

_MAX_VALUES = 50
_MAX_NUMBERS = 12
_CROWDING = ((0, "0"), (5, "1–5"), (20, "6–20"), (math.inf, "21+"))
_IMAGE_SIZE = ((640, "up to 640 px"), (1280, "641–1280 px"), (2560, "1281–2560 px"), (math.inf, "over 2560 px"))


_IN_WORDS = {
    ("box_size", "small"): "small boxes, under 32² px",
    ("box_size", "medium"): "medium boxes, under 96² px",
    ("box_size", "large"): "large boxes, 96² px or more",
    ("crowding", "0"): "images without boxes",
    ("crowding", "21+"): "images with 21 or more boxes",
}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Subset to be measured separately: some images, or the boxes of one size in all images.

    Attributes:
        name: Name in the tables, such as `camera=front`.
        images: Mask of the images, in ascending id order as in `Matches`, bool [I]; None for a box size slice.
        area: Size class of the boxes to measure; "all" for a slice of images.
        num_truth: Number of labelled boxes that count in it; if 0, all values are undefined.
    """

    name: str
    images: Flags | None
    area: str
    num_truth: int


def slices_of(
    name: str,
    truth: TruthColumns,
    *,
    columns: Mapping[str, pa.Array | pa.ChunkedArray],
    sizes_hw: Integers,
    areas: Mapping[str, tuple[float, float]] = COCO_AREAS,
) -> list[Slice]:
    """Return all slices by one column or property; slices of images contain each image exactly once.

    A column of text, booleans or up to 12 distinct numbers yields one slice per value. A column of more numbers, of
    dates or of times yields up to four slices with about as many images each, named by their lowest and highest value.
    Null and NaN are "unknown", and the empty text is "(empty)"; so are texts of these names. Properties: `box_size`,
    COCO's size classes of the labelled box; `crowding`, number of boxes in the image, crowds excluded; `image_size`,
    the longer side of the image.

    `columns` are the extra columns of the images table by name, and `sizes_hw` height and width in pixels, 0 if
    unknown, int64 [I, 2], both in the order of `truth.image_ids`; `areas` are the protocol's size classes.

    Raises:
        UserError: The column does not exist, its type cannot be grouped, or it has more than 50 distinct texts.
    """
    counted = ~truth.iscrowd
    if name == "box_size":
        return _of_box_sizes(truth.area[counted], areas)
    num_boxes = np.bincount(
        np.repeat(np.arange(len(truth.image_ids)), np.diff(truth.starts))[counted], minlength=len(truth.image_ids)
    )
    if name == "crowding":
        place, names = _in_steps(num_boxes, _CROWDING)
    elif name == "image_size":
        place, names = _in_steps(sizes_hw.max(axis=1, initial=0), _IMAGE_SIZE)
        place, names = np.where((sizes_hw <= 0).any(axis=1), len(names), place), [*names, UNKNOWN]
    else:
        place, names = groups_in(name, columns)
    by_id = np.argsort(truth.image_ids)
    boxes_in = np.bincount(place, weights=num_boxes, minlength=len(names)).astype(np.int64)
    return [
        Slice(name=f"{name}={value}", images=(place == index)[by_id], area="all", num_truth=int(boxes_in[index]))
        for index, value in enumerate(names)
        if (place == index).any()
    ]


def in_words(name: str) -> str:
    """Return the name of a slice for readers: `box_size=small` as "small boxes, under 32² px"."""
    subject, _, value = name.partition("=")
    if (subject, value) in _IN_WORDS:
        return _IN_WORDS[subject, value]
    if subject == "crowding":
        return f"images with {value} boxes"
    if subject == "image_size":
        return f"images {'of unknown size' if value == UNKNOWN else value}"
    return f"{subject}: {value}"


def _of_box_sizes(area: Floats, areas: Mapping[str, tuple[float, float]]) -> list[Slice]:
    counts = {size: int(((area >= low) & (area <= high)).sum()) for size, (low, high) in areas.items() if size != "all"}
    return [Slice(name=f"box_size={size}", images=None, area=size, num_truth=count) for size, count in counts.items()]


def _in_steps(values: Integers, steps: Sequence[tuple[float, str]]) -> tuple[Integers, list[str]]:
    """Return the index of each value's step (the first whose upper end is at least the value) and the step names."""
    ends, names = zip(*steps, strict=True)
    return np.searchsorted(ends, values, side="left"), list(names)


def groups_in(name: str, columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> tuple[Integers, list[str]]:
    """Return the group of each value of a column, int64 [I], and the names of the groups in a fixed order.

    Null and NaN are in the group `UNKNOWN`, the last one unless a text has this name; raises as `slices_of` does.
    """
    if name not in columns:
        usable = [column for column, values in columns.items() if _is_usable(values.type)]
        there = f"the columns are {', '.join(usable)}" if usable else "the truth has no extra columns"
        raise UserError(
            f"--slice-by: no column or property {name}; {there}; the properties are {', '.join(PROPERTIES)}"
        )
    values = columns[name].combine_chunks() if isinstance(columns[name], pa.ChunkedArray) else columns[name]
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not _is_usable(values.type):
        raise UserError(
            f"--slice-by: column {name} has the type {values.type}; must be text, numbers, booleans, dates or times"
        )
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)
    if pa.types.is_decimal(values.type):
        values = values.cast(pa.float64())
    distinct = pc.unique(values).drop_null()
    distinct = distinct.take(pc.sort_indices(distinct))
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if is_text and len(distinct) > _MAX_VALUES:
        raise UserError(
            f"--slice-by: column {name} has {len(distinct):,} distinct texts, for example {distinct[0].as_py()!r}; "
            f"the limit is {_MAX_VALUES}"
        )
    place = pc.fill_null(pc.index_in(values, value_set=distinct), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    if is_text or len(distinct) <= _MAX_NUMBERS:
        names = [_label(value) for value in distinct.to_pylist()]
    else:
        place, names = _quarters(place, distinct)
    names = [*names, UNKNOWN]
    # Values of one name are one group, so that no two slices have the same name.
    distinct_names = list(dict.fromkeys(names))
    group_of = np.array([distinct_names.index(own) for own in names])
    return group_of[place], distinct_names  # -1 is the last one


def _is_usable(dtype: pa.DataType) -> bool:
    types = pa.types
    kinds = (types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating)
    more = (types.is_decimal, types.is_date, types.is_timestamp, types.is_dictionary)
    return any(kind(dtype) for kind in (*kinds, *more))


def _quarters(place: Integers, distinct: pa.Array) -> tuple[Integers, list[str]]:
    """Split the images into up to four groups of similar size, keeping equal values together.

    `place` is the index of each image's value in `distinct`, which is ascending; -1 for none.
    """
    known = np.sort(place[place >= 0])
    # A group ends at the value that a quarter, half or three quarters of the images do not exceed.
    ends = np.unique(known[(len(known) * np.arange(1, 5) + 3) // 4 - 1])
    group = np.where(place < 0, -1, np.searchsorted(ends, place, side="left"))
    lows = [0, *(ends[:-1] + 1).tolist()]
    names = []
    for low, high in zip(lows, ends.tolist(), strict=True):
        first, last = _label(distinct[low].as_py()), _label(distinct[high].as_py())
        names.append(first if low == high else f"{first} to {last}")
    return group, names


def _label(value: Any) -> str:
    """Return a value as a name: lower-case booleans, short numbers, ISO 8601 times, texts that are not empty."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    return value.isoformat() if hasattr(value, "isoformat") else str(value) or EMPTY
