"""Chunks of images: encoded, from readers to decoders, and decoded, from decoders to training workers.

A chunk holds consecutive micro-batches of one rank. It is a block of one row with few columns, since Ray serializes
every array of a block in Python: a header as JSON, the rows of the images as an Arrow stream, and the pixels in one
buffer, batched in the layout that the model takes. This module does not import torch.
"""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.augmentation.view import View
from raydet.images.decode import DecodeError
from raydet.models.geometry import Image, PixelBuffer, ResizeRule, SizeHW, fill_padded
from raydet.tables.columns import bytes_of
from raydet.tables.schema import IMAGE_TYPE, LABELLED_COLUMN, OBJECTS_TYPE, OPTIONAL_FIELDS
from raydet.training.feeding.ordering import MicroBatch

if TYPE_CHECKING:
    from raydet.augmentation.taught import Taught

TEACHER = "teacher"
"""Key of `raydet.augmentation.taught.TEACHER`, whose module imports OpenCV."""
_LABELLED_TYPE = OPTIONAL_FIELDS["images"][LABELLED_COLUMN]
TEACHER_TYPE = pa.struct(
    [
        ("bbox", pa.list_(pa.list_(pa.float64(), 4))),
        # The vectors of all boxes, one after another; 0 for a class that the teacher does not know.
        ("class_scores", pa.list_(pa.float16())),
        # Number of the teacher that found each box.
        ("owner", pa.list_(pa.int64())),
        # Of each teacher; 0 if it has not scored the image.
        ("weights", pa.list_(pa.float32())),
        # The classes that each teacher knows, one teacher after another.
        ("known", pa.list_(pa.bool_())),
    ]
)
"""Findings of teachers in an image."""
ROW_TYPE = pa.struct(
    [
        ("image_id", pa.int64()),
        ("image", IMAGE_TYPE),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("objects", OBJECTS_TYPE),
        (LABELLED_COLUMN, _LABELLED_TYPE),
        (TEACHER, TEACHER_TYPE),
    ]
)
# A row of the table, how often the epoch has it besides, and the rows that its image is mixed with.
ENCODED_TYPE = pa.struct(
    [*ROW_TYPE, ("repetition", pa.int64()), ("mosaic", pa.list_(ROW_TYPE)), ("mixup", pa.list_(ROW_TYPE))]
)
TAUGHT_TYPE = pa.struct(
    [
        ("boxes_cxcywh", pa.list_(pa.float32())),
        ("class_scores", pa.list_(pa.float16())),
        ("owners", pa.list_(pa.int64())),
        ("weights", pa.list_(pa.float32())),
        ("known", pa.list_(pa.bool_())),
    ]
)
_SIZE_TYPE = pa.list_(pa.int64(), 2)
_DECODED_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("error", pa.string()),
        ("size_hw", _SIZE_TYPE),
        ("original_size_hw", _SIZE_TYPE),
        ("boxes_cxcywh", pa.list_(pa.float32())),
        ("categories", pa.list_(pa.int64())),
        # As in the table; in training without the classes that a partner of the image is not labelled for.
        (LABELLED_COLUMN, _LABELLED_TYPE),
        # As `raydet.augmentation.taught.Taught`, with boxes and vectors one after another; null without a teacher.
        ("taught", TAUGHT_TYPE),
        # As in the table; null in training.
        ("objects", OBJECTS_TYPE),
    ]
)


def encoded_chunk(micro_batches: Sequence[MicroBatch], images: pa.StructArray) -> pa.Table:
    """Pack the encoded images of a chunk.

    Args:
        micro_batches: Consecutive micro-batches of one rank.
        images: Array of `ENCODED_TYPE` of all their images.

    Returns:
        A table of one row, for `decode_chunk`.
    """
    first = micro_batches[0]
    header = {
        "kind": first.kind,
        "epoch": first.epoch,
        "rank": first.rank,
        "step": [one.step for one in micro_batches],
        "part": [one.part for one in micro_batches],
        "num_images": [len(one.rows) for one in micro_batches],
    }
    return _block(header, pa.RecordBatch.from_struct_array(images))


