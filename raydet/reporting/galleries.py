"""Galleries of the worst images: selection, and thumbnails with labelled and detected boxes."""

import base64
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
from PIL import Image

from raydet.common.console import counted
from raydet.common.errors import UserError
from raydet.config import DEFAULT_MAX_PIXELS
from raydet.images.collection import ImageRow, TableCollection
from raydet.images.decode import DecodeError, decode
from raydet.measuring.diagnosis.labels import MIN_AP50
from raydet.reporting.answered import Answered
from raydet.reporting.judging import JudgedImage, judge
from raydet.reporting.labels import Label, place_labels
from raydet.reporting.run_tables import RunTables

_MAX_SIDE = 480
"""Longest side of a thumbnail in pixels."""
_QUALITY = 72
_MOST_CLASSES_SHOWN = 10
_CANDIDATES_FOR_CLASS = 200
_MOST_BOXES = 100
_LINKED_SCHEMES = ("http", "https", "file")


@dataclass(frozen=True)
class DrawnBox:
    """Box on a thumbnail: left, top, width and height in its pixels.

    Attributes:
        is_truth: True for a labelled box, False for a detection.
        is_highlighted: The box is one of those that the gallery shows.
        name: Class, and score of a detection.
    """

    x: float
    y: float
    width: float
    height: float
    is_truth: bool
    is_highlighted: bool
    name: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """Image in a gallery.

    Attributes:
        href: Address of the original for a browser; None if a browser cannot open it.
        caption: Description of its errors.
        thumbnail: Data URI; None if there is none, for the reason in `problem`.
        size_wh: Size of the thumbnail in pixels.
        boxes: Truth first, highlighted boxes last, so that they are drawn on top.
        labels: Names of the highlighted boxes, or the numbers of `legend`.
    """

    image_id: int
    path: str = ""
    href: str | None = None
    caption: str = ""
    thumbnail: str | None = None
    problem: str | None = None
    size_wh: tuple[int, int] = (0, 0)
    boxes: tuple[DrawnBox, ...] = ()
    labels: tuple[Label, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Tab of thumbnails, worst images first."""

    key: str
    title: str
    meaning: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, kw_only=True)
class Galleries:
    """All galleries, the reasons for missing galleries or thumbnails, and a note on what is left out."""

    galleries: tuple[Gallery, ...]
    problems: tuple[str, ...] = ()
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Images that a gallery shows, and the boxes that it highlights."""

    key: str
    title: str
    meaning: str
    captions: dict[int, str]
    boxes: dict[int, list[tuple[list[float], str, bool]]] = field(default_factory=dict)  # xywh, label, is_truth


def build_galleries(run: RunTables, num_images: int, answered: Answered | None = None) -> Galleries:
    """Select the worst images and draw them.

    Boxes are judged at IoU 0.5 and the score threshold of the best F1 over all classes. Only selected images are read;
    failures are reported on the page and never stop the report. `num_images` is the maximum per gallery. Answers, if
    given, are drawn beside the names of detections.
    """
    if num_images == 0:
        return Galleries(galleries=())
    problems: list[str] = []
    images = run.tables.get("per_image")
    of_class, suspects = [] if images is None else _candidates(images), _suspects(run, num_images)
    choices = [*([] if images is None else _counted_choices(images, num_images)), suspects]
    judged: dict[int, JudgedImage] = {}
    if wanted := {*of_class, *(image_id for choice in choices for image_id in choice.captions)}:
        try:
            judged = judge(run, sorted(wanted))
            judged = judged if answered is None else answered.beside(judged)
        except (UserError, OSError) as error:
            problems.append(f"Boxes cannot be drawn: {error}")
    choices.insert(-1, _wrong_class(judged, of_class, num_images))
    choices = [choice for choice in choices if choice.captions]
    rows: dict[int, ImageRow] = {}
    try:
        rows = _read_images(run, sorted({image_id for choice in choices for image_id in choice.captions}))
    except (UserError, OSError) as error:
        problems.append(f"Images cannot be shown: {error}")
    thumbnails = {image_id: _thumbnail(row) for image_id, row in rows.items()}
    galleries = []
    for choice in choices:
        found = [(item, judged.get(item), rows.get(item), thumbnails.get(item)) for item in choice.captions]
        cards = tuple(_card(choice, *of_image) for of_image in found)
        galleries.append(Gallery(key=choice.key, title=choice.title, meaning=choice.meaning, cards=cards))
    return Galleries(galleries=tuple(galleries), problems=tuple(problems), note=_note_on_suspects(run))


def _counted_choices(table: pa.Table, num_images: int) -> list[_Choice]:
    """Select the images with the most false positives, and those with the most missed objects."""
    image_ids = table["image_id"].to_numpy()
    choices = []
    for key, title, meaning, column, what in (
        ("false", "False positives", "Detections that match no labelled object", "false_positives", "false positive"),
        ("missed", "Missed", "Labelled objects without a detection", "false_negatives", "missed object"),
    ):
        counts = table[column].fill_null(0).to_numpy()
        rows = [row for row in np.lexsort((image_ids, -counts))[:num_images].tolist() if counts[row] > 0]
        captions = {int(image_ids[row]): counted(int(counts[row]), what) for row in rows}
        choices.append(_Choice(key=key, title=title, meaning=meaning, captions=captions))
    return choices


def _candidates(table: pa.Table) -> list[int]:
    """Return images that may contain wrong classes: they have both missed objects and false positives."""
    image_ids = table["image_id"].to_numpy()
    both = np.minimum(*(table[name].fill_null(0).to_numpy() for name in ("false_positives", "false_negatives")))
    rows = np.lexsort((image_ids, -both))[:_CANDIDATES_FOR_CLASS]
    return [int(image_ids[row]) for row in rows.tolist() if both[row] > 0]


def _wrong_class(judged: dict[int, JudgedImage], candidates: Sequence[int], num_images: int) -> _Choice:
    counts = {image_id: int(judged[image_id].is_other_class.sum()) for image_id in candidates if image_id in judged}
    best = sorted((image_id for image_id in counts if counts[image_id]), key=lambda one: (-counts[one], one))[
        :num_images
    ]
    return _Choice(
        key="class",
        title="Wrong class",
        meaning="Detections on a labelled object of another class",
        captions={image_id: counted(counts[image_id], "wrong class", "wrong classes") for image_id in best},
    )


def _suspects(run: RunTables, num_images: int) -> _Choice:
    """Select the images with the labels that the detector contradicts most, in table order."""
    table = run.tables.get("suspects")
    boxes: dict[int, list[tuple[list[float], str, bool]]] = {}
    for row in [] if table is None else table.to_pylist():
        if row["image_id"] not in boxes and len(boxes) == num_images:
            continue
        text = {
            "no_truth": f"missing label? {row['category']}",
            "not_found": f"really there? {row['category']}",
            "other_class": f"{row['category']} or {row['detected']}?",
        }.get(row["kind"], row["kind"])
        label = text if row["score"] is None else f"{text} {row['score']:.2f}"
        of_image = boxes.setdefault(row["image_id"], [])
        if row["bbox"] is not None:
            of_image.append((row["bbox"], label, row["kind"] == "not_found"))
    return _Choice(
        key="suspects",
        title="Suspect labels",
        meaning="Labels to check, those first that the detector contradicts most",
        captions={image_id: counted(len(of_image), "suspect label") for image_id, of_image in boxes.items()},
        boxes=boxes,
    )


def _note_on_suspects(run: RunTables) -> str | None:
    """Name the classes whose labels are not doubted, because the detector is too weak."""
    known = {name: run.value("AP50", name).value for name in run.classes}
    weak = [name for name, value in known.items() if value is not None and value < MIN_AP50]
    if not weak:
        return None
    shown = ", ".join(weak[:_MOST_CLASSES_SHOWN]) + (" …" if len(weak) > _MOST_CLASSES_SHOWN else "")
    of_classes = "" if all(name in weak for name, value in known.items() if value is not None) else f" of {shown}"
    return (
        f"Suspect labels{of_classes} are not listed: with an AP50 below {MIN_AP50:g}, most disagreements between "
        "labels and detections are errors of the detector."
    )


def _read_images(run: RunTables, image_ids: Sequence[int]) -> dict[int, ImageRow]:
    """Read the encoded images from the truth, loading only the row groups that contain them."""
    if not image_ids:
        return {}
    table = run.truth
    images, known = TableCollection.of(table), [np.zeros(0, np.int64)]
    known += [batch.column("image_id").to_numpy() for batch in table.iter_batches(["image_id"], batch_size=2**16)]
    places = np.flatnonzero(np.isin(np.concatenate(known), image_ids)).tolist()
    return {row.image_id: row for place in places for row in images.read(place, place + 1)}


def _thumbnail(row: ImageRow) -> tuple[str, tuple[int, int], tuple[int, int]] | str:
    """Return a data URI with its size and the original size, each (width, height); or the reason for a failure."""
    if row.data is None:
        return row.error or "the image can no longer be read"
    try:
        pixels = decode(row.data, max_pixels=DEFAULT_MAX_PIXELS, at_least_hw=(_MAX_SIDE, _MAX_SIDE))
    except DecodeError as error:
        return str(error)
    image = Image.fromarray(pixels)
    original_wh = (row.size_hw[1], row.size_hw[0]) if row.size_hw else image.size
    image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "WEBP", quality=_QUALITY, method=4), image.size, original_wh


