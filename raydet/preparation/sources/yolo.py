"""YOLO label files → records: one .txt file per image, one line per object.

A line is `class cx cy width height`, relative to the upright image, or `class x1 y1 x2 y2 x3 y3 …`, a polygon of at
least three points, of which raydet uses the bounding box. Numbers may exceed the range 0 to 1 by `TOLERANCE`, the
rounding of five digits, and are then clipped. Lines with other numbers are dropped and counted, as are lines with an
unknown class, a different number of columns or a number that is not finite, and repeated lines. Lines of detections
end in a score, have six columns and are therefore dropped. If none of the lines of a file can be used, because it is in
another format or encoding, its image is rejected instead of counting as one without objects.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count

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
    SOURCE_ID,
    UNLABELLED,
    UNLABELLED_KEPT,
    Finding,
    FindingLog,
    NamedBoxes,
    Source,
    SourceImage,
    aligned_folders,
    finite_numbers,
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


@dataclass(kw_only=True)
class _LabelFile(NamedBoxes):
    """One label file."""

    is_missing: bool = False


def read_yolo(files: YoloFiles, *, unlabelled: Unlabelled = "keep") -> Source:
    """Read the label files; images without one are kept as images without objects, or rejected.

    Returns:
        One record per image, sorted by path, whose id is the rank; boxes are normalised. Images outside the data set
        come last and are refused. Category ids are the numbers in the files. The column `source_id` holds the relative
        path.

    Raises:
        UserError: No image has a label file.
    """
    index_of = {category.name: index for index, category in enumerate(files.categories)}
    read = partial(_read_labels, files.labels, {category.id: category.name for category in files.categories})
    labels = Spilled(_LabelFile, in_order(read, (label for _, label in files.pairs)))
    if all(item.is_missing for item in labels):
        raise _no_label_file(files)
    findings = FindingLog()
    findings.note(Finding("label files without an image", count=files.num_orphans))
    findings.note(Finding(SKIPPED, count=files.skipped.total(), detail=skipped_detail(files.skipped)))
    for image_id, ((image_path, path), item) in enumerate(zip(files.pairs, labels, strict=True)):
        item.add_findings(findings, index_of, readable(path))
        if item.is_missing and unlabelled == "keep":
            findings.note(Finding(UNLABELLED_KEPT, readable(image_path), image_id))

    def records() -> Iterator[SourceImage]:
        ids = count(1)
        for image_id, ((path, _), item) in enumerate(zip(files.pairs, labels, strict=True)):
            unlabelled_refusal = UNLABELLED if item.is_missing and unlabelled == "reject" else None
            yield SourceImage(
                image_id=image_id,
                path=readable(path),
                objects=item.objects(index_of, ids, is_normalised=True),
                extra={"source_id": readable(path)},
                refusal=files.images.refuse_outside(path) or item.refusal or unlabelled_refusal,
            )
        for image_id, path in enumerate(files.outside, start=len(files.pairs)):
            name = readable(path)
            yield SourceImage(image_id, name, extra={"source_id": name}, refusal=_OUTSIDE)

    num_images = len(files.pairs) + len(files.outside)
    return Source(records, num_images, files.categories, SOURCE_ID, findings)


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
    sides = ("images", files.images, folders[1], image_paths), ("label files", files.labels, folders[0], label_paths)
    places = [
        f"{what} in {folder.uri_of(subfolder)} ({folder.uri} holds {top_folders(paths)})"
        for what, folder, subfolder, paths in sides
        if subfolder
    ]
    return UserError(f"{text}, but names agree for the {' and the '.join(places)}; use these folders")


def _read_labels(folder: ImageFolder, name_of: Mapping[int, str], path: str) -> _LabelFile:
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
    result = _LabelFile()
    seen: set[tuple[float, ...]] = set()
    for line in filter(None, map(str.split, text.splitlines())):
        numbers = finite_numbers(line)
        if numbers is None:
            result.note(_NOT_NUMBERS)
        elif len(numbers) != 5 and (len(numbers) < 7 or len(numbers) % 2 == 0):
            result.note(_WRONG_COLUMNS)
        elif numbers[0] not in name_of:
            result.note("lines of an unknown class, dropped")
        elif (box_xywh := _box_xywh(numbers[1:])) is None:
            result.note(_OUT_OF_RANGE)
        elif numbers in seen:
            result.note("repeated lines, dropped")
        else:
            seen.add(numbers)
            result.add(name_of[int(numbers[0])], box_xywh, area=box_xywh[2] * box_xywh[3])
    kind = max(result.notes, key=lambda kind: result.notes[kind], default="")
    if not result.names and kind in _UNUSABLE:
        # Another format, such as detections or pixels: the image has objects, and must not become a negative.
        return _LabelFile(refusal=f"its label file: no usable line, only {kind.removesuffix(', dropped')}")
    return result


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
