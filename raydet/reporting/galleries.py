"""The images in which most goes wrong: which they are, and small pictures of them with what was labelled and found."""

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

from raydet.common.errors import UserError
from raydet.config import DEFAULT_MAX_PIXELS
from raydet.images.collection import ImageRow, TableCollection
from raydet.images.decode import DecodeError, decode
from raydet.reporting.judging import JudgedImage, judge
from raydet.reporting.run_tables import RunTables

_MAX_SIDE = 480
"""Longest side of a picture in pixels."""
_QUALITY = 72
_CANDIDATES_FOR_CLASS = 200
_MOST_BOXES = 100
_LINKED_SCHEMES = ("http", "https", "file")

_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DrawnBox:
    """A box on a small picture.

    Attributes:
        x: Left side, y, width and height in pixels of the small picture.
        y: Top side.
        width: Of the box.
        height: Of the box.
        is_truth: A labelled box; otherwise a detection.
        is_point: What the gallery is about.
        label: Class, and score of a detection.
    """

    x: float
    y: float
    width: float
    height: float
    is_truth: bool
    is_point: bool
    label: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """An image in a gallery.

    Attributes:
        image_id: Its id.
        path: As the table has it; may be empty.
        href: Where a browser finds the original; None where it cannot.
        caption: What is wrong with it.
        picture: A data URI; None where there is none.
        problem: Why there is no picture.
        size_wh: Of the small picture, in pixels.
        boxes: Truth first, what the gallery is about last, so that it lies on top.
    """

    image_id: int
    path: str = ""
    href: str | None = None
    caption: str = ""
    picture: str | None = None
    problem: str | None = None
    size_wh: tuple[int, int] = (0, 0)
    boxes: tuple[DrawnBox, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """One tab of pictures: those with most of one thing first."""

    key: str
    title: str
    meaning: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, kw_only=True)
class Galleries:
    """All galleries, and why there are none or no pictures in them."""

    galleries: tuple[Gallery, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Which images a gallery shows, and which of their boxes it is about."""

    key: str
    title: str
    meaning: str
    image_ids: list[int]
    captions: dict[int, str] = field(default_factory=dict)
    boxes: dict[int, list[tuple[list[float], str, bool]]] = field(default_factory=dict)  # in xywh; label; of the truth


def build_galleries(run: RunTables, num_images: int) -> Galleries:
    """Chooses the worst images and draws them.

    Boxes are judged at IoU 0.5 and the score threshold of the best F1 over all classes. Only the chosen pictures are
    read; what cannot be read is said and never stops the report.

    Args:
        run: The tables.
        num_images: Pictures in each gallery at most.
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
        rows = _read_pictures(run, sorted({image_id for choice in choices for image_id in choice.image_ids}))
    except (UserError, OSError) as error:
        problems.append(f"Pictures cannot be shown: {error}")
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
    return Galleries(galleries=galleries, problems=tuple(problems))


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _counted_choices(run: RunTables, num_images: int) -> list[_Choice]:
    """The images with most false alarms, and those with most missed objects."""
    table = run.tables.get("per_image")
    if table is None:
        return []
    image_ids = table["image_id"].to_numpy()
    choices = []
    for key, title, meaning, column, what in (
        ("false", "False positives", "Detections that match no labelled object", "false_positives", "false positive"),
        ("missed", "Missed", "Labelled objects that nothing found", "false_negatives", "missed object"),
    ):
        counts = table[column].fill_null(0).to_numpy()
        rows = [row for row in np.lexsort((image_ids, -counts))[:num_images].tolist() if counts[row] > 0]
        captions = {int(image_ids[row]): _plural(int(counts[row]), what) for row in rows}
        choices.append(_Choice(key=key, title=title, meaning=meaning, image_ids=list(captions), captions=captions))
    return choices


def _candidates(run: RunTables) -> list[int]:
    """Images that may have wrong classes: something was missed in them, and something else found."""
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
        captions={image_id: _plural(counts[image_id], "wrong class").replace("classs", "classes") for image_id in best},
    )


