"""Chunks of decoded images, as they travel from the decoders to the training workers ↔ batches for the model.

A chunk holds consecutive micro-batches of one rank. Its pixels lie in a single buffer, batched in the layout that the
model takes, so that a worker gets them without a copy. This module does not import torch until a worker unpacks.
"""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.augmentation.view import SeenImage, View
from raydet.common.boxes import as_boxes
from raydet.images.decode import DecodeError
from raydet.measuring.numbers.accumulator import ImageTruth
from raydet.models.geometry import ResizeRule, SizeHW, fill_padded
from raydet.tables.schema import IMAGE_TYPE, OBJECTS_TYPE
from raydet.training.feeding.ordering import Kind, MicroBatch

if TYPE_CHECKING:
    from raydet.models.collate import Batch, Example

ROW_TYPE = pa.struct(
    [
        ("image_id", pa.int64()),
        ("image", IMAGE_TYPE),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("objects", OBJECTS_TYPE),
    ]
)
# A row of the table with the rows that its image is mixed with.
ENCODED_TYPE = pa.struct([*ROW_TYPE, ("mosaic", pa.list_(ROW_TYPE)), ("mixup", pa.list_(ROW_TYPE))])
_INTS = pa.list_(pa.int64())
_KEY_FIELDS = [
    ("kind", pa.string()),
    ("epoch", pa.int64()),
    ("rank", pa.int64()),
    # One value for each micro-batch.
    ("step", _INTS),
    ("part", _INTS),
    ("num_images", _INTS),
]
_ENCODED_SCHEMA = pa.schema([*_KEY_FIELDS, ("images", pa.list_(ENCODED_TYPE))])
_DECODED_SCHEMA = pa.schema(
    [
        *_KEY_FIELDS,
        ("resize_rule", pa.list_(pa.string())),
        # Number of readable images, and height and width of the padded batch, of each micro-batch.
        ("batch_shape", _INTS),
        # [B, 3, H, W] of each micro-batch, one after another.
        ("pixels", pa.large_binary()),
        # One value for each image; sizes have two.
        ("image_id", _INTS),
        ("error", pa.list_(pa.string())),
        ("size_hw", _INTS),
        ("original_size_hw", _INTS),
        ("num_boxes", _INTS),
        ("boxes_cxcywh", pa.list_(pa.float32())),
        ("categories", _INTS),
        ("objects", pa.list_(OBJECTS_TYPE)),
    ]
)


@dataclass(frozen=True)
class ReadyBatch:
    """One micro-batch as a worker receives it, ready for the model.

    Attributes:
        micro_batch: Position in the plan; its `rows` are empty.
        resize_rule: Resize rule of all images in the batch.
        batch: Images that could be read, with their targets; possibly none.
        unreadable: Reasons why images could not be read, by image id.
        truths: In validation, the annotations of every image from the table, by image id in the order of the rows;
            empty in training.
    """

    micro_batch: MicroBatch
    resize_rule: ResizeRule
    batch: "Batch"
    unreadable: dict[int, str]
    truths: dict[int, ImageTruth]

    @property
    def num_images(self) -> int:
        """Number of images, including those that could not be read."""
        return len(self.batch) + len(self.unreadable)

    @property
    def image_ids(self) -> list[int]:
        """Ids of all images; those that could not be read come last."""
        return [*self.batch.image_ids, *self.unreadable]

    @property
    def examples(self) -> "list[Example]":
        """The readable images one by one; their pixels are views into the batch."""
        from raydet.models.collate import Example

        pixels, batch = self.batch.pixels.numpy(), self.batch
        return [
            Example(
                image_id,
                pixels[place, :, :height, :width].transpose(1, 2, 0),
                original_size_hw,
                label["boxes"].numpy(),
                label["class_labels"].numpy(),
            )
            for place, (image_id, (height, width), original_size_hw, label) in enumerate(
                zip(batch.image_ids, batch.sizes_hw, batch.original_sizes_hw, batch.labels, strict=True)
            )
        ]


