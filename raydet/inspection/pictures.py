"""The chosen images with their labels, each beside what a model in training is shown of it."""

import base64
import io
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from raydet.augmentation.mixing import Partners, Sample, sample_of
from raydet.augmentation.transforms import Augmenter
from raydet.common.boxes import Boxes
from raydet.config import DEFAULT_MAX_PIXELS, AugmentationSpec
from raydet.images.decode import DecodeError, decode
from raydet.images.drawing import class_colours
from raydet.images.references import image_bytes
from raydet.inspection.picks import Pick
from raydet.models.geometry import ResizeRule, resize
from raydet.tables.table import Table
from raydet.training.ordering import MIXUP_P, MOSAIC_P, augmentation_seed

MOST_PAIRS = 160
"""Images shown at most, each as a pair of pictures."""
_BUDGET_BYTES = 6_000_000
"""Of all pictures as they stand on the page; the chart library adds about two million."""
_MAX_SIDE = 360
_QUALITY = 75
_MOST_BOXES = 200
_NUM_PARTNERS = 4


@dataclass(frozen=True, kw_only=True)
class View:
    """The training whose pictures are shown: augmentation, the seed of it, and the model's resize."""

    augmentation: AugmentationSpec
    seed: int
    resize_rule: ResizeRule


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The boxes of one class on a picture: name, colour as `#rrggbb`, how many, and their outlines as an SVG path."""

    name: str
    colour: str
    num_boxes: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A small picture: a data URI, its width and height in pixels, the boxes on it, and the one it is about."""

    uri: str
    size_wh: tuple[int, int]
    outlines: tuple[Outline, ...]
    point: Outline | None = None

    @property
    def num_boxes(self) -> int:
        """Boxes on it."""
        return sum(outline.num_boxes for outline in self.outlines)

    @property
    def num_bytes(self) -> int:
        """About what it takes on the page."""
        return len(self.uri) + sum(2 * len(outline.path) + 120 for outline in self.outlines)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image as it is labelled, and as a model in training sees it.

    Attributes:
        kind: Why it was chosen: its box is the smallest of the class, the median, the largest, or a random one.
        image_id: Its id.
        path: Where it came from; may be empty.
        box_wh: Width and height of the chosen box in pixels.
        size_wh: Of the image in pixels.
        seen_wh: Of what the model sees, in pixels.
        labelled: The image; None where it cannot be read.
        seen: What the model sees.
        problem: Why there is no picture.
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
        """About what it takes on the page."""
        return 500 + sum(drawn.num_bytes for drawn in (self.labelled, self.seen) if drawn is not None)


@dataclass(frozen=True, kw_only=True)
class ClassGallery:
    """The pictures of one class."""

    category: int
    name: str
    pairs: tuple[Pair, ...]


