"""CSV files with a box per row, as VoTT, TensorFlow's tools and RetinaNet write them → records.

`csv_columns` finds the columns. Boxes are edges in pixels of the upright image, from 0: width = xmax - xmin. With
`fractions`, they are fractions of the width and height instead. A row with an image and otherwise empty fields states
that the image has no object; an image without a row is not labelled and not read. Rows without a class or four finite
numbers are dropped and counted, and an image that has only such rows is rejected.

Images are numbered from 0 in the order of their first row, boxes from 1. A path in the file belongs to the image below
the folder whose path equals its longest end, because these files often hold the absolute paths of another machine. The
file is read in chunks and its boxes are kept on disk, so it may be larger than memory. Fields are separated by commas,
semicolons or tabs, and may be quoted.
"""

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from raydet.common.errors import UserError, one_line
from raydet.common.untrusted.text import text_stream
from raydet.config import PrepareCsvConfig
from raydet.images.files import ImageFolder, is_image_name, readable
from raydet.preparation.sources.coco_index import AnnotationEntry, CocoIndex, ImageEntry
from raydet.preparation.sources.source import (
    OTHER_CLASS,
    SOURCE_ID,
    Finding,
    FindingLog,
    Source,
    SourceImage,
    finite_numbers,
    read_class_names,
    size_hw_of,
)
from raydet.preparation.sources.tools.addresses import FolderFiles
from raydet.preparation.sources.tools.csv_columns import EXPECTED, CsvColumns, find_columns
from raydet.tables import storage
from raydet.tables.coco_json import BoxXywh, errors_in_one_line, plain_path
from raydet.tables.schema import Category
from raydet.tables.spill import spill_errors

MAX_LINE_CHARS = 2**20
"""A file with a longer line is refused: it is no list of boxes, and each line is held in memory."""
MAX_CLASSES = 10_000
"""A file with more classes is refused: the column holds something else, such as numbers."""

_NO_IMAGE = "rows without an image, dropped"
_NO_BOX = "rows without a class or four finite numbers, dropped"
_NOT_LISTED = "images that the file does not list, left out"
_ONLY_BAD_ROWS = "none of its rows has a class and four finite numbers"
_NO_FILE = "no such file: no image path matches the end of its path"
_SAME_FILE = "its path leads to an image that another path in the file names too"


@dataclass
class _CsvImage:
    """Facts about an image in the file, apart from its boxes."""

    image_id: int
    path: str
    refusal: str | None = None
    num_boxes: int = 0
    num_bad: int = 0
    size_hw: tuple[int, int] | None = None


@dataclass
class _Reading:
    """State of reading a file.

    Attributes:
        images: The images by their path in the file, in the order of their first row.
        classes: Number of each class name, in the order of first occurrence.
    """

    images: dict[str, _CsvImage] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    findings: FindingLog = field(default_factory=FindingLog)
    largest: float = -math.inf


def read_csv(config: PrepareCsvConfig, folder: ImageFolder) -> Source:
    """Read a CSV file of boxes; without `classes`, its classes are sorted by name.

    Returns:
        One record per image of the file, in the order of their first rows. The column `source_id` holds its path in
        the file.

    Raises:
        UserError: The file is missing, is not text or CSV, lacks a column, has numbers with decimal commas, or names no
            image or no class.
    """
    annotations_uri, fractions = config.annotations, config.fractions
    where = storage.absolute_uri(annotations_uri)
    find, index, reading = FolderFiles(folder), CocoIndex(), _Reading()
    wanted = None if config.classes is None else read_class_names(config.classes)
    with (
        errors_in_one_line(annotations_uri, EXPECTED),
        spill_errors(),
        storage.open_stream(annotations_uri) as stream,
        text_stream(stream, newline="") as text,
    ):
        rows = _rows(text, where)
        first = next(rows, (1, []))
        found = find_columns(first[1], config.columns, where)
        rows = rows if found.has_header else itertools.chain([first], rows)
        index.add_annotations(_annotations(rows, found, reading, find, where))
    if not reading.images:
        raise UserError(f"{where} names no images; expected {EXPECTED}")
    names = sorted(reading.classes) if wanted is None else wanted
    if not names:
        raise UserError(f"{where} has no box; for images without labels, use `raydet prepare images`")
    _check_unit(reading.largest, where, fractions)
    _add_findings(reading, find)
    facts = list(reading.images.values())
    with spill_errors():
        for image in facts:
            extra = {"source_id": readable(image.path)}
            index.add_image(ImageEntry(image.image_id, find.by_end(image.path) or image.path, image.size_hw, extra))
        # A class of `--classes` that the file lacks gets a number that no box has.
        index.join(tuple(Category(reading.classes.get(name, -place - 1), name) for place, name in enumerate(names)))
    class_of = list(reading.classes)
    for orphan in index.orphans():
        detail = f"its class is {class_of[orphan.category_id]}"
        reading.findings.note(
            Finding(OTHER_CLASS, readable(orphan.path or ""), orphan.image_id, orphan.annotation_id, detail=detail)
        )

    def records() -> Iterator[SourceImage]:
        for image, (entry, objects) in zip(facts, index.images(), strict=True):
            yield SourceImage(
                image_id=entry.image_id,
                path=readable(entry.path),
                objects=dataclasses.replace(objects, is_normalised=fractions),
                size_hw=entry.size_hw,
                extra=entry.extra,
                refusal=image.refusal,
            )

    categories = tuple(Category(place + 1, name) for place, name in enumerate(names))
    return Source(records, len(facts), categories, SOURCE_ID, reading.findings)


