"""The division of a scoring run into chunks, and the data that its processes share.

The unit of work is a chunk: consecutive rows of the input that become one output file, named after its number. A
chunk is done when its file exists, and one that is processed twice writes the same file. Within a chunk images travel
in blocks, which are consecutive rows too.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from raydet.cluster.stopwatch import FileStats
from raydet.config import PredictConfig
from raydet.engines.loading import EngineLoader
from raydet.images.collection import Collection
from raydet.measuring.fitting.operating_point import FittedPoint
from raydet.models.adapters.description import AdapterFolder
from raydet.tables import storage
from raydet.tables.layout import FileGroups
from raydet.tables.output_folder import OutputFolder

LOG_FOLDER = "__log"
"""Log folder in OUT; names with a leading `_` are not part of the table."""
_MOST_ROWS_PER_FILE = 1024
"""Maximum rows of a detections file, a few megabytes; a kill loses the work on each file in flight."""
_MOST_ROWS_WITH_VECTORS = 256
"""The same with vectors: 300 queries with embeddings of 256 numbers take 150 kB an image, which wait in memory."""
_LEAST_FILES_PER_WORKER = 16
"""A chunk is decoded in one thread, so a worker needs several at a time, and none may idle at the end."""
_EVEN_ENOUGH = 1.02
"""Larger chunks are preferred to a distribution that saves less than this factor."""
_IMAGES_PER_BLOCK = 64
"""Enough to make the cost of a call to another process negligible, few enough to start the model soon."""
OWN_TABLE = ""
"""Folder of the only table of a run without adapters: OUT itself."""
COUNTS_KEY = b"raydet_counts"
"""Metadata of a file with its numbers of errors and detections, JSON."""
_PART_NAME = re.compile(r"part-(\d{7,})\.parquet")


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """Division of the images into chunks and blocks; a resumed run keeps its first plan.

    The batches of the model follow from the plan and from the images, never from timing.

    Attributes:
        rows_per_file: Images per chunk; the last chunk may have fewer.
        images_per_block: Maximum number of images that are decoded and passed to the model together; blocks of large
            images are shorter.
        images_per_batch: Images that fill a batch of the model, if they have one size and are not cut into tiles.
        batch_size: Images or tiles per forward pass.
    """

    num_rows: int
    rows_per_file: int
    images_per_block: int
    images_per_batch: int
    batch_size: int

    @classmethod
    def of(cls, config: PredictConfig, num_rows: int, batch_size: int) -> "ScoringPlan":
        """Plan a new run."""
        images_per_batch = max(1, batch_size // 2) if config.flip else batch_size
        if config.tile:
            images_per_batch = 1
        least_files = _LEAST_FILES_PER_WORKER * config.num_workers
        most_rows = _MOST_ROWS_WITH_VECTORS if config.keeps_vectors else _MOST_ROWS_PER_FILE
        # The rows of all adapters wait in memory until the chunk is finished.
        most_rows = max(_IMAGES_PER_BLOCK, most_rows // max(1, len(config.adapters)))
        rows_per_file = config.rows_per_file or min(
            most_rows, max(_IMAGES_PER_BLOCK // 2, math.ceil(num_rows / least_files))
        )
        rows_per_file = _rounded_up(rows_per_file, images_per_batch)
        if not config.rows_per_file:
            rows_per_file = _even(rows_per_file, num_rows, config.num_workers, step=images_per_batch)
        return cls(
            num_rows=num_rows,
            rows_per_file=rows_per_file,
            images_per_block=_rounded_up(_IMAGES_PER_BLOCK, images_per_batch),
            images_per_batch=images_per_batch,
            batch_size=batch_size,
        )

    @property
    def num_chunks(self) -> int:
        """Number of chunks, which equals the number of output files."""
        return math.ceil(self.num_rows / self.rows_per_file)

    def rows_of(self, chunk: int) -> range:
        """Return the positions of a chunk's images."""
        start = chunk * self.rows_per_file
        return range(start, min(start + self.rows_per_file, self.num_rows))


def _even(most_rows: int, num_rows: int, num_workers: int, *, step: int) -> int:
    """Return the rows per chunk, at least half of `most_rows`, for which the busiest worker gets the fewest rows."""

    def rows_of_busiest(rows: int) -> int:
        return math.ceil(math.ceil(num_rows / rows) / num_workers) * rows

    choices = range(most_rows, max(1, most_rows // 2) - 1, -step)
    fewest = min(map(rows_of_busiest, choices))
    return next(rows for rows in choices if rows_of_busiest(rows) <= _EVEN_ENOUGH * fewest)


def _rounded_up(number: int, step: int) -> int:
    return math.ceil(number / step) * step


class FileCounts(NamedTuple):
    """Counts of one detections file."""

    groups: FileGroups
    num_errors: int
    num_detections: int

    @property
    def num_images(self) -> int:
        """Number of rows."""
        return sum(num_rows for num_rows, _ in self.groups)


@dataclass(frozen=True, kw_only=True)
class ChunkStats(FileStats):
    """Statistics of a finished chunk, whose file has the same name in each table of the run.

    Attributes:
        counts: Counts of its file in each table, in their order.
    """

    counts: tuple[FileCounts, ...]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Data that the processes of a scoring run share.

    Attributes:
        config: Options of the run, with absolute paths.
        model_fingerprint: Fingerprint of the checkpoint at the start of the run.
        point: Operating point to apply, as it was at the start of the run.
        schemas: Schema of each table to write, by its folder in OUT: `OWN_TABLE`, or the name of each adapter.
        load_engine: Loads the engine; benchmarks replace it.
        adapters: The adapters of the run as they were at its start, in the order of `schemas`.
    """

    config: PredictConfig
    folder: OutputFolder
    model_fingerprint: str
    images: Collection
    plan: ScoringPlan
    schemas: Mapping[str, pa.Schema]
    load_engine: EngineLoader
    point: FittedPoint | None = None
    adapters: tuple[AdapterFolder, ...] = ()

    @property
    def model_name(self) -> str:
        """Folder or name of the model."""
        name = self.config.checkpoint or self.config.model
        assert name is not None, "the config asks for a checkpoint or a model"
        return name


def part_name(chunk: int) -> str:
    """Return the file name of a chunk."""
    return f"part-{chunk:07d}.parquet"


def table_uri(folder: OutputFolder, table: str) -> str:
    """Return the URI of a table of a run; see `Work.schemas`."""
    return folder.uri if table == OWN_TABLE else folder.uri_of(table)


def files_of_chunks(folder: OutputFolder, tables: Iterable[str] = (OWN_TABLE,)) -> dict[str, int]:
    """Return the chunk of each file that has the name of a chunk's, in all tables; files appear atomically."""
    names = [set(storage.list_files(table_uri(folder, table))) for table in tables]
    matches = map(_PART_NAME.fullmatch, sorted(set.intersection(*names)))
    return {match[0]: int(match[1]) for match in matches if match}
