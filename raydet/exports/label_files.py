"""Tables → a folder with one label file for each image, and the pictures where they are wanted.

What the formats have in common: names for the files, the pictures, and a folder that appears whole or not at all.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.errors import UserError
from raydet.common.threads import in_order
from raydet.exports.rows import ROWS_AT_ONCE, Numbers, common_folder, refuse, refuse_boxes, refuse_categories
from raydet.images.files import ReadError, is_image_name
from raydet.images.references import read_reference
from raydet.tables import storage
from raydet.tables.columns import flatten, image_ids_in
from raydet.tables.table import Table

_PICTURES_AT_ONCE = 16
_SIDES = ("width", "height")


@dataclass(frozen=True)
class FolderExportReport:
    """What was exported.

    Attributes:
        out: The folder.
        num_images: Label files.
        num_boxes: Boxes in them.
        num_copied: Pictures copied.
        pictures_folder: Where the other pictures belong, relative to `out`.
        num_renamed: Images that got another name, since one of the same name without extension was there before.
        notes: What the format has no place for, in words, and how often.
    """

    out: str
    num_images: int
    num_boxes: int
    num_copied: int
    pictures_folder: str
    num_renamed: int
    notes: dict[str, int]

    def lines(self) -> list[str]:
        """What was exported, for the terminal."""
        lines = [f"{self.num_boxes:,} boxes of {self.num_images:,} images, {self.num_copied:,} images copied"]
        if self.num_copied < self.num_images:
            lines.append(f"  copy the other images to {storage.join(self.out, self.pictures_folder)}")
        notes = {"images renamed, since two had the same name": self.num_renamed, **self.notes}
        lines += [f"  {text}: {count:,}" for text, count in notes.items() if count]
        return [*lines, self.out]


@dataclass(frozen=True)
class LabelRows:
    """Some rows of a table, checked.

    Attributes:
        names: Of the pictures, relative to their folder, [R].
        widths: Of the upright images in pixels, [R]; NaN where there is none.
        heights: Likewise, [R].
        counts: Boxes of each image, [R].
        boxes_xywh: Of all images one after the other, absolute pixels, [N, 4].
        categories: Indices, [N].
        iscrowd: Of an images table, [N].
        scores: Of a detections table, [N].
        errors: Of a detections table: images without an answer, [R].
    """

    names: list[str]
    widths: Numbers
    heights: Numbers
    counts: Numbers
    boxes_xywh: Numbers
    categories: Numbers
    iscrowd: Numbers
    scores: Numbers
    errors: Numbers

    def keep(self, kept: Numbers) -> "LabelRows":
        """The same rows with those boxes that `kept` marks, [N]."""
        owners = np.repeat(np.arange(len(self.counts)), self.counts)
        columns = {name: getattr(self, name)[kept] for name in ("boxes_xywh", "categories", "iscrowd", "scores")}
        counts = np.bincount(owners[kept], minlength=len(self.counts))
        return LabelRows(**{**vars(self), **columns, "counts": counts})

    def joined(self, lines: pa.StringArray) -> list[str]:
        """One line for each box → the lines of each image, each with its line end."""
        texts, ends = lines.to_pylist(), np.cumsum(self.counts)
        return [
            "".join(f"{line}\n" for line in texts[end - count : end])
            for end, count in zip(ends.tolist(), self.counts.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class WrittenLabels:
    """What `write_labels` has written: the names of the pictures, and numbers for the report."""

    names: list[str]
    num_boxes: int
    num_copied: int
    num_renamed: int


class FileNames:
    """Gives every image a name of its own, told apart without its extension and without case, as files are by some.

    Args:
        folder: What all paths begin with and the names shall not.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder or ""
        self._taken: set[str] = set()
        self.num_renamed = 0

    def take(self, path: str | None, image_id: int) -> str:
        """The name for an image, relative, with an image's extension; it never leads out of the folder.

        A folder `images` within the path is left out: by the last one of that name others find the label files.
        """
        plain = (path or "").removeprefix(self._folder).rpartition("://")[2].replace("\\", "/")
        parts = [_printable(part) for part in plain.split("/")]
        name = "/".join(part for part in parts if part not in ("", ".", "..", "images")) or str(image_id)
        stem, _, extension = name.rpartition(".") if is_image_name(name) else (name, "", "jpg")
        if stem.lower() in self._taken:
            self.num_renamed += 1
            stem = f"{stem}-{image_id}"
            while stem.lower() in self._taken:
                stem += "_"
        self._taken.add(stem.lower())
        return f"{stem}.{extension}"


def _printable(text: str) -> str:
    return "".join("_" if unicodedata.category(letter).startswith("C") else letter for letter in text).strip()