def _card(
    choice: _Choice,
    image_id: int,
    judged: JudgedImage | None,
    row: ImageRow | None,
    thumbnail: tuple[str, tuple[int, int], tuple[int, int]] | str | None,
) -> Card:
    path = row.path if row is not None else ""
    card = Card(image_id=image_id, path=path, href=original_href(path), caption=choice.captions[image_id])
    if thumbnail is None or isinstance(thumbnail, str):
        return replace(card, problem=thumbnail or "the image was not found")
    uri, size_wh, original_wh = thumbnail
    scale = np.array([size_wh[0] / original_wh[0], size_wh[1] / original_wh[1]] * 2)
    drawn = []
    for box_xywh, is_truth, is_highlighted, label in _boxes(choice, image_id, judged)[-_MOST_BOXES:]:
        x, y, width, height = np.round(np.asarray(box_xywh) * scale, 1).tolist()
        drawn.append(DrawnBox(x, y, width, height, is_truth, is_highlighted, label))
    marked = [box for box in drawn if box.is_highlighted]
    areas = [(box.x, box.y, box.width, box.height) for box in marked]
    labels, legend = place_labels(areas, [box.name for box in marked], size_wh)
    return replace(card, thumbnail=uri, size_wh=size_wh, boxes=tuple(drawn), labels=labels, legend=legend)