def _annotations(
    rows: Iterator[tuple[int, list[str]]], columns: CsvColumns, reading: _Reading, find: FolderFiles, where: str
) -> Iterator[AnnotationEntry]:
    """Yield the boxes of a file, and add its images and classes to `reading`."""
    used: dict[str, str] = {}
    numbers = itertools.count(1)
    for line, row in rows:
        path = plain_path(row[columns.image].strip()) if columns.image < len(row) else ""
        if not path:
            reading.findings.note(Finding(_NO_IMAGE, detail=f"line {line}"))
            continue
        image = reading.images.get(path)
        if image is None:
            image = reading.images[path] = _CsvImage(len(reading.images), path, _refusal(path, find, used))
        if columns.size is not None and image.size_hw is None and max(columns.size) < len(row):
            image.size_hw = size_hw_of(row[columns.size[1]], row[columns.size[0]])
        own = [row[place].strip() if place < len(row) else "" for place in (columns.category, *columns.box)]
        if not any(own):
            continue  # the image has no object
        name, box = readable(own[0]), _box(own[1:], where, line)
        if not name or box is None:
            image.num_bad += 1
            reading.findings.note(Finding(_NO_BOX, readable(path), image.image_id, detail=f"line {line}"))
            continue
        number = reading.classes.setdefault(name, len(reading.classes))
        if number >= MAX_CLASSES:
            raise UserError(f"{where} has more than {MAX_CLASSES:,} classes; is its column of classes another one?")
        image.num_boxes += 1
        left, top, third, fourth = box
        width, height = (third - left, fourth - top) if columns.has_corners else (third, fourth)
        reading.largest = max(reading.largest, left + width, top + height)
        yield AnnotationEntry(
            next(numbers), image.image_id, number, (left, top, width, height), width * height, iscrowd=False
        )


def _refusal(path: str, find: FolderFiles, used: dict[str, str]) -> str | None:
    """Return why an image cannot be read, and note which file it is."""
    file = find.by_end(path)
    if file is None:
        return _NO_FILE
    if used.setdefault(file, path) != path:
        return _SAME_FILE
    return find.refuse_outside(file)


def _add_findings(reading: _Reading, find: FolderFiles) -> None:
    for image in reading.images.values():
        if image.num_bad and not image.num_boxes:
            image.refusal = image.refusal or _ONLY_BAD_ROWS
    known = {find.by_end(path) for path in reading.images}
    num_others = sum(is_image_name(path) and path not in known for path in find.paths)
    reading.findings.note(Finding(_NOT_LISTED, count=num_others))


def _check_unit(largest: float, where: str, fractions: bool) -> None:
    if not fractions and 0 < largest <= 1:
        raise UserError(
            f"{where}: no coordinate is above 1, so its boxes are fractions of the image; pass --fractions true"
        )
    if fractions and largest > 2:
        raise UserError(f"{where} has the coordinate {largest:g}, which is no fraction of an image; omit --fractions")


def _box(values: Sequence[str], where: str, line: int) -> BoxXywh | None:
    """Return the four numbers of a row; None if they are not finite numbers."""
    for value in values:
        if "," in value and value.replace(",", "", 1).lstrip("+-").isdecimal():
            raise UserError(
                f"{where}: line {line} has the number {value} with a decimal comma; write decimal points, as "
                f"{value.replace(',', '.')}"
            )
    numbers = finite_numbers(values)
    return None if numbers is None else (numbers[0], numbers[1], numbers[2], numbers[3])


def _rows(text: io.TextIOWrapper, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank, each with the number of its last line."""
    try:
        lines = _lines(text, where)
        first = next(lines, "")
        # The separator with which the first line has the most fields.
        delimiter = max(",;\t", key=lambda character: len(next(csv.reader([first], delimiter=character))))
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, skipinitialspace=True)
        for row in reader:
            if any(map(str.strip, row)):
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not text in UTF-8 or UTF-16 ({error.reason}); save the file as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{where} is not a CSV file: {one_line(error)}; expected {EXPECTED}") from None


def _lines(text: io.TextIOWrapper, where: str) -> Iterator[str]:
    while line := text.readline(MAX_LINE_CHARS):
        if len(line) == MAX_LINE_CHARS:
            raise UserError(f"{where} has a line of more than {MAX_LINE_CHARS:,} characters; it is not a list of boxes")
        if "\0" in line:
            raise UserError(f"{where} is not text: it contains NUL characters")
        yield line
