"""The records that every annotation format yields, and the findings about them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.errors import UserError, one_line
from raydet.common.untrusted.text import TextError, decode_text
from raydet.images.files import MAX_LABEL_BYTES, readable
from raydet.tables import storage
from raydet.tables.coco_json import integer
from raydet.tables.schema import LABELLED_COLUMN, MAX_IMAGE_ID, OPTIONAL_FIELDS, Category, check_class_names
from raydet.tables.spill import Spilled

UNLABELLED_KEPT = "unlabelled images, kept without objects"
"""Kind of finding, with `--unlabelled keep`."""
UNLABELLED = "no labels"
"""Reason for rejection, with `--unlabelled reject`."""
_MOST_FOLDERS_SHOWN = 5
_MOST_CLASSES_SHOWN = 20
_MAX_SIDE = 2**31

SOURCE_ID = (pa.field("source_id", pa.string()),)
"""The extra column of most sources."""
ORIGIN_KEY = "labels"
"""Key of `Source.origin` in the metadata of a table."""
OTHER_CLASS = "objects of classes that are not in --classes, dropped"
SKIPPED = "files skipped because their endings are not those of images"

Ids = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class Finding:
    """An anomaly in a data set: a row of the table of findings.

    Attributes:
        kind: The same text for all findings of a kind.
        path: The image or annotation file, relative to its folder; None if the finding is about neither.
        image_id: Id in the images table, if known.
        annotation_id: Annotation id, if the finding is about a single box and the id is known.
        detail: Particulars of this finding.
    """

    kind: str
    path: str | None = None
    image_id: int | None = None
    annotation_id: int | None = None
    count: int = 1
    detail: str | None = None


class FindingLog(Counter[str]):
    """Counter of findings by kind; `rows` holds the findings themselves, on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Spilled[Finding] = Spilled(Finding)

    def note(self, finding: Finding) -> None:
        """Add a finding, unless its count is zero."""
        if finding.count:
            self[finding.kind] += finding.count
            self.rows.append(finding)


@dataclass(frozen=True)
class SourceObjects:
    """The boxes of one image as in its source: not yet clipped, possibly without area.

    Attributes:
        ids: The source's own ids, [N].
        boxes_xywh: Absolute pixels (left, top, width, height), [N, 4].
        categories: Indices from 0 into the source's categories, [N].
        areas: Square pixels of the objects, [N].
        iscrowd: True if the box marks a crowd, [N].
        is_normalised: Boxes and areas are relative to the upright image, whose size is not known yet.
        scores: Scores of boxes that a model found, [N]; None for labels that people drew.
    """

    ids: list[int] = field(default_factory=list)
    boxes_xywh: list[tuple[float, float, float, float]] = field(default_factory=list)
    categories: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    iscrowd: list[bool] = field(default_factory=list)
    is_normalised: bool = False
    scores: list[float] | None = None


