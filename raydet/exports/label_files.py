"""Tables → a folder with labels and, optionally, the images.

Shared by the formats: validated rows, file names, copied images, and one label file per image.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.console import Console
from raydet.common.errors import UserError
from raydet.common.notebook.showing import Shown
from raydet.common.threads import in_order
from raydet.config import ExportCvatConfig, ExportLabelStudioConfig, ExportVocConfig, ExportYoloConfig
from raydet.exports.rows import ROWS_AT_ONCE, Numbers, common_folder, refuse, refuse_boxes, refuse_categories
from raydet.images.files import ReadError, is_image_name
from raydet.images.references import read_reference
from raydet.tables import storage
from raydet.tables.columns import flatten, image_ids_in
from raydet.tables.table import Table

LabelConfig = ExportCvatConfig | ExportLabelStudioConfig | ExportVocConfig | ExportYoloConfig
_IMAGES_AT_ONCE = 16
_SIDES = ("width", "height")


@dataclass(frozen=True)
class FolderExportReport(Shown):
    """Result of an export to label files.

    Attributes:
        images_folder: Folder for the images that were not copied, relative to `out`.
        num_renamed: Images renamed because another had the same name without extension.
        notes: Number of items that the format cannot represent, by description.
    """

    out: str
    num_images: int
    num_boxes: int
    num_copied: int
    images_folder: str
    num_renamed: int
    notes: dict[str, int]

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        lines = [f"{self.num_boxes:,} boxes of {self.num_images:,} images, {self.num_copied:,} images copied"]
        if self.num_copied < self.num_images:
            lines.append(f"  copy the other images to {storage.join(self.out, self.images_folder)}")
        notes = {"images renamed because of equal names": self.num_renamed, **self.notes}
        lines += [f"  {text}: {count:,}" for text, count in notes.items() if count]
        return [*lines, self.out]


@dataclass(frozen=True)
class LabelRows:
    """Validated rows of a table.

    Attributes:
        image_ids: Ids of the images, int64 [R].
        names: File names of the images, relative to their folder, [R].
        widths: Widths of the upright images in pixels, float64 [R]; NaN if unknown.
        heights: Heights of the upright images in pixels, float64 [R]; NaN if unknown.
        counts: Number of boxes of each image, [R].
        boxes_xywh: Boxes of all images in row order, absolute pixels, [N, 4].
        ids: Annotation ids of an images table, [N]; 0 for detections.
        categories: Class indices, [N].
        iscrowd: Crowd flags of an images table, bool [N]; False for detections.
        scores: Scores of a detections table, [N]; 1 for an images table.
        errors: True for the unreadable images of a detections table, bool [R].
    """

    image_ids: Numbers
    names: list[str]
    widths: Numbers
    heights: Numbers
    counts: Numbers
    boxes_xywh: Numbers
    ids: Numbers
    categories: Numbers
    iscrowd: Numbers
    scores: Numbers
    errors: Numbers

    def keep(self, kept: Numbers) -> "LabelRows":
        """Return the same rows with the boxes that the mask `kept`, bool [N], selects."""
        owners = np.repeat(np.arange(len(self.counts)), self.counts)
        columns = {name: getattr(self, name)[kept] for name in ("boxes_xywh", "ids", "categories", "iscrowd", "scores")}
        counts = np.bincount(owners[kept], minlength=len(self.counts))
        return LabelRows(**{**vars(self), **columns, "counts": counts})

    def joined(self, lines: pa.StringArray) -> list[str]:
        """Join one line per box into one text per image, with a line end after each line."""
        texts, ends = lines.to_pylist(), np.cumsum(self.counts)
        return [
            "".join(f"{line}\n" for line in texts[end - count : end])
            for end, count in zip(ends.tolist(), self.counts.tolist(), strict=True)
        ]


class FileNames:
    """Unique file names for images, compared without extension and without case, as some file systems do.

    A common `folder` of all paths is removed from the names.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder or ""
        self._taken: set[str] = set()
        self.num_renamed = 0

    def take(self, path: str | None, image_id: int) -> str:
        """Return a unique relative name with an image extension, which never leads out of the folder.

        A folder `images` within the path is dropped, because other programs derive the path of the label file from the
        last folder of that name.
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
    """Return the class names of a table, checked for use in text files.

    Raises:
        UserError: A name is empty or not unique, has blanks at its ends, or contains a line break or another control
            character.
    """
    names = [category.name for category in table.categories]
    for name in names:
        if not name.strip() or _printable(name) != name or names.count(name) > 1:
            raise UserError(
                f"{table.uri} has a class {name!r}: in text files class names must be unique and must not contain "
                "blanks at the ends, line breaks or control characters"
            )
    return names


def write_labels(
    table: Table,
    folder: Path,
    config: LabelConfig,
    *,
    labels_folder: str,
    extension: str,
    make_texts: Callable[[LabelRows], list[str]],
    **options: Any,
) -> FolderExportReport:
    """Write one label file per readable image, named as the image with another `extension`, and the images.

    `labels_folder` is relative to `folder`; `make_texts` returns the text of each row's label file. The other
    arguments, the result and the errors are those of `write_rows`.
    """

    def write_files(rows: LabelRows) -> None:
        for name, text, is_error in zip(rows.names, make_texts(rows), rows.errors.tolist(), strict=True):
            if not is_error:
                _write(folder / labels_folder / f"{name.rpartition('.')[0]}{extension}", text.encode())

    return write_rows(table, folder, config, write=write_files, **options)


def write_rows(
    table: Table,
    folder: Path,
    config: LabelConfig,
    *,
    images_folder: str,
    write: Callable[[LabelRows], None],
    console: Console | None,
    crowds: str | None = None,
    unreadable: str = "unreadable images omitted",
) -> FolderExportReport:
    """Pass the rows of a table to a function that writes their labels, and copy the images.

    Args:
        table: An images or detections table.
        folder: Local folder to write to.
        config: Options of the command. By default the images are copied whose bytes are in the table, and a score
            threshold of 0 omits nothing.
        images_folder: Folder of the images, relative to `folder`.
        write: Function that writes the labels of some rows.
        console: Console for progress; a new one if None.
        crowds: Note under which crowd boxes are omitted and counted; None keeps them.
        unreadable: Note under which unreadable images are counted.

    Raises:
        UserError: The table is damaged, a number in it is not finite, or an image cannot be read.
    """
    copy_images, score_threshold = config.copy_images, getattr(config, "score_threshold", 0.0)
    if table.kind == "detections" and copy_images:
        raise UserError(f"{table.uri} is a detections table, which has no images; omit --copy-images")
    with_images = table.kind == "images" and copy_images is not False
    columns = ["image_id", "width", "height"]
    columns += ["path", "detections", "error"] if table.kind == "detections" else ["image.path", "objects"]
    columns += ["image.bytes"] if with_images else []
    file_names = FileNames(common_folder(table))
    low = "detections at or below the threshold omitted"
    notes = {**({} if crowds is None else {crowds: 0}), low: 0, unreadable: 0}
    num_boxes = num_copied = 0
    batches = table.iter_batches(columns, _IMAGES_AT_ONCE if with_images else ROWS_AT_ONCE)
    with (console or Console()).progress("exporting", total=table.num_rows) as progress:
        for batch in progress.over(batches, count=lambda batch: batch.num_rows):
            rows = _label_rows(table, batch, file_names)
            is_low = (rows.scores <= score_threshold) & (score_threshold > 0)
            notes[low] += int(is_low.sum())
            notes[unreadable] += int(rows.errors.sum())
            if crowds is not None:
                notes[crowds] += int(rows.iscrowd.sum())
                is_low |= rows.iscrowd
            rows = rows.keep(np.logical_not(is_low))
            num_boxes += len(rows.boxes_xywh)
            write(rows)
            if with_images:
                num_copied += _copy_images(table, batch, rows.names, folder / images_folder, all_=bool(copy_images))
    (folder / images_folder).mkdir(parents=True, exist_ok=True)
    out, num_renamed = storage.absolute_uri(config.out), file_names.num_renamed
    return FolderExportReport(out, table.num_rows, num_boxes, num_copied, images_folder, num_renamed, notes)


def _label_rows(table: Table, batch: pa.RecordBatch, file_names: FileNames) -> LabelRows:
    is_images = table.kind == "images"
    column, *more = ("objects", "iscrowd", "id") if is_images else ("detections", "score")
    counts, values = flatten(batch, column, ("bbox", "category", *more), table.uri)
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
        image_ids=np.asarray(image_ids, np.int64),
        names=[file_names.take(path, id_) for path, id_ in zip(paths.to_pylist(), image_ids, strict=True)],
        widths=widths,
        heights=heights,
        counts=counts,
        boxes_xywh=values["bbox"],
        ids=values["id"] if is_images else np.zeros(num_boxes, np.int64),
        categories=values["category"],
        iscrowd=values["iscrowd"].astype(bool) if is_images else np.zeros(num_boxes, bool),
        scores=np.ones(num_boxes) if is_images else values["score"],
        errors=np.zeros(batch.num_rows, bool)
        if is_images
        else pc.is_valid(batch.column("error")).to_numpy(zero_copy_only=False),
    )


def _copy_images(table: Table, batch: pa.RecordBatch, names: list[str], folder: Path, *, all_: bool) -> int:
    """Copy the images of some rows, only those stored in the table unless `all_`, and return their number."""
    images: list[dict[str, Any]] = batch.column("image").to_pylist()
    pairs = [pair for pair in zip(names, images, strict=True) if all_ or pair[1]["bytes"] is not None]

    def read(pair: tuple[str, dict[str, Any]]) -> bytes:
        image = pair[1]
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        try:
            return read_reference(image["path"] or "")
        except ReadError as error:
            raise UserError(f"{table.uri}: cannot copy the image {image['path']}: {error}") from None

    for (name, _), data in zip(pairs, in_order(read, pairs), strict=True):
        _write(folder / name, data)
    return len(pairs)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