class BatchReader:
    """One rank's part of a run's stream, checked against the plan.

    Attributes:
        has_begun: True once the first batch has arrived.
    """

    def __init__(self, batches: Iterator[ReadyBatch], rank: int) -> None:
        self._batches, self._rank = batches, rank
        self.has_begun = False

    def take(self, kind: Kind, epoch: int, step: int, part: int) -> ReadyBatch:
        """Wait for this micro-batch, which must be the next one."""
        batch = next(self._batches)
        expected = MicroBatch(kind, epoch, step, part, self._rank, ())
        assert batch.micro_batch == expected, f"the stream is out of step: got {batch.micro_batch}, not {expected}"
        self.has_begun = True
        return batch


def encoded_chunk(micro_batches: Sequence[MicroBatch], images: Sequence[pa.Array]) -> pa.Table:
    """Pack the encoded images of a chunk.

    Args:
        micro_batches: Consecutive micro-batches of one rank.
        images: Arrays of all their images: the fields of `ROW_TYPE`, then lists of mosaic and of mixup partners.

    Returns:
        A table of one row, for `decode_chunk`.
    """
    rows = pa.StructArray.from_arrays(list(images), fields=list(ENCODED_TYPE))
    nested = pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)
    return pa.table({**_keys(micro_batches), "images": nested}, schema=_ENCODED_SCHEMA)


def _keys(micro_batches: Sequence[MicroBatch]) -> dict[str, Any]:
    first = micro_batches[0]
    return {
        "kind": [first.kind],
        "epoch": [first.epoch],
        "rank": [first.rank],
        "step": [[one.step for one in micro_batches]],
        "part": [[one.part for one in micro_batches]],
        "num_images": [[len(one.rows) for one in micro_batches]],
    }