def check_class_names(table: Table) -> list[str]:
    """The names of a table's classes, which can stand in text files.

    Raises:
        UserError: One is empty, appears twice, or has a line break or another control character in it.
    """
    names = [category.name for category in table.categories]
    for name in names:
        if not name.strip() or _printable(name) != name or names.count(name) > 1:
            raise UserError(
                f"{table.uri} has a class {name!r}: in text files names must differ, and be without blanks at the "
                "ends, line breaks and control characters"
            )
    return names


def write_labels(
    table: Table,
    folder: Path,
    *,
    pictures_folder: str,
    labels_folder: str,
    extension: str,
    copy_images: bool | None,
    make_texts: Callable[[LabelRows], tuple[LabelRows, list[str | None]]],
) -> WrittenLabels:
    """Writes one label file an image, and the pictures.

    Args:
        table: Of images or detections.
        folder: The local folder that is being filled.
        pictures_folder: Where pictures go, relative to it.
        labels_folder: Where label files go, relative to it.
        extension: Of the label files, with its dot.
        copy_images: Copy all pictures, or none; None: those whose bytes are in the table.
        make_texts: Rows → those boxes of theirs that were taken, and the text of each label file or None for no file.

    Raises:
        UserError: The table is damaged, a number in it means nothing, or a picture cannot be read.
    """
    if table.kind == "detections" and copy_images:
        raise UserError(f"{table.uri} is a table of detections, which has no pictures; leave out --copy-images")
    with_pictures = table.kind == "images" and copy_images is not False
    columns = ["image_id", "width", "height"]
    columns += ["path", "detections", "error"] if table.kind == "detections" else ["image.path", "objects"]
    columns += ["image.bytes"] if with_pictures else []
    file_names = FileNames(common_folder(table))
    names: list[str] = []
    num_boxes = num_copied = 0
    for batch in table.iter_batches(columns, _PICTURES_AT_ONCE if with_pictures else ROWS_AT_ONCE):
        rows, texts = make_texts(_label_rows(table, batch, file_names))
        for name, text in zip(rows.names, texts, strict=True):
            if text is not None:
                label = folder / labels_folder / name
                _write(label.with_name(f"{label.name.rpartition('.')[0]}{extension}"), text.encode())
        if with_pictures:
            num_copied += _copy_pictures(table, batch, rows.names, folder / pictures_folder, all_=bool(copy_images))
        names += rows.names
        num_boxes += len(rows.boxes_xywh)
    (folder / pictures_folder).mkdir(parents=True, exist_ok=True)
    return WrittenLabels(names, num_boxes, num_copied, file_names.num_renamed)


def _label_rows(table: Table, batch: pa.RecordBatch, file_names: FileNames) -> LabelRows:
    is_images = table.kind == "images"
    column, flag = ("objects", "iscrowd") if is_images else ("detections", "score")
    counts, values = flatten(batch, column, ("bbox", "category", flag), table.uri)
    owners = np.repeat(image_ids_in(batch), counts)
    refuse_boxes(table, owners, values["bbox"])
    refuse_categories(table, owners, values["category"])
    widths, heights = (batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64) for name in _SIDES)
    no_size = np.logical_not((widths > 0) & (heights > 0))
    refuse(np.repeat(no_size, counts), owners, "an image without a size", table.uri)
    num_boxes = len(owners)
    if not is_images:
        refuse(~np.isfinite(values["score"]), owners, "a score that is not finite", table.uri)
    paths = pc.struct_field(batch.column("image"), "path") if is_images else batch.column("path")
    image_ids = batch.column("image_id").to_pylist()
    return LabelRows(
        names=[file_names.take(path, id_) for path, id_ in zip(paths.to_pylist(), image_ids, strict=True)],
        widths=widths,
        heights=heights,
        counts=counts,
        boxes_xywh=values["bbox"],
        categories=values["category"],
        iscrowd=values["iscrowd"].astype(bool) if is_images else np.zeros(num_boxes, bool),
        scores=np.ones(num_boxes) if is_images else values["score"],
        errors=np.zeros(batch.num_rows, bool)
        if is_images
        else pc.is_valid(batch.column("error")).to_numpy(zero_copy_only=False),
    )


def _copy_pictures(table: Table, batch: pa.RecordBatch, names: list[str], folder: Path, *, all_: bool) -> int:
    """Writes the pictures of some rows: those in the table, and all others too where wanted; says how many."""
    images: list[dict[str, Any]] = batch.column("image").to_pylist()
    pairs = [pair for pair in zip(names, images, strict=True) if all_ or pair[1]["bytes"] is not None]

    def read(pair: tuple[str, dict[str, Any]]) -> bytes:
        image = pair[1]
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        try:
            return read_reference(image["path"] or "")
        except ReadError as error:
            raise UserError(f"{table.uri}: cannot copy the picture {image['path']}: {error}") from None

    for (name, _), data in zip(pairs, in_order(read, pairs), strict=True):
        _write(folder / name, data)
    return len(pairs)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
