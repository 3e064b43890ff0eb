"""Tables → COCO JSON: detections become a results file, images with their boxes an instances file.

Both are streamed, so that a file of any size needs the memory of some hundred images, and both appear whole or not at
all. Numbers are written with as many digits as it takes to read the same float64 back.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.errors import UserError
from raydet.config import ExportCocoConfig
from raydet.exports.rows import ROWS_AT_ONCE, Numbers, as_text, common_folder, refuse, refuse_boxes, refuse_categories
from raydet.tables import storage
from raydet.tables.columns import flatten, image_ids_in
from raydet.tables.new_output import new_file
from raydet.tables.schema import TableKind, build_schema
from raydet.tables.table import Table, open_table

_SEPARATOR = ",\n"
_JSON_TYPES = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)


@dataclass(frozen=True)
class CocoExportReport:
    """What was exported.

    Attributes:
        out: The JSON file.
        kind: Of the table: `detections` became a results file, `images` an instances file.
        num_images: Rows of the table.
        num_boxes: Entries written: detections, or annotations.
        num_left_out: Detections at or below the score threshold.
        images_folder: What the file names in an instances file are relative to, where the table had whole paths.
    """

    out: str
    kind: TableKind
    num_images: int
    num_boxes: int
    num_left_out: int = 0
    images_folder: str | None = None

    def lines(self) -> list[str]:
        """What was exported, for the terminal."""
        what = "detections" if self.kind == "detections" else "annotations"
        left_out = f", {self.num_left_out:,} at or below the threshold left out" if self.num_left_out else ""
        lines = [f"{self.num_boxes:,} {what} of {self.num_images:,} images{left_out}"]
        if self.images_folder is not None:
            lines.append(f"file names are relative to {self.images_folder}")
        return [*lines, f"COCO {'results' if self.kind == 'detections' else 'instances'}: {self.out}"]


def export_coco(config: ExportCocoConfig) -> CocoExportReport:
    """Writes a table as COCO JSON; what the table holds decides which.

    A detections table becomes a results file, `[{"image_id", "category_id", "bbox", "score"}, …]`, in the order of the
    table. The format has no place for images without detections, nor for the reasons why some could not be read.
    An images table becomes an instances file with `images`, `annotations` and `categories`: annotations are numbered
    1…n, further scalar columns (camera, city) become keys of the images. Pictures are not copied; paths that are whole
    are written relative to the folder they have in common.
    Boxes are x, y, width, height in absolute pixels of the upright image; category ids are those of the source.

    A file that is there is replaced, whole or not at all.

    Raises:
        UserError: There is no such table, it is damaged, a number in it means nothing, two categories share an id, or
            `out` is no name of a JSON file. Nothing has been written then.
    """
    out, score_threshold = storage.absolute_uri(config.out), config.score_threshold
    uri = storage.absolute_uri(config.data)
    table = open_table(uri, ("images", "detections"))
    if table.kind == "images" and score_threshold > 0:
        raise UserError(f"{uri} is a table of images, which has no scores; leave out --score-threshold")
    ids, counts = np.unique([category.id for category in table.categories], return_counts=True)
    if (counts > 1).any():
        raise UserError(
            f"{uri} has categories that share the id {ids[counts > 1][0]}: COCO JSON cannot tell them apart"
        )
    with new_file(out, command="export coco", endings=(".json",)) as file:
        return (
            _write_results(file, table, out, score_threshold)
            if table.kind == "detections"
            else _write_instances(file, table, out)
        )


class _Entries:
    """Writes the entries of a JSON list, of which only one piece at a time is in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_entries = 0

    def add(self, texts: pa.StringArray) -> None:
        """Appends entries that are JSON already."""
        if len(texts):
            joined = pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], texts), _SEPARATOR)
            self._file.write((_SEPARATOR if self.num_entries else "\n").encode())
            self._file.write(joined[0].as_buffer())
            self.num_entries += len(texts)


def _write_results(file: BinaryIO, table: Table, out: str, score_threshold: float) -> CocoExportReport:
    entries, num_found = _Entries(file), 0
    file.write(b"[")
    for batch in table.iter_batches(["image_id", "detections"], ROWS_AT_ONCE):
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
        out, "detections", table.num_rows, entries.num_entries, num_left_out=num_found - entries.num_entries
    )


def _write_instances(file: BinaryIO, table: Table, out: str) -> CocoExportReport:
    """The keys in the order in which they can be streamed: what is small, the images, then the annotations."""
    categories = [{"id": category.id, "name": category.name, "supercategory": ""} for category in table.categories]
    folder = common_folder(table)
    file.write(b'{"info": {"description": "written by raydet"}, "licenses": [],\n')
    file.write(b'"categories": ' + json.dumps(categories).encode() + b',\n"images": [')
    images = _Entries(file)
    known = {field.name for field in build_schema("images")}
    extra = [
        field.name for field in table.schema if field.name not in known and any(is_(field.type) for is_ in _JSON_TYPES)
    ]
    for batch in table.iter_batches(["image_id", "image.path", "width", "height", *extra], ROWS_AT_ONCE):
        images.add(pa.array([_image_entry(row, folder or "", extra) for row in batch.to_pylist()], pa.string()))
    file.write(b'\n],\n"annotations": [')
    annotations = _Entries(file)
    for batch in table.iter_batches(["image_id", "objects"], ROWS_AT_ONCE):
        lengths, columns = flatten(batch, "objects", ("bbox", "category", "area", "iscrowd"), table.uri)
        image_ids = np.repeat(image_ids_in(batch), lengths)
        refuse(~np.isfinite(columns["area"]), image_ids, "an area that is not finite", table.uri)
        entries_before = annotations.num_entries
        annotations.add(
            _objects(
                id=as_text(np.arange(entries_before + 1, entries_before + 1 + len(image_ids))),
                image_id=as_text(image_ids),
                category_id=as_text(_category_ids(table, image_ids, columns["category"])),
                bbox=_bbox_text(table, image_ids, columns["bbox"]),
                area=as_text(columns["area"]),
                iscrowd=as_text(columns["iscrowd"].astype(np.int64)),
            )
        )
    file.write(b"\n]}\n")
    return CocoExportReport(out, "images", images.num_entries, annotations.num_entries, images_folder=folder)


def _image_entry(row: dict[str, Any], folder: str, extra: Sequence[str]) -> str:
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
    return json.dumps(entry)


def _category_ids(table: Table, image_ids: Numbers, indices: Numbers) -> Numbers:
    """Category indices → the ids that the source used."""
    refuse_categories(table, image_ids, indices)
    return np.array([category.id for category in table.categories], np.int64)[indices]


def _bbox_text(table: Table, image_ids: Numbers, boxes_xywh: Numbers) -> pa.StringArray:
    refuse_boxes(table, image_ids, boxes_xywh)
    sides = [as_text(np.ascontiguousarray(column)) for column in boxes_xywh.T]
    return pc.binary_join_element_wise("[", pc.binary_join_element_wise(*sides, ","), "]", "")


def _objects(**values: pa.StringArray) -> pa.StringArray:
    """JSON objects, one for each element of the columns; the values are JSON already."""
    parts: list[Any] = []
    for number, (key, column) in enumerate(values.items()):
        parts += [f'{", " if number else "{"}"{key}": ', column]
    return pc.binary_join_element_wise(*parts, "}", "")
