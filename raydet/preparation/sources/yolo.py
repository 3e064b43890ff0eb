"""YOLO label files → records: one .txt file per image, one line per object.

A line is `class cx cy width height`, relative to the upright image, or `class x1 y1 x2 y2 x3 y3 …`, a polygon of at
least three points, of which raydet uses the bounding box. Numbers may exceed the range 0 to 1 by `TOLERANCE`, the
rounding of five digits, and are then clipped. Lines with other numbers are dropped and counted, as are lines with an
unknown class, a different number of columns or a number that is not finite, and repeated lines. Lines of detections
end in a score, have six columns and are therefore dropped. If none of the lines of a file can be used, because it is in
another format or encoding, its image is rejected instead of counting as one without objects.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa

from raydet.common.errors import UserError
from raydet.common.threads import in_order
from raydet.common.untrusted.text import TextError, decode_text
from raydet.config.preparing import Unlabelled
from raydet.images.files import (
    MAX_LABEL_BYTES,
    ImageFolder,
    MissingFileError,
    ReadError,
    list_below,
    readable,
    skipped_detail,
)
from raydet.preparation.sources.source import (
    SKIPPED,
    UNLABELLED,
    UNLABELLED_KEPT,
    Finding,
    FindingLog,
    Source,
    SourceImage,
    SourceObjects,
    aligned_folders,
    top_folders,
)
from raydet.preparation.sources.yolo_files import YoloFiles
from raydet.tables.spill import Spilled

TOLERANCE = 1e-5
"""Relative to the side of the image."""

_OUTSIDE = "the list names a file outside the data set"
_NOT_NUMBERS = "lines with a value that is not a finite number, dropped"
_WRONG_COLUMNS = "lines with a wrong number of columns, dropped"
_OUT_OF_RANGE = "lines with numbers outside 0 to 1, dropped"
_UNUSABLE = (_NOT_NUMBERS, _WRONG_COLUMNS, _OUT_OF_RANGE)

_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class _LabelFile:
    """One label file, or the reason why it cannot be read."""

    classes: list[int] = field(default_factory=list)
    boxes_xywh: list[_Box] = field(default_factory=list)
    findings: Mapping[str, int] = field(default_factory=dict)
    is_missing: bool = False
    refusal: str | None = None


def read_yolo(files: YoloFiles, *, unlabelled: Unlabelled = "keep") -> Source:
    """Read the label files; images without one are kept as images without objects, or rejected.

    Returns:
        One record per image, sorted by path, whose id is the rank; boxes are normalised. Images outside the data set
        come last and are refused. Category ids are the numbers in the files. The column `source_id` holds the relative
        path.

    Raises:
        UserError: No image has a label file.
    """
    index_of = {category.id: index for index, category in enumerate(files.categories)}
    read = partial(_read_labels, files.labels, index_of)
    labels = Spilled(_LabelFile, in_order(read, (label for _, label in files.pairs)))
    if all(item.is_missing for item in labels):
        raise _no_label_file(files)
    findings = FindingLog()
    findings.note(Finding("label files without an image", count=files.num_orphans))
    findings.note(Finding(SKIPPED, count=files.skipped.total(), detail=skipped_detail(files.skipped)))
    for image_id, ((image_path, path), item) in enumerate(zip(files.pairs, labels, strict=True)):
        for kind, count in item.findings.items():
            findings.note(Finding(kind, readable(path), count=count))
        if item.is_missing and unlabelled == "keep":
            findings.note(Finding(UNLABELLED_KEPT, readable(image_path), image_id))

    def records() -> Iterator[SourceImage]:
        next_id = 1
        for image_id, ((path, _), item) in enumerate(zip(files.pairs, labels, strict=True)):
            num_boxes = len(item.classes)
            objects = SourceObjects(
                ids=list(range(next_id, next_id + num_boxes)),
                boxes_xywh=item.boxes_xywh,
                categories=item.classes,
                areas=[width * height for _, _, width, height in item.boxes_xywh],
                iscrowd=[False] * num_boxes,
                is_normalised=True,
            )
            next_id += num_boxes
            unlabelled_refusal = UNLABELLED if item.is_missing and unlabelled == "reject" else None
            yield SourceImage(
                image_id=image_id,
                path=readable(path),
                objects=objects,
                extra={"source_id": readable(path)},
                refusal=files.images.refuse_outside(path) or item.refusal or unlabelled_refusal,
            )
        for image_id, path in enumerate(files.outside, start=len(files.pairs)):
            name = readable(path)
            yield SourceImage(image_id, name, extra={"source_id": name}, refusal=_OUTSIDE)

    num_images = len(files.pairs) + len(files.outside)
    return Source(records, num_images, files.categories, (pa.field("source_id", pa.string()),), findings)


def _no_label_file(files: YoloFiles) -> UserError:
    """Explain that no image has a label file, and where label files are."""
    others = list_below(files.labels)
    label_paths = [path for path in others if path.lower().endswith(".txt")]
    image_paths = [path for path, _ in files.pairs]
    text = (
        f"none of the {len(image_paths)} images below {files.images.uri} has a label file; the first would be "
        f"{files.labels.uri_of(files.pairs[0][1])}"
    )
    if not label_paths:
        return UserError(
            f"{text}, but {files.labels.uri} holds no .txt files and {len(others)} others; for images without "
            "labels, use `raydet prepare images`"
        )
    folders = aligned_folders(label_paths, image_paths)
    if folders is None:
        return UserError(f"{text}, but the first .txt file there is {readable(min(label_paths))}")
    places = [
        f"{what} in {folder.uri_of(subfolder)} ({folder.uri} holds {top_folders(paths)})"
        for what, folder, subfolder, paths in (
            ("images", files.images, folders[1], image_paths),
            ("label files", files.labels, folders[0], label_paths),
        )
        if subfolder
    ]
    return UserError(f"{text}, but names agree for the {' and the '.join(places)}; use these folders")


def _read_labels(folder: ImageFolder, index_of: Mapping[int, int], path: str) -> _LabelFile:
    """Read one label file, in a thread."""
    refusal = folder.refuse_outside(path)
    if refusal is not None:
        return _LabelFile(refusal=f"its label file: {refusal}")
    try:
        text = decode_text(folder.read(path, max_bytes=MAX_LABEL_BYTES))
    except MissingFileError:
        return _LabelFile(is_missing=True)
    except (ReadError, TextError) as error:
        return _LabelFile(refusal=f"its label file: {error}")
    classes: list[int] = []
    boxes_xywh: list[_Box] = []
    findings: Counter[str] = Counter()
    seen: set[tuple[float, ...]] = set()
    for line in filter(None, map(str.split, text.splitlines())):
        numbers = _numbers(line)
        if numbers is None:
            findings[_NOT_NUMBERS] += 1
        elif len(numbers) != 5 and (len(numbers) < 7 or len(numbers) % 2 == 0):
            findings[_WRONG_COLUMNS] += 1
        elif numbers[0] not in index_of:
            findings["lines of an unknown class, dropped"] += 1
        elif (box_xywh := _box_xywh(numbers[1:])) is None:
            findings[_OUT_OF_RANGE] += 1
        elif numbers in seen:
            findings["repeated lines, dropped"] += 1
        else:
            seen.add(numbers)
            classes.append(index_of[int(numbers[0])])
            boxes_xywh.append(box_xywh)
    kind, _ = next(iter(findings.most_common(1)), ("", 0))
    if not boxes_xywh and kind in _UNUSABLE:
        # Another format, such as detections or pixels: the image has objects, and must not become a negative.
        return _LabelFile(refusal=f"its label file: no usable line, only {kind.removesuffix(', dropped')}")
    return _LabelFile(classes, boxes_xywh, findings)


def _numbers(words: list[str]) -> tuple[float, ...] | None:
    try:
        numbers = tuple(map(float, words))
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _box_xywh(numbers: tuple[float, ...]) -> _Box | None:
    """Convert the columns after the class to (left, top, width, height); None if they are out of range."""
    if min(numbers) < -TOLERANCE or max(numbers) > 1 + TOLERANCE:
        return None
    if len(numbers) > 4:
        xs, ys = numbers[::2], numbers[1::2]
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    else:
        cx, cy, width, height = numbers
        left, top, right, bottom = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
        if not _leaves(left, right) and not _leaves(top, bottom):
            return left, top, width, height
    left, top, right, bottom = map(_snap, (left, top, right, bottom))
    return left, top, right - left, bottom - top


def _leaves(low: float, high: float) -> bool:
    return low < 0 or high > 1


def _snap(place: float) -> float:
    """Move a coordinate that rounding put outside back to the edge; others stay, to be clipped and counted."""
    if -TOLERANCE <= place < 0:
        return 0.0
    return 1.0 if 1 < place <= 1 + TOLERANCE else place
