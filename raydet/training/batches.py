"""Blocks of a run's stream, as a worker reads them → batches that are ready for the model."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from raydet.common.boxes import as_boxes
from raydet.measuring.numbers.accumulator import ImageTruth
from raydet.models.collate import Example
from raydet.models.geometry import ResizeRule
from raydet.training.ordering import Kind, MicroBatch
from raydet.training.stream import key_of


@dataclass(frozen=True)
class ReadyBatch:
    """One micro-batch as a worker receives it, ready for the model.

    Attributes:
        micro_batch: Position in the plan; its `rows` are empty.
        resize_rule: Resize rule of all images in the batch.
        examples: Images that could be read.
        unreadable: Reason why an image could not be read, by image id.
        truths: In validation, the annotations of every image from the table, by image id in the order of the rows;
            empty in training.
    """

    micro_batch: MicroBatch
    resize_rule: ResizeRule
    examples: list[Example]
    unreadable: dict[int, str]
    truths: dict[int, ImageTruth]

    @property
    def num_images(self) -> int:
        """Number of images, including those that could not be read."""
        return len(self.examples) + len(self.unreadable)

    @property
    def image_ids(self) -> list[int]:
        """Ids of all images; those that could not be read come last."""
        return [*(example.image_id for example in self.examples), *self.unreadable]


class BatchReader:
    """One rank's part of a run's stream, checked against the plan.

    Attributes:
        has_begun: True once the first batch has arrived.
    """

    def __init__(self, iterator: ray.data.DataIterator, rank: int) -> None:
        self._blocks, self._rank = ready_batches(iterator), rank
        self.has_begun = False

    def take(self, kind: Kind, epoch: int, step: int, part: int) -> ReadyBatch:
        """Wait for this micro-batch, which must be the next one; its arrays are valid until the next call."""
        batch = next(self._blocks)
        expected = MicroBatch(kind, epoch, step, part, self._rank, ())
        assert batch.micro_batch == expected, f"the stream is out of step: got {batch.micro_batch}, not {expected}"
        self.has_begun = True
        return batch


def ready_batches(iterator: ray.data.DataIterator) -> Iterator[ReadyBatch]:
    """Yield the batches of one rank's part of a run's stream.

    The image arrays are read-only views into the object store; they are valid until the next batch is requested.
    """
    blocks: Iterable[pa.Table] = iterator.iter_batches(
        batch_size=None,  # type: ignore[arg-type]
        batch_format="pyarrow",
        prefetch_batches=2,
    )
    for table in blocks:
        yield ready_batch(table)


def ready_batch(table: pa.Table) -> ReadyBatch:
    """Convert a block of the stream to a batch without copying its pixels."""
    assert table.num_rows == 1, f"a block of the stream holds one micro-batch, got {table.num_rows}"
    batch = ReadyBatch(key_of(table), _rule_of(table["resize_rule"][0].as_py()), [], {}, {})
    for image in table["images"].combine_chunks().values:
        image_id, error, objects = (image[name].as_py() for name in ("image_id", "error", "objects"))
        if error is None:
            batch.examples.append(_unpack(image))
        else:
            batch.unreadable[image_id] = error
        if objects is not None:
            batch.truths[image_id] = _truth(objects)
    return batch


@lru_cache(maxsize=16)
def _rule_of(content: str) -> ResizeRule:
    return ResizeRule.from_dict(json.loads(content))


def _unpack(scalar: pa.StructScalar) -> Example:
    height, width = scalar["height"].as_py(), scalar["width"].as_py()
    return Example(
        image_id=scalar["image_id"].as_py(),
        image=np.frombuffer(scalar["pixels"].as_buffer(), np.uint8).reshape(height, width, 3),
        original_size_hw=(scalar["original_height"].as_py(), scalar["original_width"].as_py()),
        boxes=np.asarray(scalar["boxes"].as_py(), np.float32).reshape(-1, 4),
        categories=np.asarray(scalar["categories"].as_py(), np.int64),
    )


def _truth(objects: dict[str, Any]) -> ImageTruth:
    return ImageTruth(
        as_boxes(objects["bbox"]),
        np.asarray(objects["category"], np.int64),
        np.asarray(objects["area"], np.float64),
        np.asarray(objects["iscrowd"], bool),
    )
