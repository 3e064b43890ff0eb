"""One chunk of a crops run → its file: crops in batches to the model, its answers as rows."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from raydet.config import CropsConfig
from raydet.scoring.plan import COUNTS_KEY, part_name
from raydet.second_looks.cutting import Crop, crops_of
from raydet.second_looks.models.looker import Looker, answer_fields
from raydet.second_looks.work import CropsWork
from raydet.tables import storage
from raydet.tables.layout import FileGroups
from raydet.tables.table import FileWriter


@dataclass(frozen=True)
class WrittenChunk:
    """A written chunk.

    Attributes:
        name: File name; a chunk without detections has a file too, so that it counts as done.
        groups: Row groups of the file.
        num_images: Images of the chunk.
        num_crops: Rows.
        num_errors: Rows without an answer.
    """

    name: str
    groups: FileGroups
    num_images: int
    num_crops: int
    num_errors: int


def write_chunk(work: CropsWork, looker: Looker, chunk: int, *, num_threads: int) -> WrittenChunk:
    """Write the file of a chunk; a second run writes the same rows.

    Raises:
        UserError: The images are not those of the detections.
        OSError: The storage failed.
    """
    crops = crops_of(work, work.rows_of(chunk), num_threads=num_threads)
    rows = list(_answered(crops, looker, work.config))
    num_errors = sum(row["error"] is not None for row in rows)
    counts = {"num_images": len(work.rows_of(chunk)), "num_crops": len(rows), "num_errors": num_errors}
    schema = work.schema.with_metadata({**(work.schema.metadata or {}), COUNTS_KEY: json.dumps(counts).encode()})
    name = part_name(chunk)
    with FileWriter(storage.join(work.folder.uri, name), schema) as file:
        file.write_rows(rows)
    return WrittenChunk(name, file.row_groups, **counts)


def _answered(crops: Iterable[Crop], looker: Looker, config: CropsConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of crops in order; batches of the model go on from image to image."""
    iterator = iter(crops)
    nothing: dict[str, Any] = {field.name: None for field in answer_fields(config)}
    while batch := list(itertools.islice(iterator, config.batch_size)):
        seen = [crop.pixels for crop in batch if crop.pixels is not None]
        answers = iter(looker.look(seen) if seen else ())
        for crop in batch:
            answer = nothing if crop.pixels is None else next(answers)
            yield {**crop.row, **answer, "error": crop.error}