def decode_chunk(chunk: pa.Table, view: View, buffer: PixelBuffer | None = None) -> pa.Table:
    """Decode, augment and resize the images of a chunk, as the epoch and the step of each micro-batch require.

    Args:
        chunk: Result of `encoded_chunk`.
        view: Augmentation and resize of the images.
        buffer: Memory of the pixels; the result is valid until its next use. By default, new memory is allocated.

    Returns:
        A table of one row, for `raydet.training.feeding.batches.ready_batches`: the header with two more entries for
        each micro-batch, `resize_rule` and `shape` (number of readable images, height and width of the padded batch);
        the images; and `pixels`, uint8 [B, 3, H, W] of each micro-batch, one after another.
    """
    buffer = buffer or PixelBuffer()
    buffer.clear()
    header, images = header_of(chunk), images_of(chunk)
    validates = header["kind"] == "validate"
    rows = _rows_of(images.to_struct_array())
    header |= {"resize_rule": [], "shape": []}
    columns: dict[str, list[Any]] = {name: [] for name in _DECODED_SCHEMA.names}
    for micro_batch, num_images in micro_batches_of(header):
        epoch = micro_batch.epoch
        rule = view.resize_rule if validates else view.step_resize_rule(epoch, micro_batch.step)
        batch = _BatchBuffer(rule, buffer)
        for _ in range(num_images):
            row = next(rows)
            try:
                seen = view.plain(row) if validates else view.augmented(row, epoch=epoch, resize_rule=rule)
            except DecodeError as error:
                columns["error"].append(str(error))
                columns["size_hw"] += (0, 0)
                columns["original_size_hw"] += (row["height"], row["width"])
                columns["boxes_cxcywh"].append(())
                columns["categories"].append(())
                columns[LABELLED_COLUMN].append(None)
                columns["taught"].append(None)
                continue
            batch.append(seen.planes)
            columns["error"].append(None)
            columns["size_hw"] += seen.planes.shape[1:]
            columns["original_size_hw"] += seen.original_size_hw
            columns["boxes_cxcywh"].append(seen.boxes_cxcywh.reshape(-1))
            columns["categories"].append(seen.categories)
            columns[LABELLED_COLUMN].append(seen.labelled)
            columns["taught"].append(seen.taught)
        header["resize_rule"].append(rule.to_dict())
        header["shape"].append(batch.finish())
    arrays: dict[str, pa.Array] = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(columns[name], pa.int64()), 2)
        for name in ("size_hw", "original_size_hw")
    }
    arrays |= {name: _lists(columns[name], _DECODED_SCHEMA.field(name).type) for name in ("boxes_cxcywh", "categories")}
    arrays |= {"image_id": images["image_id"], "error": pa.array(columns["error"], pa.string())}
    arrays[LABELLED_COLUMN] = (
        images[LABELLED_COLUMN] if validates else pa.array(columns[LABELLED_COLUMN], _LABELLED_TYPE)
    )
    arrays["taught"] = _taught(columns["taught"])
    arrays["objects"] = images["objects"] if validates else pa.nulls(len(images), OBJECTS_TYPE)
    decoded = pa.RecordBatch.from_arrays([arrays[name] for name in _DECODED_SCHEMA.names], schema=_DECODED_SCHEMA)
    return _block(header, decoded).append_column("pixels", _one_binary(pa.py_buffer(buffer.content)))


def _lists(values: Sequence[Any], type_: pa.ListType) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(one) for one in values)], dtype=np.int32)
    joined = np.concatenate([np.zeros(0, type_.value_type.to_pandas_dtype()), *(one for one in values if len(one))])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(joined, type_.value_type))


def _taught(images: "Sequence[Taught | None]") -> pa.StructArray:
    if all(one is None for one in images):
        return pa.nulls(len(images), TAUGHT_TYPE)
    lists = [
        _lists([() if one is None else getattr(one, field.name).reshape(-1) for one in images], field.type)
        for field in TAUGHT_TYPE
    ]
    return pa.StructArray.from_arrays(lists, fields=list(TAUGHT_TYPE), mask=pa.array([one is None for one in images]))


class _BatchBuffer:
    """The images of a micro-batch as one array [B, 3, H, W], padded with zeros at the bottom and on the right.

    Where the size of the batch does not depend on its images, each is copied at once, while it is still in the cache.
    """

    def __init__(self, rule: ResizeRule, buffer: PixelBuffer) -> None:
        self._rule, self._buffer, self._num_images = rule, buffer, 0
        self._size_hw = rule.pad_to_hw or rule.size_hw
        self._waiting: list[Image] = []

    def append(self, planes: Image) -> None:
        """Add an image, uint8 [3, h, w]."""
        self._num_images += 1
        self._waiting.append(planes)
        if self._size_hw:
            self._write(self._size_hw)

    def finish(self) -> tuple[int, int, int]:
        """Write what is left; return the number of images, and height and width of the batch."""
        # A rank without images runs a black one, whose size does not matter.
        sizes_hw = [planes.shape[1:] for planes in self._waiting] or [self._rule.target_size_hw((64, 64))]
        height, width = self._size_hw or (max(sides) for sides in zip(*sizes_hw, strict=True))
        self._write((height, width))
        return self._num_images, height, width

    def _write(self, size_hw: SizeHW) -> None:
        fill_padded(self._buffer.append((len(self._waiting), 3, *size_hw)), self._waiting)
        self._waiting.clear()


def _block(header: dict[str, Any], images: pa.RecordBatch) -> pa.Table:
    return pa.table({"header": [json.dumps(header)], "images": _one_binary(_stream_of(images))})


