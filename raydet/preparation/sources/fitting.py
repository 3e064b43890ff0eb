"""Boxes of a source → boxes of the upright image, clipped to it and with an area."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydet.common.boxes import Boxes, as_boxes, clip_xywh, has_area
from raydet.preparation.sources.source import SourceObjects
from raydet.tables.columns import Flags

ROUNDING_PX = 1e-6
"""A box that exceeds the image by no more than this is clipped but not counted: the source rounded its numbers."""
DUPLICATE_PX = 0.01
"""Boxes are equal if their numbers, rounded to this, are; files have at least two decimals."""

CLIPPED = "boxes clipped to their image"
NO_AREA = "boxes without area, dropped"
OUTSIDE = "boxes outside their image, dropped"
REPEATED_KEPT = "boxes that repeat another of their class, kept"
REPEATED_DROPPED = "boxes that repeat another of their class, dropped"


@dataclass(frozen=True)
class FittedObjects:
    """The table's `objects` of one image, and the anomalies of its boxes.

    Attributes:
        objects: Lists of equal length, of the kept boxes.
        findings: Annotation id and detail of each affected box, by kind of finding.
    """

    objects: dict[str, list[Any]]
    findings: dict[str, list[tuple[int, str]]] = field(default_factory=dict)


def fit_objects(
    objects: SourceObjects, size_hw: tuple[int, int], *, turn: int = 1, drop_duplicates: bool = False
) -> FittedObjects:
    """Rotate boxes upright, clip them to the image and drop those without area or with a number that is not finite.

    If the area of a clipped box equalled its width × height, it becomes that of the clipped box; otherwise it stays,
    but at most that of the clipped box. A box is a duplicate if an earlier one has the same category, the same crowd
    flag and, after clipping and within `DUPLICATE_PX`, the same coordinates.

    Args:
        objects: As in the source.
        size_hw: Height and width in pixels of the upright image, to which normalised boxes are relative.
        turn: The EXIF orientation if the boxes were drawn on the unrotated image, else 1; only the quarter turns, 5 to
            8, change boxes.
        drop_duplicates: Drop duplicates too.
    """
    scores = objects.scores
    if not objects.ids:
        nothing: dict[str, list[Any]] = {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
        return FittedObjects(nothing if scores is None else {**nothing, "score": []})
    height, width = size_hw
    scale = np.array([width, height, width, height]) if objects.is_normalised else np.ones(4)
    given = _turn_xywh(as_boxes(objects.boxes_xywh) * scale, size_hw, turn)
    usable = has_area(given)
    given = np.where(usable[:, None], given, 0.0)
    fitted = clip_xywh(given, size_hw)
    inside = has_area(fitted)
    repeated = inside & _repeats(fitted, inside, objects)
    kept = inside & ~repeated if drop_duplicates else inside
    clipped = kept & (np.abs(fitted - given) > ROUNDING_PX).any(axis=1)
    areas = np.asarray(objects.areas, np.float64) * (float(height * width) if objects.is_normalised else 1.0)
    rest = fitted[:, 2] * fitted[:, 3]
    with np.errstate(over="ignore"):  # boxes may reach far beyond the image
        was_of_box = np.isclose(areas, given[:, 2] * given[:, 3], rtol=1e-6)
    areas = np.where(clipped, np.where(was_of_box, rest, np.minimum(areas, rest)), areas)
    places = np.flatnonzero(kept).tolist()
    result = {
        "id": [objects.ids[place] for place in places],
        "bbox": fitted[kept].tolist(),
        "category": [objects.categories[place] for place in places],
        "area": areas[kept].tolist(),
        "iscrowd": [objects.iscrowd[place] for place in places],
    }
    if scores is not None:
        result["score"] = [scores[place] for place in places]
    flags = {
        CLIPPED: clipped,
        NO_AREA: ~usable,
        OUTSIDE: usable & ~inside,
        REPEATED_DROPPED if drop_duplicates else REPEATED_KEPT: repeated,
    }
    return FittedObjects(result, dict(_describe(flags, objects, given, size_hw)))


def _repeats(fitted: Boxes, inside: Flags, objects: SourceObjects) -> Flags:
    """Find boxes that repeat an earlier one, [N]; always false for boxes outside the image."""
    repeated = np.zeros(len(fitted), np.bool_)
    places = np.flatnonzero(inside)
    rounded = np.rint(fitted[places] / DUPLICATE_PX)
    if len(np.unique(rounded[:, 0])) == len(places):
        return repeated
    kinds = np.stack([np.asarray(objects.categories), np.asarray(objects.iscrowd)], axis=1)[places]
    _, first = np.unique(np.concatenate([rounded, kinds], axis=1), axis=0, return_index=True)
    repeated[places] = True
    repeated[places[first]] = False
    return repeated


def _describe(
    flags: dict[str, Flags], objects: SourceObjects, given: Boxes, size_hw: tuple[int, int]
) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    height, width = size_hw
    for kind, which in flags.items():
        if which.any():
            source = objects.boxes_xywh if kind == NO_AREA else given
            yield (
                kind,
                [
                    (objects.ids[place], f"{_numbers(source[place])} in {width} × {height}")
                    for place in np.flatnonzero(which).tolist()
                ],
            )


def _numbers(box: Any) -> str:
    return ", ".join(f"{float(value):.6g}" for value in box)


def _turn_xywh(boxes_xywh: Boxes, size_hw: tuple[int, int], turn: int) -> Boxes:
    """Convert boxes on the unrotated image to the upright image of `size_hw`, [N, 4]."""
    if turn < 5:
        return boxes_xywh
    upright_height, upright_width = size_hw
    left, top, width, height = boxes_xywh.T
    new_left = upright_width - top - height if turn in (6, 7) else top
    new_top = upright_height - left - width if turn in (7, 8) else left
    return np.stack([new_left, new_top, height, width], axis=1)