@dataclass
class Painter:
    """Draws pairs; the images it was given last are the partners of the next, where the augmentation mixes images."""

    names: Sequence[str]
    view: View
    augmenter: Augmenter
    recent: deque[Sample] = field(default_factory=lambda: deque(maxlen=_NUM_PARTNERS))

    def pairs(self, row: pa.StructScalar, picks: Sequence[Pick]) -> list[Pair]:
        """The pairs of one image, one for each of its picks."""
        image_id, image, objects = (row[name].as_py() for name in ("image_id", "image", "objects"))
        path = image["path"] or ""
        try:
            pixels = decode(image_bytes(image), max_pixels=DEFAULT_MAX_PIXELS)
        except (DecodeError, OSError) as error:
            return [Pair(kind=pick.kind, image_id=image_id, path=path, problem=str(error)) for pick in picks]
        sample = sample_of(pixels, objects)
        seen = self.seen(sample, image_id)
        drawn_seen = self._drawn(seen, seen.size_hw)
        labelled_wh = (sample.size_hw[1], sample.size_hw[0])
        pairs = []
        for pick in picks:
            width, height = sample.boxes_xywh[pick.number, 2:].tolist()
            pairs.append(
                Pair(
                    kind=pick.kind,
                    image_id=image_id,
                    path=path,
                    box_wh=(width, height),
                    size_wh=labelled_wh,
                    seen_wh=(seen.size_hw[1], seen.size_hw[0]),
                    labelled=self._drawn(sample, sample.size_hw, point=pick.number),
                    seen=drawn_seen,
                )
            )
        return pairs

    def seen(self, sample: Sample, image_id: int) -> Sample:
        """The sample as the first epoch of a training has it: augmented, resized, without crowds."""
        partners = Partners()
        if self.view.augmentation == "strong" and len(self.recent) == _NUM_PARTNERS:
            with_mosaic, with_mixup = np.random.default_rng([self.view.seed, image_id]).random(2) < (MOSAIC_P, MIXUP_P)
            others = tuple(self.recent)
            partners = Partners(mosaic=others[:3] if with_mosaic else (), mixup=others[3:] if with_mixup else ())
        self.recent.append(sample)
        augmented = self.augmenter(sample, seed=augmentation_seed(self.view.seed, 0, image_id), partners=partners)
        height, width = augmented.size_hw
        rule = self.view.resize_rule
        image = resize(augmented.image, rule.target_size_hw((height, width)), rule.resample)
        scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
        kept = np.flatnonzero(~augmented.iscrowd)
        return Sample(
            image,
            augmented.boxes_xywh[kept] * scale,
            augmented.labels[kept],
            augmented.areas[kept],
            augmented.iscrowd[kept],
            augmented.ids[kept],
        )

    def _drawn(self, sample: Sample, size_hw: tuple[int, int], point: int | None = None) -> Drawn:
        picture = Image.fromarray(np.ascontiguousarray(sample.image))
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=_QUALITY)
        scale = np.array([picture.width / size_hw[1], picture.height / size_hw[0]] * 2)
        boxes_xywh = sample.boxes_xywh * scale
        labels = sample.labels[:_MOST_BOXES]
        return Drawn(
            uri=f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
            size_wh=picture.size,
            outlines=tuple(
                self._outline(int(label), boxes_xywh[:_MOST_BOXES][labels == label]) for label in np.unique(labels)
            ),
            point=None if point is None else self._outline(int(sample.labels[point]), boxes_xywh[[point]]),
        )

    def _outline(self, label: int, boxes_xywh: Boxes) -> Outline:
        parts = [f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h{-w:.1f}z" for x, y, w, h in boxes_xywh.tolist()]
        name = self.names[label]
        return Outline(name=name, colour=hex_colours(self.names)[name], num_boxes=len(parts), path="".join(parts))


def hex_colours(names: Sequence[str]) -> dict[str, str]:
    """The colours of the classes, by name, as `#rrggbb`."""
    return {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in class_colours(names).items()}


def draw_galleries(
    table: Table, picks: Mapping[int, Sequence[Pick]], num_boxes: npt.NDArray[np.int64], view: View
) -> tuple[ClassGallery, ...]:
    """Draws the chosen images of each class; those that would make the page too large are left out.

    Every class gets its first picture before any gets its second; the more boxes a class has, the earlier its turn.

    Args:
        table: The images.
        picks: By class, what to show first.
        num_boxes: Of each class, [C].
        view: What a model in training is shown.
    """
    names = [category.name for category in table.categories]
    classes = sorted(picks, key=lambda category: (-int(num_boxes[category]), category))
    rounds = max((len(of_class) for of_class in picks.values()), default=0)
    turns = [picks[category][turn] for turn in range(rounds) for category in classes if turn < len(picks[category])]
    turns = turns[:MOST_PAIRS]
    by_position: dict[int, list[Pick]] = {}
    for pick in turns:
        by_position.setdefault(pick.position, []).append(pick)
    painter = Painter(names, view, Augmenter(view.augmentation))
    drawn: dict[Pick, Pair] = {}
    for position, row in table.rows_at(sorted(by_position)):
        drawn.update(zip(by_position[position], painter.pairs(row, by_position[position]), strict=True))
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