def _boxes(choice: _Choice, image_id: int, judged: JudgedImage | None) -> list[tuple[Any, bool, bool, str]]:
    """Return the boxes to draw, highlighted ones last: box, is_truth, is_highlighted, label."""
    boxes = [(box, is_truth, True, label) for box, label, is_truth in choice.boxes.get(image_id, [])]
    if judged is not None:
        nothing = np.zeros(len(judged.truth)), np.zeros(len(judged.detections))
        of_truth, of_detections = {
            "false": (nothing[0], judged.is_false),
            "missed": (judged.is_missed, nothing[1]),
            "class": (judged.is_taken_for_other, judged.is_other_class),
        }.get(choice.key, nothing)
        # Among suspects, the other detections would only hide the label in question.
        detections = [] if choice.key == "suspects" else judged.detections
        boxes[:0] = [
            (box, is_truth, bool(flags[number]), label)
            for is_truth, flags, boxed in ((True, of_truth, judged.truth), (False, of_detections, detections))
            for number, (box, label) in enumerate(boxed)
        ]
    return sorted(boxes, key=lambda box: box[2])


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """Encode an image as a data URI; `kind` and the options are those of `Image.save`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def original_href(path: str) -> str | None:
    """Return the address at which a browser can open an image; None for a relative path or unsupported scheme."""
    if "://" not in path:
        return Path(path).as_uri() if path.startswith("/") else None
    scheme, _, rest = path.partition("://")
    with contextlib.suppress(ValueError):
        urlsplit(f"{scheme}://{rest.partition('/')[0]}")
        if scheme.lower() in _LINKED_SCHEMES:
            # The part after the host is not escaped yet: blanks and `#` belong to the name.
            return f"{scheme.lower()}://{quote(rest, safe='/:@%?&=+,;~!$()*')}"
    return None
