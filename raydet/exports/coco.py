"""Tables → COCO JSON: detections become a results file, images with their boxes an instances file.

Both are streamed, so that a file of any size requires memory for a few hundred images only, and written atomically.
Numbers have enough digits to read the same float64 back.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.console import Console
from raydet.common.display.progress import Progress
from raydet.common.errors import UserError
from raydet.common.notebook.showing import Shown
from raydet.config import ExportCocoConfig
from raydet.config.fields import with_options
from raydet.exports.rows import (
    ROWS_AT_ONCE,
    Numbers,
    as_text,
    common_folder,
    filled,
    open_scored,
    refuse,
    refuse_boxes,
    refuse_categories,
)
from raydet.tables import storage
from raydet.tables.columns import flatten, image_ids_in
from raydet.tables.new_output import new_file
from raydet.tables.schema import LABELLED_COLUMN, TableKind, build_schema
from raydet.tables.table import Table

_SEPARATOR = ",\n"
_JSON_TYPES = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)


@dataclass(frozen=True)
class CocoExportReport(Shown):
    """Result of an export to COCO JSON.

    Attributes:
        kind: Kind of the table: `detections` became a results file, `images` an instances file.
        num_images: Rows of the table.
        num_boxes: Detections or annotations written.
        num_omitted: Detections at or below the score threshold.
        images_folder: Folder that the file names of an instances file are relative to; None unless the table has
            absolute paths.
    """

    out: str
    kind: TableKind
    num_images: int
    num_boxes: int
    num_omitted: int = 0
    images_folder: str | None = None

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        what = "detections" if self.kind == "detections" else "annotations"
        omitted = f"; {self.num_omitted:,} at or below the threshold omitted" if self.num_omitted else ""
        lines = [f"{self.num_boxes:,} {what} of {self.num_images:,} images{omitted}"]
        if self.images_folder is not None:
            lines.append(f"file names are relative to {self.images_folder}")
        return [*lines, f"COCO {'results' if self.kind == 'detections' else 'instances'}: {self.out}"]


@with_options(ExportCocoConfig)
def export_coco(config: ExportCocoConfig, *, console: Console | None = None) -> CocoExportReport:
    """Write a table as COCO JSON: a results file for detections, an instances file for images.

    A detections table becomes a results file, `[{"image_id", "category_id", "bbox", "score"}, …]`, in table order. The
    format cannot represent images without detections, or the reasons why images could not be read.
    An images table becomes an instances file with `images`, `annotations` and `categories`: annotations keep their ids
    if these are unique and above 0, and are numbered 1…n otherwise; further scalar columns (camera, city) become keys
    of the images, and `labelled_categories` LVIS's `neg_category_ids` and `not_exhaustive_category_ids`.
    Images are not copied; absolute paths are written relative to their common folder.
    Boxes are x, y, width, height in absolute pixels of the upright image; category ids are those of the source.

    An existing file is replaced atomically.

    Raises:
        UserError: The table is missing or damaged, a number in it is not finite, two categories share an id, or `out`
            is not the name of a JSON file. Nothing has been written.
    """
    out, score_threshold = storage.absolute_uri(config.out), config.score_threshold
    table = open_scored(config.data, score_threshold)
    ids, counts = np.unique([category.id for category in table.categories], return_counts=True)
    if (counts > 1).any():
        repeated = ids[counts > 1][0]
        raise UserError(f"{table.uri} has several categories with the id {repeated}; COCO JSON requires unique ids")
    with (
        new_file(out, command="export coco", endings=(".json",)) as file,
        (console or Console()).progress("exporting", total=table.num_rows) as progress,
    ):
        return (
            _write_results(file, table, out, score_threshold, progress)
            if table.kind == "detections"
            else _write_instances(file, table, out, progress)
        )


class _Entries:
    """Writer of the entries of a JSON list, which holds only one batch in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_entries = 0

    def add(self, texts: pa.StringArray) -> None:
        """Append entries that are JSON already."""
        if len(texts):
            joined = pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], texts), _SEPARATOR)
            self._file.write((_SEPARATOR if self.num_entries else "\n").encode())
            self._file.write(joined[0].as_buffer())
            self.num_entries += len(texts)


def _write_results(
    file: BinaryIO, table: Table, out: str, score_threshold: float, progress: Progress
) -> CocoExportReport:
    entries, num_found = _Entries(file), 0
    file.write(b"[")
    batches = table.iter_batches(["image_id", "detections"], ROWS_AT_ONCE)
    for batch in progress.over(batches, count=lambda batch: batch.num_rows):
        lengths, columns = flatten(batch, "detections", ("bbox", "score", "category"), table.uri)
        image_ids = np.repeat(image_ids_in(batch), lengths)
        num_found += len(image_ids)
        if score_threshold > 0:
            keep = columns["score"] > score_threshold
            image_ids, columns = image_ids[keep], {name: column[keep] for name, column in columns.items()}
        refuse(~np.isfinite(columns["score"]), image_ids, "a score that is not finite", table.uri)
        entries.add(
            _objects(
                image_id=as_text(image_ids),
                category_id=as_text(_category_ids(table, image_ids, columns["category"])),
                bbox=_bbox_text(table, image_ids, columns["bbox"]),
                score=as_text(columns["score"]),
            )
        )
    file.write(b"\n]\n")
    return CocoExportReport(
        out, "detections", table.num_rows, entries.num_entries, num_omitted=num_found - entries.num_entries
    )