class PixelBuffer:
    """Memory for the pixels of one chunk, reused for the next: fresh pages cost more than the copy itself."""

    def __init__(self) -> None:
        self._memory, self._size = np.empty(0, np.uint8), 0

    def clear(self) -> None:
        """Start the next chunk; the arrays of the last one become invalid."""
        self._size = 0

    def append(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Return the next bytes as an uninitialised array of this shape; valid until the next call."""
        start, self._size = self._size, self._size + math.prod(shape)
        if self._size > len(self._memory):
            grown = np.empty(max(self._size, 2 * len(self._memory)), np.uint8)
            grown[:start] = self._memory[:start]
            self._memory = grown
        return self._memory[start : self._size].reshape(shape)

    @property
    def content(self) -> npt.NDArray[np.uint8]:
        """All bytes since the last `clear`."""
        return self._memory[: self._size]


def decode_chunk(chunk: pa.Table, view: View, buffer: PixelBuffer | None = None) -> pa.Table:
    """Decode, augment and resize the images of a chunk, as the epoch and the step of each micro-batch require.

    Args:
        chunk: Result of `encoded_chunk`.
        view: Augmentation and resize of the images.
        buffer: Memory of the pixels; the result is valid until its next use. By default new memory.

    Returns:
        A table of one row, for `ready_batches`.
    """
    buffer = buffer or PixelBuffer()
    columns: dict[str, list[Any]] = {name: [] for name in _DECODED_SCHEMA.names}
    buffer.clear()
    images = chunk["images"][0].values
    objects = images.field("objects")
    rows = rows_of(images)
    validates = chunk["kind"][0].as_py() == "validate"
    for micro_batch, num_images in _micro_batches(chunk):
        epoch = micro_batch.epoch
        rule = view.resize_rule if validates else view.step_resize_rule(epoch, micro_batch.step)
        readable: list[SeenImage] = []
        for _ in range(num_images):
            row = next(rows)
            columns["image_id"].append(row["image_id"])
            try:
                seen = view.plain(row) if validates else view.augmented(row, epoch=epoch, resize_rule=rule)
            except DecodeError as error:
                columns["error"].append(str(error))
                columns["size_hw"] += (0, 0)
                columns["original_size_hw"] += (row["height"], row["width"])
                columns["num_boxes"].append(0)
                continue
            readable.append(seen)
            columns["error"].append(None)
            columns["size_hw"] += seen.planes.shape[1:]
            columns["original_size_hw"] += seen.original_size_hw
            columns["num_boxes"].append(len(seen.categories))
            columns["boxes_cxcywh"].append(seen.boxes_cxcywh.reshape(-1))
            columns["categories"].append(seen.categories)
        columns["batch_shape"] += _append(readable, rule, buffer)
        columns["resize_rule"].append(json.dumps(rule.to_dict()))
    pixels = buffer.content
    columns["boxes_cxcywh"] = _joined(columns["boxes_cxcywh"], np.float32)
    columns["categories"] = _joined(columns["categories"], np.int64)
    arrays = {
        name: pa.array([columns[name]], _DECODED_SCHEMA.field(name).type)
        for name in _DECODED_SCHEMA.names
        if name not in chunk.column_names and name not in ("pixels", "objects")
    }
    arrays |= {name: chunk[name] for name, _ in _KEY_FIELDS}
    arrays["pixels"] = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, pixels.size], np.int64)), pa.py_buffer(pixels)]
    )
    objects = objects if validates else objects.slice(0, 0)
    arrays["objects"] = pa.ListArray.from_arrays(pa.array([0, len(objects)], pa.int32()), objects)
    return pa.table([arrays[name] for name in _DECODED_SCHEMA.names], schema=_DECODED_SCHEMA)


def _joined(arrays: list[Any], dtype: Any) -> Any:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _append(images: Sequence[SeenImage], rule: ResizeRule, buffer: PixelBuffer) -> tuple[int, int, int]:
    """Append images to a buffer as one array [B, 3, H, W], padded with zeros at the bottom and on the right.

    Returns:
        B, H and W.
    """
    sizes_hw: list[SizeHW] = [(image.planes.shape[1], image.planes.shape[2]) for image in images]
    # A rank without images runs a black one, whose size does not matter.
    largest_hw = [max(sides) for sides in zip(*(sizes_hw or [rule.target_size_hw((64, 64))]), strict=True)]
    height, width = rule.pad_to_hw or largest_hw
    fill_padded(buffer.append((len(images), 3, height, width)), [image.planes for image in images])
    return len(images), height, width


def _micro_batches(chunk: pa.Table) -> Iterator[tuple[MicroBatch, int]]:
    kind, epoch, rank = (chunk[name][0].as_py() for name in ("kind", "epoch", "rank"))
    for step, part, num_images in zip(
        *(chunk[name][0].as_py() for name in ("step", "part", "num_images")), strict=True
    ):
        yield MicroBatch(kind, epoch, step, part, rank, ()), num_images


def rows_of(images: pa.StructArray) -> Iterator[dict[str, Any]]:
    """Yield rows of an images table whose numbers are views of Arrow's memory.

    Args:
        images: Array of `ROW_TYPE`, optionally with the lists `mosaic` and `mixup` of the same type.
    """
    if not len(images):
        return
    ids, heights, widths = (images.field(name).to_numpy() for name in ("image_id", "height", "width"))
    contents, paths = images.field("image").field("bytes"), images.field("image").field("path")
    is_null = contents.is_null().to_numpy(zero_copy_only=False)
    data, starts = _bytes_of(contents)
    objects = images.field("objects")
    lists = {name: objects.field(name) for name in ("id", "bbox", "category", "area", "iscrowd")}
    offsets = {name: values.offsets.to_numpy() for name, values in lists.items()}
    values = {name: one.values for name, one in lists.items() if name != "bbox"}
    flat = {name: one.to_numpy(zero_copy_only=False) for name, one in values.items()}
    flat["bbox"] = lists["bbox"].values.flatten().to_numpy().reshape(-1, 4)
    partner_names = [name for name in ("mosaic", "mixup") if name in images.type.names]
    partners = {name: images.field(name) for name in partner_names}
    for at in range(len(images)):
        row = {
            "image_id": int(ids[at]),
            "height": int(heights[at]),
            "width": int(widths[at]),
            "image": {
                "bytes": None if is_null[at] else bytes(data[starts[at] : starts[at + 1]]),
                "path": paths[at].as_py(),
            },
            "objects": {name: flat[name][offsets[name][at] : offsets[name][at + 1]] for name in flat},
        }
        for name, one in partners.items():
            row[name] = list(rows_of(one[at].values)) if len(one[at].values) else []
        yield row


def _bytes_of(values: pa.BinaryArray | pa.LargeBinaryArray) -> tuple[memoryview, list[int]]:
    """Return the bytes of all values without a copy, and the offsets at which each starts and the last one ends.

    Arrow's own access to a value copies it.
    """
    _, offsets, data = values.buffers()
    dtype = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    starts = np.frombuffer(offsets, dtype)[values.offset : values.offset + len(values) + 1]
    return memoryview(data or b""), starts.tolist()


def ready_batches(chunk: pa.Table) -> Iterator[ReadyBatch]:
    """Yield the micro-batches of a decoded chunk without copying their pixels, which are read-only."""
    import torch

    from raydet.models.collate import Batch

    assert chunk.num_rows == 1, f"a block of the stream holds one chunk, got {chunk.num_rows}"
    numbers = {
        name: chunk[name][0].values.to_numpy()
        for name in (
            "batch_shape",
            "image_id",
            "size_hw",
            "original_size_hw",
            "num_boxes",
            "boxes_cxcywh",
            "categories",
        )
    }
    errors, rules, objects = (chunk[name][0].values for name in ("error", "resize_rule", "objects"))
    errors, rules = errors.to_pylist(), rules.to_pylist()
    data, (start, stop) = _bytes_of(chunk["pixels"].chunk(0))
    pixels = np.frombuffer(data[start:stop], np.uint8)
    sizes_hw, originals_hw = (numbers[name].reshape(-1, 2).tolist() for name in ("size_hw", "original_size_hw"))
    ends = np.cumsum([0, *numbers["num_boxes"]])
    boxes, categories = numbers["boxes_cxcywh"].reshape(-1, 4), numbers["categories"]
    shapes = numbers["batch_shape"].reshape(-1, 3)
    first = start = 0
    for (micro_batch, num_images), rule, (num_readable, height, width) in zip(
        _micro_batches(chunk), rules, shapes.tolist(), strict=True
    ):
        places = range(first, first + num_images)
        first += num_images
        size = num_readable * 3 * height * width
        canvas = pixels[start : start + size].reshape(num_readable, 3, height, width)
        start += size
        readable = [place for place in places if errors[place] is None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the pixels are read-only, and nobody writes them
            tensor = torch.from_numpy(canvas)
        batch = Batch(
            [int(numbers["image_id"][place]) for place in readable],
            tensor,
            [(sizes_hw[place][0], sizes_hw[place][1]) for place in readable],
            [(originals_hw[place][0], originals_hw[place][1]) for place in readable],
            [
                {
                    "class_labels": torch.tensor(categories[ends[place] : ends[place + 1]]),
                    "boxes": torch.tensor(boxes[ends[place] : ends[place + 1]]),
                }
                for place in readable
            ],
        )
        unreadable = {int(numbers["image_id"][place]): errors[place] for place in places if errors[place] is not None}
        truths = {}
        if micro_batch.kind == "validate":
            truths = {int(numbers["image_id"][place]): _truth(objects[place].as_py()) for place in places}
        yield ReadyBatch(micro_batch, _rule_of(rule), batch, unreadable, truths)


@lru_cache(maxsize=16)
def _rule_of(content: str) -> ResizeRule:
    return ResizeRule.from_dict(json.loads(content))


def _truth(objects: dict[str, Any]) -> ImageTruth:
    return ImageTruth(
        as_boxes(objects["bbox"]),
        np.asarray(objects["category"], np.int64),
        np.asarray(objects["area"], np.float64),
        np.asarray(objects["iscrowd"], bool),
    )
