"""The `objects` of one row of a Hugging Face data set → its boxes, from any of the common layouts.

Boxes come as a struct of lists (`{"bbox": [[…], …], "category": […]}`), as a list of structs (`[{"bbox": […],
"category": …}, …]`), or as JSON text of one of these. Formats of a box:

- `coco`: (left, top, width, height) in pixels.
- `voc`: (left, top, right, bottom) in pixels, edges from 0 rather than pixel numbers: width = right - left.
- `yolo`: (centre x, centre y, width, height), relative to the image.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from raydet.config.preparing import BboxFormat

_Box = tuple[float, float, float, float]

NAMES: Mapping[str, tuple[str, ...]] = {
    "bbox": ("bbox", "bboxes", "box", "boxes"),
    "category": ("category", "categories", "category_id", "category_ids", "label", "labels", "class", "classes"),
    "id": ("id", "ids", "bbox_id", "annotation_id"),
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "is_crowd"),
}
"""Names of the fields of `objects`; the first one present is used."""

MAX_ANNOTATION_ID = 2**63
"""Exclusive upper limit of annotation ids, which are stored in an int64 column."""


@dataclass(frozen=True)
class RowObjects:
    """The boxes of one row that have a class and four numbers, and the anomalies of the others.

    Attributes:
        ids: As in the row; None if missing or not an integer.
        boxes_xywh: (left, top, width, height), in pixels or, for `yolo`, relative to the image, [N].
        categories: Names or numbers, as in the row, [N].
        areas: As in the row, or that of the box if missing, in the units of the boxes, [N].
        iscrowd: True if the box marks a crowd, [N].
        findings: Number of dropped boxes by kind.
        refusal: Reason why the objects cannot be read; None if they can.
    """

    ids: list[int | None] = field(default_factory=list)
    boxes_xywh: list[_Box] = field(default_factory=list)
    categories: list[int | str] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    iscrowd: list[bool] = field(default_factory=list)
    findings: Mapping[str, int] = field(default_factory=dict)
    refusal: str | None = None


def parse_objects(value: Any, bbox_format: BboxFormat) -> RowObjects:
    """Read the objects of one row from Arrow: a dict of lists, a list of dicts, JSON text, or None for no objects."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return RowObjects(refusal="its objects are not valid JSON")
    columns = _columns(value)
    if columns is None:
        return RowObjects(refusal="its objects are neither lists in a struct nor structs in a list")
    if not columns:
        return RowObjects()
    names = names_in(tuple(columns))
    if names["bbox"] is None or names["category"] is None:
        missing = "boxes (bbox)" if names["bbox"] is None else "classes (category)"
        return RowObjects(refusal=f"its objects have no {missing}")
    lists = {key: columns[name] for key, name in names.items() if name is not None and columns[name] is not None}
    if not all(isinstance(items, list) for items in lists.values()):
        return RowObjects(refusal="its objects are neither lists in a struct nor structs in a list")
    lengths = {len(items) for items in lists.values()}
    if not {"bbox", "category"} <= lists.keys():
        # pandas writes null for an empty list.
        return RowObjects() if lengths <= {0} else RowObjects(refusal="its objects have lists of different lengths")
    if len(lengths) > 1:
        return RowObjects(refusal="its objects have lists of different lengths")
    return _kept(lists, bbox_format)


@lru_cache(maxsize=64)
def names_in(fields: tuple[str, ...]) -> dict[str, str | None]:
    """Return the field of `objects` for each key of `NAMES`; None for an absent field."""
    by_lower = {field.lower(): field for field in reversed(fields)}
    return {key: next((by_lower[name] for name in names if name in by_lower), None) for key, names in NAMES.items()}


def _columns(value: Any) -> dict[str, Any] | None:
    """Convert any layout to a struct of lists; empty if there is no object."""
    if value is None or value == []:
        return {}
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        names = dict.fromkeys(name for item in value for name in item)
        return {name: [item.get(name) for item in value] for name in names}
    return None


def _kept(lists: Mapping[str, list[Any]], bbox_format: BboxFormat) -> RowObjects:
    findings: Counter[str] = Counter()
    result = RowObjects(findings=findings)
    nothing = [None] * len(lists["bbox"])
    columns = [lists.get(key, nothing) for key in ("bbox", "category", "id", "area", "iscrowd")]
    for bbox, category, annotation_id, area, iscrowd in zip(*columns, strict=True):
        numbers = _four_numbers(bbox)
        known = _integer(category) if not isinstance(category, str) else category
        if numbers is None:
            findings["boxes that are not four numbers, dropped"] += 1
        elif known is None:
            findings["boxes without a class, dropped"] += 1
        else:
            box_xywh = _TO_XYWH[bbox_format](numbers)
            result.ids.append(_integer(annotation_id))
            result.boxes_xywh.append(box_xywh)
            result.categories.append(known)
            result.areas.append(_area(area, box_xywh, bbox_format))
            result.iscrowd.append(bool(iscrowd))
    return result


def _from_corners(box_xyxy: _Box) -> _Box:
    left, top, right, bottom = box_xyxy
    return left, top, right - left, bottom - top


def _from_centre(box_cxcywh: _Box) -> _Box:
    cx, cy, width, height = box_cxcywh
    return cx - width / 2, cy - height / 2, width, height


_TO_XYWH: Mapping[BboxFormat, Callable[[_Box], _Box]] = {
    "coco": lambda box_xywh: box_xywh,
    "voc": _from_corners,
    "yolo": _from_centre,
}


def _four_numbers(bbox: Any) -> _Box | None:
    """Return the numbers of a box; null becomes NaN, so that the box has no area and is counted as such."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    try:
        a, b, c, d = (math.nan if number is None else float(number) for number in bbox)
    except (TypeError, ValueError):
        return None
    return a, b, c, d


def _integer(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_one = isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_ANNOTATION_ID
    return value if is_one else None


def _area(area: Any, box_xywh: _Box, bbox_format: BboxFormat) -> float:
    """Return the stated area; that of the box if none is valid, and always for boxes relative to the image."""
    is_stated = bbox_format != "yolo" and isinstance(area, int | float) and math.isfinite(area) and area >= 0
    return float(area) if is_stated else box_xywh[2] * box_xywh[3]
