"""The division of a crops run into chunks, and the data that its processes share.

A chunk is a range of rows of the detections table, which becomes one file with a row for each of their detections.
"""

import math
from dataclasses import dataclass

import pyarrow as pa

from raydet.config import CropsConfig
from raydet.images.collection import Collection
from raydet.tables.output_folder import OutputFolder
from raydet.tables.table import Table


@dataclass(frozen=True, kw_only=True)
class CropsWork:
    """Data that the processes of a crops run share.

    Attributes:
        config: Options of the run, with absolute paths.
        images: The images that were scored, in the order of the detections.
        found: Detections table.
        schema: Schema of the files, with the token of the run.
        images_per_file: Images per chunk; the last chunk may have fewer.
    """

    config: CropsConfig
    folder: OutputFolder
    images: Collection
    found: Table
    schema: pa.Schema
    images_per_file: int

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return math.ceil(self.found.num_rows / self.images_per_file)

    def rows_of(self, chunk: int) -> range:
        """Return the rows of a chunk."""
        start = chunk * self.images_per_file
        return range(start, min(start + self.images_per_file, self.found.num_rows))
