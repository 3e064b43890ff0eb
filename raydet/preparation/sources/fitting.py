"""Fits a source's boxes to the image as it is: upright, inside its edges, with an area."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from raydet.common.boxes import Boxes, as_boxes, clip_xywh, has_area
from raydet.preparation.sources.source import SourceObjects

ROUNDING_PX = 1e-6
"""What runs out of the image by no more is cut, but not counted: a source's own arithmetic rounds."""
DUPLICATE_PX = 0.01
"""Boxes are the same if their numbers, rounded to this, are: files have two digits or more of a pixel."""

CLIPPED = "boxes that ran out of their image, cut to it"
NO_AREA = "boxes without area, left out"
OUTSIDE = "boxes outside their image, left out"
REPEATED_KEPT = "boxes that repeat another of their class, kept"
REPEATED_DROPPED = "boxes that repeat another of their class, left out"

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FittedObjects:
    """The table's `objects` of one image, and what was odd about the boxes.

    Attributes:
        objects: Lists of equal length, of the boxes that were kept.
        oddities: For each kind of finding, the source's ids of its boxes and what each of them was.
    """

    objects: dict[str, list[Any]]
    oddities: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    @property
    def num_clipped(self) -> int:
        """Boxes cut to the image."""
        return len(self.oddities.get(CLIPPED, []))

    @property
    def num_dropped(self) -> int:
        """Boxes left out because nothing of them is inside the image."""
        return len(self.oddities.get(NO_AREA, [])) + len(self.oddities.get(OUTSIDE, []))


def fit_objects(
    objects: SourceObjects, size_hw: tuple[int, int], *, turn: int = 1, drop_duplicates: bool = False
) -> FittedObjects:
    """Turns boxes upright, cuts them to the image and leaves out those without area or not finite.

    The area of a box that is cut is that of what is left if it was its box's before; else it stays as it is, but never
    above that of what is left. A box is a duplicate if one before it has the same category, crowd flag and, within
    `DUPLICATE_PX`, the same place once both are cut.

    Args:
        objects: As the source has them.
        size_hw: Of the upright image; what normalised boxes are parts of.
        turn: The EXIF orientation, if the boxes were drawn on the unturned picture, else 1; only the quarter turns,
            5 to 8, change them.
        drop_duplicates: Whether to leave out duplicates too.
    """
    if not objects.ids:
        return FittedObjects({"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []})
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
    flags = {
        CLIPPED: clipped,
        NO_AREA: ~usable,
        OUTSIDE: usable & ~inside,
        REPEATED_DROPPED if drop_duplicates else REPEATED_KEPT: repeated,
    }
    return FittedObjects(result, dict(_describe(flags, objects, given, size_hw)))


def _repeats(fitted: Boxes, inside: Flags, objects: SourceObjects) -> Flags:
    """Which boxes repeat an earlier one, [N]; of those that are not inside it says nothing."""
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
    """Boxes on the file's unturned pixels → boxes on the upright image of `size_hw`, [N, 4]."""
    if turn < 5:
        return boxes_xywh
    upright_height, upright_width = size_hw
    left, top, width, height = boxes_xywh.T
    new_left = upright_width - top - height if turn in (6, 7) else top
    new_top = upright_height - left - width if turn in (7, 8) else left
    return np.stack([new_left, new_top, height, width], axis=1)