@dataclass(frozen=True)
class SourceImage:
    """One image of a source.

    Attributes:
        image_id: Unique, 0 ≤ id < 2⁵³.
        path: Relative to the source's folder, with `/`.
        objects: Its boxes; None if the source has no labels.
        size_hw: Height and width in pixels as the source states them, possibly wrong; None if it states none.
        extra: Values of the source's extra columns.
        refusal: Reason for rejecting the image unread; None if it may be read.
        content_hash: Hash of its bytes if a survey has read and decoded them; None otherwise.
        locator: Key by which the source reads the image; None if that is the path.
    """

    image_id: int
    path: str
    objects: SourceObjects | None = None
    size_hw: tuple[int, int] | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    refusal: str | None = None
    content_hash: bytes | None = None
    locator: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set before it becomes a table.

    Attributes:
        records: Generates one record per image, in the order of the rows.
        categories: The classes, in the order of their indices.
        extra_fields: Arrow fields of the records' `extra` values.
        findings: Anomalies in the annotations.
        origin: What found the boxes and which of its detections became labels, JSON-serialisable; None if people drew
            them. The boxes then have scores, and `thresholds` holds the least score of a label by class name.
    """

    records: Callable[[], Iterator[SourceImage]]
    num_images: int
    categories: tuple[Category, ...] = ()
    extra_fields: tuple[pa.Field, ...] = ()
    findings: FindingLog = field(default_factory=FindingLog)
    origin: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_class_names(self.categories)
        for extra in self.extra_fields:
            if OPTIONAL_FIELDS["images"].get(extra.name, extra.type) != extra.type:
                raise UserError(f"the source has a column {extra.name}, a name with a meaning of its own; rename it")

    @property
    def images(self) -> Iterator[SourceImage]:
        """The records from the first one on, generated again for each use."""
        return self.records()


LABELLED_FIELD = pa.field(LABELLED_COLUMN, OPTIONAL_FIELDS["images"][LABELLED_COLUMN])


def labelled_for(source: Source, names: Sequence[str]) -> Source:
    """Return a source whose images are labelled for these classes only.

    Raises:
        UserError: The source has no class of such a name, or states the labelled classes of each image itself.
    """
    if LABELLED_FIELD in source.extra_fields:
        raise UserError("--labelled: the annotations state for each image which classes are labelled; omit the option")
    index_of = {category.name: index for index, category in enumerate(source.categories)}
    unknown = [name for name in names if name not in index_of]
    if unknown:
        known = ", ".join(list(index_of)[:_MOST_CLASSES_SHOWN]) or "none"
        raise UserError(f"--labelled: there is no class {unknown[0]}; the classes are {known}")
    extra = {LABELLED_COLUMN: sorted({index_of[name] for name in names})}

    def records() -> Iterator[SourceImage]:
        for image in source.records():
            yield replace(image, extra={**image.extra, **extra})

    return replace(source, records=records, extra_fields=(*source.extra_fields, LABELLED_FIELD))


@dataclass(kw_only=True)
class NamedBoxes:
    """The boxes of one image in an annotation file, by class name, or the reason why they cannot be read.

    Attributes:
        boxes_xywh: As in `SourceObjects`, [N, 4].
        areas: Areas in the unit of the boxes, [N].
        iscrowd: True if the box marks a crowd, [N].
        notes: Number of anomalies by kind.
        refusal: Reason for rejecting the image; None if the labels can be read.
    """

    names: list[str] = field(default_factory=list)
    boxes_xywh: list[tuple[float, float, float, float]] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    iscrowd: list[bool] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    refusal: str | None = None

    def add(
        self, name: str, box_xywh: tuple[float, float, float, float], *, area: float, iscrowd: bool = False
    ) -> None:
        """Add a box."""
        self.names.append(name)
        self.boxes_xywh.append(box_xywh)
        self.areas.append(area)
        self.iscrowd.append(iscrowd)

    def note(self, kind: str, is_one: bool = True) -> None:
        """Count an anomaly, if it is one."""
        if is_one:
            self.notes[kind] = self.notes.get(kind, 0) + 1

    def objects(self, index_of: Mapping[str, int], ids: Iterator[int], *, is_normalised: bool = False) -> SourceObjects:
        """Return the boxes of known classes, with the next ids."""
        kept = [place for place, name in enumerate(self.names) if name in index_of]
        return SourceObjects(
            ids=[next(ids) for _ in kept],
            boxes_xywh=[self.boxes_xywh[place] for place in kept],
            categories=[index_of[self.names[place]] for place in kept],
            areas=[self.areas[place] for place in kept],
            iscrowd=[self.iscrowd[place] for place in kept],
            is_normalised=is_normalised,
        )

    def add_findings(
        self, findings: FindingLog, index_of: Mapping[str, int], path: str, image_id: int | None = None
    ) -> None:
        """Note the anomalies of the image, and its boxes of unknown classes."""
        for kind, count in self.notes.items():
            findings.note(Finding(kind, path, image_id, count=count))
        for name, count in Counter(name for name in self.names if name not in index_of).items():
            findings.note(Finding(OTHER_CLASS, path, image_id, count=count, detail=f"their class is {name}"))


def finite_numbers(texts: Iterable[str | None]) -> tuple[float, ...] | None:
    """Return the numbers in texts, or None if one is missing or not a finite number."""
    try:
        numbers = tuple(float(text or "") for text in texts)
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def read_class_names(classes: Sequence[str]) -> list[str]:
    """Read the option `classes`: class names, or one .txt file with a name per line.

    Raises:
        UserError: There is no such file, it is not text, or the names are missing or repeated.
    """
    names = [name.strip() for name in classes]
    if len(names) == 1 and names[0].endswith(".txt"):
        try:
            text = decode_text(storage.read_bytes(names[0], max_bytes=MAX_LABEL_BYTES))
        except (OSError, TextError) as error:
            raise UserError(f"cannot read the classes in {names[0]}: {one_line(error)}") from None
        names = [line.strip() for line in text.splitlines() if line.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names or not all(names) or repeated:
        raise UserError(f"--classes must be distinct names, got {repeated[0] if repeated else classes!r}")
    return [readable(name) for name in names]


def aligned_folders(label_paths: Iterable[str], image_paths: Iterable[str]) -> tuple[str, str] | None:
    """Find the subfolders of labels and of images below which a label file and an image have the same relative path.

    Either may be empty; None if no label file is named like an image.
    """
    label_of = {PurePosixPath(path).stem: path for path in label_paths}
    for path in image_paths:
        label = label_of.get(PurePosixPath(path).stem)
        if label is not None:
            label_folders, image_folders = PurePosixPath(label).parts[:-1], PurePosixPath(path).parts[:-1]
            while label_folders and image_folders and label_folders[-1] == image_folders[-1]:
                label_folders, image_folders = label_folders[:-1], image_folders[:-1]
            return "/".join(label_folders), "/".join(image_folders)
    return None


def top_folders(paths: Iterable[str]) -> str:
    """Name the first folders of relative paths, as in "train/ and val/"; empty if no path has a folder."""
    names = sorted({f"{path.partition('/')[0]}/" for path in paths if "/" in path})
    shown = names[:_MOST_FOLDERS_SHOWN]
    if len(names) > len(shown):
        return f"{', '.join(shown)} and {len(names) - len(shown)} more folders"
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


def are_unique(ids: Ids) -> bool:
    """Return True if no id occurs twice."""
    return len(np.unique(np.asarray(ids))) == len(ids)


def are_image_ids(ids: Ids) -> bool:
    """Return True if a table can hold these as the ids of its images, of which there is at least one."""
    array = np.asarray(ids)
    return bool(array.min() >= 0 and array.max() < MAX_IMAGE_ID) and are_unique(array)


def image_id_of(value: object) -> int | None:
    """Return the image id in a value of a file, or None if a table cannot hold it."""
    number = integer(value)
    return number if number is not None and 0 <= number < MAX_IMAGE_ID else None


def size_hw_of(height: object, width: object) -> tuple[int, int] | None:
    """Return the height and width in pixels in two values of a file, or None if these are not a size."""
    size_hw = integer(height) or 0, integer(width) or 0
    return size_hw if all(0 < side < _MAX_SIDE for side in size_hw) else None
