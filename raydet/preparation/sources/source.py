"""Where images tables come from: one small module a format, each yielding the same records."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from raydet.common.errors import UserError, one_line
from raydet.images.files import readable
from raydet.tables import storage
from raydet.tables.schema import Category
from raydet.tables.spill import Spilled


@dataclass(frozen=True)
class Finding:
    """Something odd in a data set: a row of the table of findings.

    Attributes:
        kind: What, in words that are the same for all of its kind.
        path: The image or the file of annotations, relative to its folder; None where it is about none.
        image_id: As in the images table, where it is known.
        annotation_id: Likewise, of a single box.
        count: How often.
        detail: What this one was, and what became of it.
    """

    kind: str
    path: str | None = None
    image_id: int | None = None
    annotation_id: int | None = None
    count: int = 1
    detail: str | None = None


class FindingLog(Counter[str]):
    """How often each kind of finding occurs, by its kind, and each of them in `rows`, which are on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Spilled[Finding] = Spilled(Finding)

    def note(self, finding: Finding) -> None:
        """Adds a finding; one that occurs zero times is none."""
        if finding.count:
            self[finding.kind] += finding.count
            self.rows.append(finding)


@dataclass(frozen=True)
class SourceObjects:
    """The boxes of one image as its source has them: not yet clipped, possibly without area.

    Attributes:
        ids: The source's own ids, [N].
        boxes_xywh: Absolute pixels (left, top, width, height), [N, 4].
        categories: Indices from 0 into the source's categories, [N].
        areas: Square pixels of the objects, [N].
        iscrowd: Whether the box stands for a crowd, [N].
        is_normalised: Boxes and areas are in parts of the upright image instead, whose size is not known yet.
    """

    ids: list[int] = field(default_factory=list)
    boxes_xywh: list[tuple[float, float, float, float]] = field(default_factory=list)
    categories: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    iscrowd: list[bool] = field(default_factory=list)
    is_normalised: bool = False


@dataclass(frozen=True)
class SourceImage:
    """One image as its source names it.

    Attributes:
        image_id: Unique, 0 ≤ id < 2⁵³.
        path: Relative to the source's folder, with `/`.
        objects: Its boxes; None where the source has no labels.
        size_hw: Height and width that the source states, which may be wrong; None where it states none.
        extra: Values of the source's extra columns.
        refusal: Why this image must not be read; None where it may.
        content_hash: Of its bytes, if they have been read and found to be a picture before; None otherwise.
        locator: What the source's images are read by where that is not the path; None where it is.
    """

    image_id: int
    path: str
    objects: SourceObjects | None = None
    size_hw: tuple[int, int] | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    refusal: str | None = None
    content_hash: bytes | None = None
    locator: str | None = None


class Records(Iterable[SourceImage]):
    """The records of a source, made anew each time they are gone through."""

    def __init__(self, make: Callable[[], Iterator[SourceImage]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[SourceImage]:
        return self._make()


@dataclass(frozen=True)
class Source:
    """A data set before it is a table.

    Attributes:
        images: One record for each image found, in the order of the rows; to be gone through more than once.
        num_images: How many these are.
        categories: The classes, in the order of their indices.
        extra_fields: Arrow fields of the records' `extra` values.
        findings: What was odd in the annotations.
    """

    images: Iterable[SourceImage]
    num_images: int
    categories: tuple[Category, ...] = ()
    extra_fields: tuple[pa.Field, ...] = ()
    findings: FindingLog = field(default_factory=FindingLog)


def read_class_names(classes: Sequence[str]) -> list[str]:
    """The names of classes as the option `classes` has them: the names, or one .txt file with a name a line.

    Raises:
        UserError: There is no such file, it holds no text, or no name or one twice is given.
    """
    names = [name.strip() for name in classes]
    if len(names) == 1 and names[0].endswith(".txt"):
        try:
            text = storage.read_bytes(names[0]).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the classes in {names[0]}: {one_line(error)}") from None
        names = [line.strip() for line in text.splitlines() if line.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names or not all(names) or repeated:
        raise UserError(f"--classes must be distinct names, got {repeated[0] if repeated else classes!r}")
    return [readable(name) for name in names]
