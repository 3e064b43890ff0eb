"""Selected images with their labels, each next to the model's view of it in training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pyarrow as pa

from raydet.augmentation.view import SeenImage, View, decoded
from raydet.common.boxes import Boxes, as_boxes, normalised_cxcywh_to_xywh
from raydet.images.decode import DecodeError
from raydet.images.drawing import class_colours
from raydet.images.references import image_bytes
from raydet.inspection.picks import Pick
from raydet.models.geometry import Image
from raydet.reporting.galleries import data_uri
from raydet.tables.schema import LABELLED_COLUMN
from raydet.tables.table import Table
from raydet.training.feeding.mixture import Mixture
from raydet.training.feeding.ordering import RunPlan

MOST_PAIRS = 160
"""Maximum number of images on the page, each shown as a pair."""
_BUDGET_BYTES = 6_000_000
"""Maximum size of all images on the page; the chart library adds about two million bytes."""
_MAX_SIDE = 360
_QUALITY = 75
_MOST_BOXES = 200


@dataclass(frozen=True, kw_only=True)
class Outline:
    """Boxes of one class on an image: name, colour as `#rrggbb`, number, and their outlines as an SVG path."""

    name: str
    colour: str
    num_boxes: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Thumbnail: data URI, width and height in pixels, boxes, and the highlighted box."""

    uri: str
    size_wh: tuple[int, int]
    outlines: tuple[Outline, ...]
    highlighted: Outline | None = None

    @property
    def num_boxes(self) -> int:
        """Number of boxes on the thumbnail."""
        return sum(outline.num_boxes for outline in self.outlines)

    @property
    def num_bytes(self) -> int:
        """Approximate size on the page in bytes."""
        return len(self.uri) + sum(2 * len(outline.path) + 120 for outline in self.outlines)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Image as labelled, and as the model sees it in training.

    Attributes:
        kind: Reason for its selection: its box is the smallest, median, largest or a random one of the class.
        path: Original path; may be empty.
        box_wh: Width and height of the selected box in pixels.
        size_wh: Image size in pixels.
        seen_wh: Size of the model's view in pixels.
        labelled: Labelled image; None if it cannot be read.
    """

    kind: str
    image_id: int
    path: str
    box_wh: tuple[float, float] = (0.0, 0.0)
    size_wh: tuple[int, int] = (0, 0)
    seen_wh: tuple[int, int] = (0, 0)
    labelled: Drawn | None = None
    seen: Drawn | None = None
    problem: str | None = None

    @property
    def num_bytes(self) -> int:
        """Approximate size on the page in bytes."""
        return 500 + sum(drawn.num_bytes for drawn in (self.labelled, self.seen) if drawn is not None)


@dataclass(frozen=True, kw_only=True)
class ClassGallery:
    """Images of one class."""

    category: int
    name: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, kw_only=True)
class FirstEpoch:
    """View of the images in the first epoch of a training run; one that it does not show is seen as in its first step.

    Attributes:
        plan: Assignment of rows to steps, and of mixing partners to rows.
    """

    table: Table | Mixture
    plan: RunPlan
    view: View

    def rows(
        self, positions: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any], Image, SeenImage] | tuple[int, dict[str, Any], None, str]]:
        """Read rows and apply the training's augmentation to them.

        Partner rows are read first and held in memory with their encoded images.

        Yields:
            Position, row, decoded image and augmented image, in table order; None and the reason for an image that
            cannot be read.
        """
        steps = np.maximum(self.plan.steps_of_rows(0), 0)
        partners = {at: self.plan.partner_rows(0, int(steps[at]), at) for at in positions} if self.view.mixes(0) else {}
        # A repetition of a row, within the epoch, has a number beyond the rows.
        num_rows = self.plan.num_rows
        needed = {row % num_rows for one in partners.values() for row in (*one.mosaic, *one.mixup)}
        others = {at: _content(row) for at, row in self.table.rows_at(sorted(needed))}
        for at, scalar in self.table.rows_at(positions):
            row = _content(scalar)
            if at in partners:
                row["mosaic"] = [others[other % num_rows] for other in partners[at].mosaic]
                row["mixup"] = [others[other % num_rows] for other in partners[at].mixup]
            try:
                image, _ = decoded(image_bytes(row["image"]), max_pixels=self.view.max_pixels)
            except DecodeError as error:
                yield at, row, None, str(error)
                continue
            rule = self.view.step_resize_rule(0, int(steps[at]))
            yield at, row, image, self.view.augmented(row, epoch=0, resize_rule=rule)


def _content(row: pa.StructScalar) -> dict[str, Any]:
    names = ["image_id", "image", "width", "height", "objects"]
    return {name: row[name].as_py() for name in (*names, LABELLED_COLUMN) if name in row.type.names}


def _pairs(
    row: dict[str, Any], image: Image | None, seen: SeenImage | str, picks: Sequence[Pick], names: Sequence[str]
) -> list[Pair]:
    """Return one pair per selected box of an image."""
    about = {"image_id": row["image_id"], "path": row["image"]["path"] or ""}
    if image is None or isinstance(seen, str):
        return [Pair(kind=pick.kind, problem=str(seen), **about) for pick in picks]
    boxes_xywh = as_boxes(row["objects"]["bbox"])
    categories = np.asarray(row["objects"]["category"], np.int64)
    seen_hw = (seen.image.shape[0], seen.image.shape[1])
    seen_xywh = normalised_cxcywh_to_xywh(seen.boxes_cxcywh.astype(np.float64), seen_hw)
    drawn_seen = _drawn(seen.image, seen_xywh, seen.categories, names)
    return [
        Pair(
            kind=pick.kind,
            box_wh=(float(boxes_xywh[pick.number, 2]), float(boxes_xywh[pick.number, 3])),
            size_wh=(image.shape[1], image.shape[0]),
            seen_wh=(seen_hw[1], seen_hw[0]),
            labelled=_drawn(image, boxes_xywh, categories, names, highlighted=pick.number),
            seen=drawn_seen,
            **about,
        )
        for pick in picks
    ]


def _drawn(
    image: Image,
    boxes_xywh: Boxes,
    categories: npt.NDArray[np.int64],
    names: Sequence[str],
    highlighted: int | None = None,
) -> Drawn:
    thumbnail = PIL.Image.fromarray(np.ascontiguousarray(image))
    thumbnail.thumbnail((_MAX_SIDE, _MAX_SIDE), PIL.Image.Resampling.BILINEAR)
    boxes_xywh = boxes_xywh * np.array([thumbnail.width / image.shape[1], thumbnail.height / image.shape[0]] * 2)
    shown = categories[:_MOST_BOXES]
    return Drawn(
        uri=data_uri(thumbnail, "JPEG", quality=_QUALITY),
        size_wh=thumbnail.size,
        outlines=tuple(
            _outline(names, category, boxes_xywh[:_MOST_BOXES][shown == category])
            for category in np.unique(shown).tolist()
        ),
        highlighted=(
            None if highlighted is None else _outline(names, int(categories[highlighted]), boxes_xywh[[highlighted]])
        ),
    )


def _outline(names: Sequence[str], category: int, boxes_xywh: Boxes) -> Outline:
    parts = [f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h{-w:.1f}z" for x, y, w, h in boxes_xywh.tolist()]
    name = names[category]
    return Outline(name=name, colour=hex_colours(names)[name], num_boxes=len(parts), path="".join(parts))


def hex_colours(names: Sequence[str]) -> dict[str, str]:
    """Return the colours of the classes by name, as `#rrggbb`."""
    return {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in class_colours(names).items()}


def draw_galleries(
    first_epoch: FirstEpoch, picks: Mapping[int, Sequence[Pick]], num_boxes: npt.NDArray[np.int64]
) -> tuple[ClassGallery, ...]:
    """Draw the selected images of each class, as many as fit the page's size limit.

    Every class gets its first image before any class gets its second; classes with more boxes come first.
    """
    names = [category.name for category in first_epoch.table.categories]
    classes = sorted(picks, key=lambda category: (-int(num_boxes[category]), category))
    rounds = max((len(of_class) for of_class in picks.values()), default=0)
    turns = [picks[category][turn] for turn in range(rounds) for category in classes if turn < len(picks[category])]
    turns = turns[:MOST_PAIRS]
    by_position: dict[int, list[Pick]] = {}
    for pick in turns:
        by_position.setdefault(pick.position, []).append(pick)
    drawn: dict[Pick, Pair] = {}
    for position, row, image, seen in first_epoch.rows(sorted(by_position)):
        of_image = by_position[position]
        drawn.update(zip(of_image, _pairs(row, image, seen, of_image, names), strict=True))
    galleries: dict[int, list[Pair]] = {}
    left = _BUDGET_BYTES
    for pick in turns:
        left -= drawn[pick].num_bytes
        if left < 0:
            break
        galleries.setdefault(pick.category, []).append(drawn[pick])
    return tuple(
        ClassGallery(category=category, name=names[category], pairs=tuple(galleries[category]))
        for category in classes
        if category in galleries
    )