def _suspects(run: RunTables, num_images: int) -> _Choice:
    """The images with the labels that are most probably wrong, in the order of the table."""
    choice = _Choice(
        key="suspects", title="Suspect labels", meaning="Labels that are probably wrong or lacking", image_ids=[]
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
            "no_truth": f"no label? {row['category']}",
            "not_found": f"is it there? {row['category']}",
            "other_class": f"{row['category']}, or {row['detected']}?",
        }.get(row["kind"], row["kind"])
        label = text if row["score"] is None else f"{text} {row['score']:.2f}"
        if row["bbox"] is not None:
            choice.boxes[image_id].append((row["bbox"], label, row["kind"] == "not_found"))
    for image_id, boxes in choice.boxes.items():
        choice.captions[image_id] = _plural(len(boxes), "suspect label")
    return choice


def _read_pictures(run: RunTables, image_ids: Sequence[int]) -> dict[int, ImageRow]:
    """The encoded pictures, read from the truth; only the row groups that hold them are loaded."""
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
    """A data URI, its width and height, and those of the original; or why there is none."""
    if row.data is None:
        return row.error or "it cannot be read any more"
    try:
        pixels = decode(row.data, max_pixels=DEFAULT_MAX_PIXELS, at_least_hw=(_MAX_SIDE, _MAX_SIDE))
    except DecodeError as error:
        return str(error)
    picture = Image.fromarray(pixels)
    original_wh = (row.size_hw[1], row.size_hw[0]) if row.size_hw else picture.size
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", picture.size, original_wh


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
        return Card(**about, problem=thumbnail or "the picture was not found")
    picture, (width, height), original_wh = thumbnail
    scale = np.array([width / original_wh[0], height / original_wh[1]] * 2)
    boxes = _boxes(choice, image_id, judged)[-_MOST_BOXES:]
    drawn = tuple(
        _drawn(np.asarray(box) * scale, is_truth, is_point, label) for box, is_truth, is_point, label in boxes
    )
    return Card(**about, picture=picture, size_wh=(width, height), boxes=drawn)


def _drawn(box_xywh: npt.NDArray[np.float64], is_truth: bool, is_point: bool, label: str) -> DrawnBox:
    x, y, width, height = (round(float(value), 1) for value in box_xywh)
    return DrawnBox(x=x, y=y, width=width, height=height, is_truth=is_truth, is_point=is_point, label=label)


def _boxes(choice: _Choice, image_id: int, judged: JudgedImage | None) -> list[tuple[Any, bool, bool, str]]:
    """What is drawn on an image, the point of the gallery last: box, whether of the truth, whether the point, label."""
    boxes: list[tuple[Any, bool, bool, str]] = []
    if judged is not None:
        points = {
            "false": (judged.is_false, None),
            "missed": (None, judged.is_missed),
            "class": (judged.is_other_class, judged.is_taken_for_other),
        }.get(choice.key, (None, None))
        for is_truth, columns in ((True, judged.truth), (False, judged.detections)):
            chosen = points[1] if is_truth else points[0]
            # Among suspects, the other detections would only hide what is asked.
            if choice.key == "suspects" and not is_truth:
                continue
            for number, (box, label) in enumerate(columns):
                boxes.append((box, is_truth, chosen is not None and bool(chosen[number]), label))
    boxes += [(box, is_truth, True, label) for box, label, is_truth in choice.boxes.get(image_id, [])]
    return sorted(boxes, key=lambda box: box[2])


def original_href(path: str) -> str | None:
    """The address under which a browser finds an image; None for a relative path and for schemes it does not open."""
    if "://" not in path:
        return Path(path).as_uri() if path.startswith("/") else None
    # What follows the host is not yet escaped: blanks and `#` belong to the name.
    scheme, _, rest = path.partition("://")
    if scheme.lower() not in _LINKED_SCHEMES:
        return None
    try:
        urlsplit(f"{scheme}://{rest.partition('/')[0]}")
    except ValueError:
        return None
    return f"{scheme.lower()}://{quote(rest, safe='/:@%?&=+,;~!$()*')}"