def _stream_of(batch: pa.RecordBatch) -> pa.Buffer:
    """Return an Arrow stream of one batch, in memory of exactly its size: a growing buffer would be copied again."""
    mock = pa.MockOutputStream()
    _write_stream(batch, mock)
    content = pa.allocate_buffer(mock.size())
    _write_stream(batch, pa.FixedSizeBufferWriter(content))
    return content


def _write_stream(batch: pa.RecordBatch, sink: pa.NativeFile) -> None:
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _one_binary(content: pa.Buffer) -> pa.LargeBinaryArray:
    offsets = pa.py_buffer(np.array([0, content.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, content])


def header_of(chunk: pa.Table) -> dict[str, Any]:
    """Return the header of a chunk: its kind, epoch and rank, and lists with an entry for each micro-batch."""
    header: dict[str, Any] = json.loads(chunk["header"][0].as_py())
    return header


def micro_batches_of(header: dict[str, Any]) -> Iterator[tuple[MicroBatch, int]]:
    """Yield each micro-batch of a chunk, without its rows, and its number of images."""
    for step, part, num_images in zip(header["step"], header["part"], header["num_images"], strict=True):
        yield MicroBatch(header["kind"], header["epoch"], step, part, header["rank"], ()), num_images


def images_of(chunk: pa.Table) -> pa.RecordBatch:
    """Return one row for each image of a chunk, without a copy."""
    with pa.ipc.open_stream(_content_of(chunk["images"])) as reader:
        return reader.read_next_batch()


def pixels_of(chunk: pa.Table) -> npt.NDArray[np.uint8]:
    """Return the bytes of all pixels of a decoded chunk, read-only, without a copy."""
    return np.frombuffer(_content_of(chunk["pixels"]), np.uint8)


def _content_of(column: pa.ChunkedArray) -> pa.Buffer:
    assert len(column) == 1, f"a block of the stream holds one chunk, got {len(column)}"
    (array,) = column.chunks
    _, offsets, data = array.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[array.offset : array.offset + 2].tolist()
    return data.slice(start, stop - start)


def _rows_of(images: pa.StructArray) -> Iterator[dict[str, Any]]:
    """Yield rows of an images table whose numbers are views of Arrow's memory.

    Args:
        images: Array of `ROW_TYPE` or `ENCODED_TYPE`.
    """
    if not len(images):
        return
    numbers = [name for name in ("image_id", "height", "width", "repetition") if name in images.type.names]
    sizes = {name: images.field(name).to_numpy().tolist() for name in numbers}
    contents = images.field("image").field("bytes")
    paths = images.field("image").field("path").to_pylist()
    is_null = contents.is_null().to_pylist()
    data, starts = bytes_of(contents)
    objects = images.field("objects")
    lists = {name: objects.field(name) for name in ("id", "bbox", "category", "area", "iscrowd")}
    offsets = {name: values.offsets.to_pylist() for name, values in lists.items()}
    flat = {name: one.values.to_numpy(zero_copy_only=False) for name, one in lists.items() if name != "bbox"}
    flat["bbox"] = lists["bbox"].values.flatten().to_numpy().reshape(-1, 4)
    labelled = images.field(LABELLED_COLUMN)
    teachers = _teachers_of(images.field(TEACHER))
    partners = {name: images.field(name) for name in ("mosaic", "mixup") if name in images.type.names}
    for at, path in enumerate(paths):
        content = None if is_null[at] else bytes(data[starts[at] : starts[at + 1]])
        row = {name: values[at] for name, values in sizes.items()}
        row["image"] = {"bytes": content, "path": path}
        row["objects"] = {name: flat[name][offsets[name][at] : offsets[name][at + 1]] for name in flat}
        if labelled.null_count < len(labelled):
            row[LABELLED_COLUMN] = labelled[at].as_py()
        if teachers is not None and teachers[at] is not None:
            row[TEACHER] = teachers[at]
        for name, one in partners.items():
            row[name] = list(_rows_of(one[at].values)) if len(one[at].values) else []
        yield row


def _teachers_of(array: pa.StructArray) -> list[dict[str, npt.NDArray[Any]] | None] | None:
    """Return the fields of each image's `TEACHER_TYPE` as arrays; None for no teacher."""
    if array.null_count == len(array):
        return None
    lists = {field.name: array.field(field.name) for field in TEACHER_TYPE}
    offsets = {name: one.offsets.to_pylist() for name, one in lists.items()}
    flat = {name: one.values for name, one in lists.items()}
    values = {
        name: (one.flatten() if name == "bbox" else one).to_numpy(zero_copy_only=False) for name, one in flat.items()
    }
    values["bbox"] = values["bbox"].reshape(-1, 4)
    return [
        {name: values[name][offsets[name][at] : offsets[name][at + 1]] for name in values} if is_valid else None
        for at, is_valid in enumerate(array.is_valid().to_pylist())
    ]
