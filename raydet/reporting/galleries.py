"""Galleries of the worst images: selection, and thumbnails with labelled and detected boxes."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from raydet.common.console import counted
from raydet.common.errors import UserError
from raydet.config import DEFAULT_MAX_PIXELS
from raydet.images.collection import ImageRow, TableCollection
from raydet.images.decode import DecodeError, decode
from raydet.measuring.diagnosis.labels import MIN_AP50
from raydet.reporting.judging import JudgedImage, judge
from raydet.reporting.run_tables import RunTables

_MAX_SIDE = 480
"""Longest side of a thumbnail in pixels."""
_QUALITY = 72
_MOST_CLASSES_SHOWN = 10
_CANDIDATES_FOR_CLASS = 200
_MOST_BOXES = 100
_LINKED_SCHEMES = ("http", "https", "file")

_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DrawnBox:
    """Box on a thumbnail.

    Attributes:
        x: Left side, in pixels of the thumbnail, as are y, width and height.
        y: Top side.
        width: Box width.
        height: Box height.
        is_truth: True for a labelled box, False for a detection.
        is_highlighted: The box is one of those that the gallery shows.
        label: Class, and score of a detection.
    """

    x: float
    y: float
    width: float
    height: float
    is_truth: bool
    is_highlighted: bool
    label: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """Image in a gallery.

    Attributes:
        image_id: Image id.
        path: Path in the table; may be empty.
        href: Address of the original for a browser; None if a browser cannot open it.
        caption: Description of its errors.
        thumbnail: Thumbnail as a data URI; None if there is none.
        problem: Reason for a missing thumbnail.
        size_wh: Size of the thumbnail in pixels.
        boxes: Truth first, highlighted boxes last, so that they are drawn on top.
    """

    image_id: int
    path: str = ""
    href: str | None = None
    caption: str = ""
    thumbnail: str | None = None
    problem: str | None = None
    size_wh: tuple[int, int] = (0, 0)
    boxes: tuple[DrawnBox, ...] = ()


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
    image_ids: list[int]
    captions: dict[int, str] = field(default_factory=dict)
    boxes: dict[int, list[tuple[list[float], str, bool]]] = field(default_factory=dict)  # xywh, label, is_truth


def build_galleries(run: RunTables, num_images: int) -> Galleries:
    """Select the worst images and draw them.

    Boxes are judged at IoU 0.5 and the score threshold of the best F1 over all classes. Only selected images are read;
    failures are reported on the page and never stop the report.

    Args:
        run: Tables of the run.
        num_images: Maximum number of images per gallery.
    """
    if num_images == 0:
        return Galleries(galleries=())
    problems: list[str] = []
    counted = _counted_choices(run, num_images)
    of_class = _candidates(run)
    judged: dict[int, JudgedImage] = {}
    wanted = {image_id for choice in counted for image_id in choice.image_ids} | set(of_class)
    suspects = _suspects(run, num_images)
    wanted |= set(suspects.image_ids)
    if wanted:
        try:
            judged = judge(run, sorted(wanted))
        except (UserError, OSError) as error:
            problems.append(f"Boxes cannot be drawn: {error}")
    choices = [*counted, _wrong_class(judged, of_class, num_images), suspects]
    choices = [choice for choice in choices if choice.image_ids]
    rows: dict[int, ImageRow] = {}
    try:
        rows = _read_images(run, sorted({image_id for choice in choices for image_id in choice.image_ids}))
    except (UserError, OSError) as error:
        problems.append(f"Images cannot be shown: {error}")
    thumbnails = {image_id: _thumbnail(row) for image_id, row in rows.items()}
    galleries = tuple(
        Gallery(
            key=choice.key,
            title=choice.title,
            meaning=choice.meaning,
            cards=tuple(
                _card(choice, image_id, judged.get(image_id), rows.get(image_id), thumbnails.get(image_id))
                for image_id in choice.image_ids
            ),
        )
        for choice in choices
    )
    return Galleries(galleries=galleries, problems=tuple(problems), note=_note_on_suspects(run))


def _counted_choices(run: RunTables, num_images: int) -> list[_Choice]:
    """Select the images with the most false positives, and those with the most missed objects."""
    table = run.tables.get("per_image")
    if table is None:
        return []
    image_ids = table["image_id"].to_numpy()
    choices = []
    for key, title, meaning, column, what in (
        ("false", "False positives", "Detections that match no labelled object", "false_positives", "false positive"),
        ("missed", "Missed", "Labelled objects without a detection", "false_negatives", "missed object"),
    ):
        counts = table[column].fill_null(0).to_numpy()
        rows = [row for row in np.lexsort((image_ids, -counts))[:num_images].tolist() if counts[row] > 0]
        captions = {int(image_ids[row]): counted(int(counts[row]), what) for row in rows}
        choices.append(_Choice(key=key, title=title, meaning=meaning, image_ids=list(captions), captions=captions))
    return choices


def _candidates(run: RunTables) -> list[int]:
    """Return images that may contain wrong classes: they have both missed objects and false positives."""
    table = run.tables.get("per_image")
    if table is None:
        return []
    image_ids = table["image_id"].to_numpy()
    both = np.minimum(*(table[name].fill_null(0).to_numpy() for name in ("false_positives", "false_negatives")))
    rows = np.lexsort((image_ids, -both))[:_CANDIDATES_FOR_CLASS]
    return [int(image_ids[row]) for row in rows.tolist() if both[row] > 0]


def _wrong_class(judged: dict[int, JudgedImage], candidates: Sequence[int], num_images: int) -> _Choice:
    counts = {image_id: int(judged[image_id].is_other_class.sum()) for image_id in candidates if image_id in judged}
    best = sorted((image_id for image_id in counts if counts[image_id]), key=lambda one: (-counts[one], one))
    return _Choice(
        key="class",
        title="Wrong class",
        meaning="Detections on a labelled object of another class",
        image_ids=best[:num_images],
        captions={image_id: counted(counts[image_id], "wrong class", "wrong classes") for image_id in best},
    )


def _suspects(run: RunTables, num_images: int) -> _Choice:
    """Select the images with the labels that the detector contradicts most, in table order."""
    choice = _Choice(
        key="suspects",
        title="Suspect labels",
        meaning="Labels to check, those first that the detector contradicts most",
        image_ids=[],
    )
    table = run.tables.get("suspects")
    if table is None:
        return choice
    for row in table.to_pylist():
        image_id = row["image_id"]
        if image_id not in choice.boxes:
            if len(choice.boxes) == num_images:
                continue
            choice.image_ids.append(image_id)
            choice.boxes[image_id] = []
        text = {
            "no_truth": f"missing label? {row['category']}",
            "not_found": f"really there? {row['category']}",
            "other_class": f"{row['category']} or {row['detected']}?",
        }.get(row["kind"], row["kind"])
        label = text if row["score"] is None else f"{text} {row['score']:.2f}"
        if row["bbox"] is not None:
            choice.boxes[image_id].append((row["bbox"], label, row["kind"] == "not_found"))
    for image_id, boxes in choice.boxes.items():
        choice.captions[image_id] = counted(len(boxes), "suspect label")
    return choice


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
    images = TableCollection.of(table)
    wanted, start, rows = pa.array(image_ids, pa.int64()), 0, {}
    for batch in table.iter_batches(["image_id"], batch_size=2**16):
        places = np.flatnonzero(pc.is_in(batch.column("image_id"), wanted).to_numpy(zero_copy_only=False))
        for place in places.tolist():
            rows[batch.column("image_id")[place].as_py()] = start + place
        start += batch.num_rows
    return {image_id: row for image_id, place in rows.items() for row in images.read(place, place + 1)}


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
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size, original_wh


def _card(
    choice: _Choice,
    image_id: int,
    judged: JudgedImage | None,
    row: ImageRow | None,
    thumbnail: tuple[str, tuple[int, int], tuple[int, int]] | str | None,
) -> Card:
    path = row.path if row is not None else ""
    about: dict[str, Any] = {
        "image_id": image_id,
        "path": path,
        "href": original_href(path),
        "caption": choice.captions.get(image_id, ""),
    }
    if thumbnail is None or isinstance(thumbnail, str):
        return Card(**about, problem=thumbnail or "the image was not found")
    data_uri, (width, height), original_wh = thumbnail
    scale = np.array([width / original_wh[0], height / original_wh[1]] * 2)
    boxes = _boxes(choice, image_id, judged)[-_MOST_BOXES:]
    drawn = tuple(
        _drawn(np.asarray(box) * scale, is_truth, highlighted, label) for box, is_truth, highlighted, label in boxes
    )
    return Card(**about, thumbnail=data_uri, size_wh=(width, height), boxes=drawn)


def _drawn(box_xywh: npt.NDArray[np.float64], is_truth: bool, is_highlighted: bool, label: str) -> DrawnBox:
    x, y, width, height = (round(float(value), 1) for value in box_xywh)
    return DrawnBox(x=x, y=y, width=width, height=height, is_truth=is_truth, is_highlighted=is_highlighted, label=label)


def _boxes(choice: _Choice, image_id: int, judged: JudgedImage | None) -> list[tuple[Any, bool, bool, str]]:
    """Return the boxes to draw, highlighted ones last: box, is_truth, is_highlighted, label."""
    boxes: list[tuple[Any, bool, bool, str]] = []
    if judged is not None:
        highlighted = {
            "false": (judged.is_false, None),
            "missed": (None, judged.is_missed),
            "class": (judged.is_other_class, judged.is_taken_for_other),
        }.get(choice.key, (None, None))
        for is_truth, columns in ((True, judged.truth), (False, judged.detections)):
            chosen = highlighted[1] if is_truth else highlighted[0]
            # Among suspects, the other detections would only hide the label in question.
            if choice.key == "suspects" and not is_truth:
                continue
            for number, (box, label) in enumerate(columns):
                boxes.append((box, is_truth, chosen is not None and bool(chosen[number]), label))
    boxes += [(box, is_truth, True, label) for box, label, is_truth in choice.boxes.get(image_id, [])]
    return sorted(boxes, key=lambda box: box[2])


def original_href(path: str) -> str | None:
    """Return the address at which a browser can open an image; None for a relative path or unsupported scheme."""
    if "://" not in path:
        return Path(path).as_uri() if path.startswith("/") else None
    # The part after the host is not escaped yet: blanks and `#` belong to the name.
    scheme, _, rest = path.partition("://")
    if scheme.lower() not in _LINKED_SCHEMES:
        return None
    try:
        urlsplit(f"{scheme}://{rest.partition('/')[0]}")
    except ValueError:
        return None
    return f"{scheme.lower()}://{quote(rest, safe='/:@%?&=+,;~!$()*')}"
