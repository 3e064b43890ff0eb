"""Images for the measurements of a plan: samples of the user's images, or generated ones."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

from raydet.common.errors import UserError
from raydet.config import PlanConfig, PrepareShapesConfig
from raydet.images.collection import Collection, TableCollection, open_collection
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, is_table, open_table

_MOST_SAMPLES = 256
_NUM_GENERATED = 64
_STRETCHES = 2
"""Positions in the user's images to sample from; few, because a table is read by row groups."""
_MOST_TABLE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Samples:
    """Some of the user's images, encoded, with their labels if they have any.

    Attributes:
        rows: Rows of an images table.
        categories: Classes of the table.
        source_read_s: Seconds to read one image from its storage.
    """

    rows: list[dict[str, Any]]
    categories: tuple[Category, ...]
    source_read_s: float

    @property
    def image_bytes(self) -> float:
        """Average bytes of an encoded image."""
        return statistics.fmean(len(row["image"]["bytes"]) for row in self.rows)

    def write(self, uri: str, num_rows: int) -> str:
        """Write an images table with this many rows by repeating the samples."""
        with TableWriter(uri, build_schema("images", self.categories), config_hash="-") as writer:
            for number in range(num_rows):
                writer.write_rows([{**self.rows[number % len(self.rows)], "image_id": number}])
        return uri

    def most_rows(self) -> int:
        """Return the maximum number of rows of a table in a temporary folder."""
        return max(1, int(_MOST_TABLE_BYTES / self.image_bytes))


def take_samples(config: PlanConfig, folder: str) -> Samples:
    """Read samples of the config's images, or generate some.

    Args:
        config: Job to plan.
        folder: Folder for generated images.

    Raises:
        UserError: The images do not exist, none can be read, or train cannot use them.
    """
    if config.data is None:
        from raydet.preparation.prepare import prepare_shapes

        shapes = PrepareShapesConfig(
            out=f"{folder}/shapes", num_train=_NUM_GENERATED, num_val=1, image_size=config.generated_size
        )
        prepare_shapes(shapes)
        table = open_table(f"{folder}/shapes/train", "images")
        return Samples(_labelled(table.read().to_pylist()), table.categories, 0.0)
    if not is_table(config.data):
        if config.job == "train":
            raise UserError(f"{config.data} is not an images table; train requires one, see raydet prepare")
        return _read_samples(open_collection(config.data, index_uri=None), config.data, ())
    table = open_table(config.data, "images")
    if config.job == "predict":
        return _read_samples(TableCollection.of(table), config.data, table.categories)
    if not table.categories:
        raise UserError(f"--data {table.uri} has no classes: it was prepared without labels")
    began = time.perf_counter()
    rows = _labelled(row for batch in table.iter_batches(batch_size=32) for row in batch.to_pylist())
    if not rows:
        raise UserError(f"--data {table.uri} stores no image files; prepare it with --image-storage inline")
    return Samples(rows, table.categories, (time.perf_counter() - began) / len(rows))


def _labelled(rows: Any) -> list[dict[str, Any]]:
    names = ("image_id", "image", "width", "height", "objects")
    found: list[dict[str, Any]] = []
    for row in rows:
        if row["image"]["bytes"] is not None:
            found.append({name: row[name] for name in names})
        if len(found) == _MOST_SAMPLES:
            break
    return found


def _read_samples(images: Collection, data: str, categories: tuple[Category, ...]) -> Samples:
    """Read from several positions of the collection, as `predict` does, and measure the time."""
    size = max(1, min(_MOST_SAMPLES, images.num_rows) // _STRETCHES)
    starts = sorted({images.num_rows * number // _STRETCHES for number in range(_STRETCHES)})
    began = time.perf_counter()
    found = [row for start in starts for row in images.read(start, min(start + size, images.num_rows))]
    seconds = time.perf_counter() - began
    empty: dict[str, list[Any]] = {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
    rows = [
        {
            "image_id": row.image_id,
            "image": {"bytes": row.data, "path": row.path},
            "width": (row.size_hw or (0, 0))[1],
            "height": (row.size_hw or (0, 0))[0],
            "objects": empty,
        }
        for row in found
        if row.data is not None
    ]
    if not rows:
        raise UserError(f"none of the sampled images of {data} can be read: {found[0].error}")
    return Samples(rows, categories, seconds / len(found))