def _write_instances(file: BinaryIO, table: Table, out: str, progress: Progress) -> CocoExportReport:
    """Write an instances file in an order that can be streamed: small keys, images, annotations."""
    categories = [{"id": category.id, "name": category.name, "supercategory": ""} for category in table.categories]
    folder = common_folder(table)
    file.write(b'{"info": {"description": "written by raydet"}, "licenses": [],\n')
    file.write(b'"categories": ' + json.dumps(categories).encode() + b',\n"images": [')
    images = _Entries(file)
    known = {field.name for field in build_schema("images")}
    extra = [
        field.name for field in table.schema if field.name not in known and any(is_(field.type) for is_ in _JSON_TYPES)
    ]
    names = ["image_id", "image.path", "width", "height", *extra]
    is_partial = LABELLED_COLUMN in table.schema.names
    names += [LABELLED_COLUMN, "objects.category"] if is_partial else []
    category_ids = [category.id for category in table.categories]
    for batch in table.iter_batches(names, ROWS_AT_ONCE):
        entries = (
            _image_entry(row, folder or "", extra) | (_federated(row, category_ids) if is_partial else {})
            for row in batch.to_pylist()
        )
        images.add(pa.array(map(json.dumps, entries), pa.string()))
    file.write(b'\n],\n"annotations": [')
    annotations, ids = _Entries(file), _annotation_ids(table)
    batches = table.iter_batches(["image_id", "objects"], ROWS_AT_ONCE)
    for batch in progress.over(batches, count=lambda batch: batch.num_rows):
        lengths, columns = flatten(batch, "objects", ("bbox", "category", "area", "iscrowd"), table.uri)
        image_ids = np.repeat(image_ids_in(batch), lengths)
        refuse(~np.isfinite(columns["area"]), image_ids, "an area that is not finite", table.uri)
        first, last = annotations.num_entries, annotations.num_entries + len(image_ids)
        annotations.add(
            _objects(
                id=as_text(np.arange(first + 1, last + 1) if ids is None else ids[first:last]),
                image_id=as_text(image_ids),
                category_id=as_text(_category_ids(table, image_ids, columns["category"])),
                bbox=_bbox_text(table, image_ids, columns["bbox"]),
                area=as_text(columns["area"]),
                iscrowd=as_text(columns["iscrowd"].astype(np.int64)),
                # Empty, as for boxes everywhere: Datumaro and others complain if it is missing.
                segmentation=pa.array(["[]"] * len(image_ids), pa.string()),
            )
        )
    file.write(b"\n]}\n")
    return CocoExportReport(out, "images", images.num_entries, annotations.num_entries, images_folder=folder)


def _annotation_ids(table: Table) -> Numbers | None:
    """Return the annotation ids of all boxes, int64 [N], or None if a COCO file cannot have them.

    pycocotools takes the id 0 for "not matched", and the last of repeated ids for all of them.
    """
    parts: list[Numbers] = [np.zeros(0, np.int64)]
    for batch in table.iter_batches(["objects.id", "objects.category"]):
        try:
            _, columns = flatten(batch, "objects", ("id", "category"), table.uri)
        except UserError:  # not every box has an id
            return None
        parts.append(columns["id"])
    ids = np.concatenate(parts)
    return ids if (ids > 0).all() and len(np.unique(ids)) == len(ids) else None


def _image_entry(row: dict[str, Any], folder: str, extra: Sequence[str]) -> dict[str, Any]:
    path = row["image"]["path"] or ""
    entry = {
        "id": row["image_id"],
        "file_name": path.removeprefix(folder),
        "width": row["width"],
        "height": row["height"],
    }
    for name in extra:
        value = row[name]
        if name not in entry and not (isinstance(value, float) and not math.isfinite(value)):
            entry[name] = value
    return entry


def _federated(row: dict[str, Any], category_ids: Sequence[int]) -> dict[str, list[int]]:
    """Return LVIS's two lists of an image that is labelled for some classes; nothing if it is labelled for all."""
    if row[LABELLED_COLUMN] is None:
        return {}
    labelled, present = set(row[LABELLED_COLUMN]), set(row["objects"]["category"] or ())
    return {
        "neg_category_ids": [category_ids[index] for index in sorted(labelled - present)],
        "not_exhaustive_category_ids": [category_ids[index] for index in sorted(present - labelled)],
    }


def _category_ids(table: Table, image_ids: Numbers, indices: Numbers) -> Numbers:
    """Convert category indices to the ids of the source."""
    refuse_categories(table, image_ids, indices)
    return np.array([category.id for category in table.categories], np.int64)[indices]


def _bbox_text(table: Table, image_ids: Numbers, boxes_xywh: Numbers) -> pa.StringArray:
    refuse_boxes(table, image_ids, boxes_xywh)
    return filled("[%,%,%,%]", *(as_text(column) for column in boxes_xywh.T.copy()))


def _objects(**values: pa.StringArray) -> pa.StringArray:
    """Build one JSON object per row from columns of JSON values."""
    template = ", ".join(f'"{key}": %' for key in values)
    return filled(f"{{{template}}}", *values.values())
