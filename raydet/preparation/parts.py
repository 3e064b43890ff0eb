"""The unit of work: consecutive images of a source that become one file of the table.

The number of images per part follows from the data and not from the number of workers, so that a single thread and a
cluster write the same files, byte for byte.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from raydet.common.errors import RunError, one_line
from raydet.common.threads import available_cpus, in_order
from raydet.preparation.examining import Examine, Rejected, Row
from raydet.preparation.sources.source import Finding, SourceImage
from raydet.preparation.splitting import Hashes
from raydet.tables import storage
from raydet.tables.columns import Integers
from raydet.tables.layout import FileGroups
from raydet.tables.table import FileWriter

FILE_BYTES = 256 * 2**20
"""Average total size of the images in a file, in bytes."""
SURVEY_IMAGES = 1024
"""Images per part of a survey, which writes no file."""

_ROWS_AT_ONCE = 64
_BYTES_AT_ONCE = 4 * 2**20
_IMAGES_AHEAD_PER_THREAD = 4
_MOST_BYTES_AHEAD = 128 * 2**20

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class SourcePart:
    """Some images of a source.

    Attributes:
        index: Position among the parts of its table, from 0.
        images: The images to examine, in order; can be iterated once.
    """

    index: int
    images: Iterable[SourceImage]


class Executor(Protocol):
    """Function that applies a given function to all parts and yields the results in order."""

    def __call__(self, work: Callable[[SourcePart], Answer], parts: Iterable[SourcePart], /) -> Iterator[Answer]:
        """Hold only a few parts at a time."""


@dataclass
class PartOutcome:
    """Result of writing a part.

    Attributes:
        row_groups: Row groups of the file; empty if there is no file.
        counts: Numbers named found, accepted, boxes, crowd_boxes and without_boxes.
        boxes_by_class: Number of boxes per class, int64 [C].
        image_ids: Image ids of the rows, [N].
        hashes: Hashes of the image contents, [N, 2].
        rejected: Images without a row.
        findings: Anomalies of the images and their boxes.
    """

    row_groups: FileGroups
    counts: Counter[str]
    boxes_by_class: Integers
    image_ids: Integers
    hashes: Hashes
    rejected: list[Rejected] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def cut(images: Iterable[SourceImage], images_per_part: int) -> Iterator[SourcePart]:
    """Cut images into parts; consume each before requesting the next."""
    iterator = iter(images)
    for index in itertools.count():
        first = list(itertools.islice(iterator, 1))
        if not first:
            return
        yield SourcePart(index, itertools.chain(first, itertools.islice(iterator, images_per_part - 1)))


def part_name(index: int) -> str:
    """Return the file name of a part."""
    return f"part-{index:05d}.parquet"


def examine_all(part: SourcePart, examine: Examine, num_threads: int | None) -> Iterator[Row | Rejected]:
    """Examine the images of a part in threads, a few ahead of the caller.

    Raises:
        RunError: The storage failed.
    """
    num_threads = num_threads or available_cpus()
    try:
        yield from in_order(
            examine,
            part.images,
            num_threads=num_threads,
            ahead=num_threads * _IMAGES_AHEAD_PER_THREAD,
            weigh=_bytes_in,
            most=_MOST_BYTES_AHEAD,
        )
    except OSError as error:
        raise RunError(f"cannot read the images: {one_line(error)}; run the same command again") from error


def _bytes_in(result: Row | Rejected) -> int:
    return 0 if isinstance(result, Rejected) else len(result.values["image"]["bytes"] or b"")


def write_part(
    part: SourcePart, *, table_uri: str, schema: pa.Schema, examine: Examine, num_classes: int, num_threads: int | None
) -> PartOutcome:
    """Examine the images of a part and write the rows of those that can be read; a second run writes the same file."""
    counts: Counter[str] = Counter()
    rejected: list[Rejected] = []
    findings: list[Finding] = []
    image_ids: list[int] = []
    hashes: list[bytes] = []
    categories: list[int] = []
    with FileWriter(storage.join(table_uri, part_name(part.index)), schema) as file:
        pending: list[dict[str, Any]] = []
        pending_bytes = 0
        for result in examine_all(part, examine, num_threads):
            counts["found"] += 1
            if isinstance(result, Rejected):
                rejected.append(result)
                continue
            objects = result.values["objects"]
            counts["accepted"] += 1
            counts["without_boxes"] += not objects["id"]
            counts["boxes"] += len(objects["id"])
            counts["crowd_boxes"] += sum(objects["iscrowd"])
            categories += objects["category"]
            findings += result.findings
            image_ids.append(result.values["image_id"])
            hashes.append(result.content_hash)
            pending.append(result.values)
            pending_bytes += len(result.values["image"]["bytes"] or b"")
            if len(pending) >= _ROWS_AT_ONCE or pending_bytes >= _BYTES_AT_ONCE:
                file.write_rows(pending)
                pending, pending_bytes = [], 0
        if pending:
            file.write_rows(pending)
    return PartOutcome(
        row_groups=file.row_groups,
        counts=counts,
        boxes_by_class=np.bincount(np.asarray(categories, np.int64), minlength=num_classes),
        image_ids=np.asarray(image_ids, np.int64),
        hashes=as_hashes(hashes),
        rejected=rejected,
        findings=findings,
    )


def as_hashes(hashes: list[bytes]) -> Hashes:
    """Convert hashes of 16 bytes to an array [N, 2]."""
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2)
