"""The Ray Data stream of a training run: table → encoded images → micro-batches of decoded images, as Arrow.

A single Ray Data execution covers all steps and validations of a run, so that no epoch waits for a pipeline to start.
Each block has one row, which is a complete micro-batch. Ray Data distributes the blocks to the workers in turn and in
order, and each worker checks them against the plan. Pixels stay uint8.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources, TaskPoolStrategy

from raydet.augmentation.view import View
from raydet.cluster.ray_data import TaskSource, one_row_blocks
from raydet.images.decode import DecodeError
from raydet.models.geometry import ResizeRule
from raydet.tables.schema import IMAGE_TYPE, OBJECTS_TYPE
from raydet.tables.table import RowGroup, Table
from raydet.training.ordering import MicroBatch, RunPlan, Segment

_TASKS_WITHOUT_CPUS = 3
"""Concurrent decoding tasks that reserve no CPU; one more than readers, or Ray Data would fuse the two stages."""
READ_COLUMNS = ("image_id", "image", "width", "height", "objects")

_ROW_TYPE = pa.struct(
    [
        ("image_id", pa.int64()),
        ("image", IMAGE_TYPE),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("objects", OBJECTS_TYPE),
    ]
)
# A row of the table with the rows that its image is mixed with.
_ENCODED_TYPE = pa.struct([*_ROW_TYPE, ("mosaic", pa.list_(_ROW_TYPE)), ("mixup", pa.list_(_ROW_TYPE))])
_READY_TYPE = pa.struct(
    [
        ("image_id", pa.int64()),
        ("error", pa.string()),
        ("pixels", pa.large_binary()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("original_height", pa.int64()),
        ("original_width", pa.int64()),
        ("boxes", pa.list_(pa.float32())),
        ("categories", pa.list_(pa.int64())),
        ("objects", OBJECTS_TYPE),
    ]
)
_KEY_FIELDS = [
    ("kind", pa.string()),
    ("epoch", pa.int64()),
    ("step", pa.int64()),
    ("part", pa.int64()),
    ("rank", pa.int64()),
]
_ENCODED_SCHEMA = pa.schema([*_KEY_FIELDS, ("images", pa.list_(_ENCODED_TYPE))])
_READY_SCHEMA = pa.schema([*_KEY_FIELDS, ("resize_rule", pa.string()), ("images", pa.large_list(_READY_TYPE))])


def run_stream(
    plan: RunPlan,
    *,
    train: Table,
    val: Table,
    view: View,
    world_size: int,
    start_epoch: int,
    start_step: int,
    reserved: ExecutionResources,
    cpus_per_task: float,
) -> list[ray.data.DataIterator]:
    """Start the stream of a run and split it among the workers.

    Args:
        plan: Assignment of rows to steps.
        train: Training table.
        val: Validation table.
        view: Augmentation and resize of the images.
        world_size: Number of workers.
        start_epoch: First epoch, from 0.
        start_step: First step within that epoch, from 0.
        reserved: CPUs and GPUs of the training workers, which Ray Data must not use.
        cpus_per_task: CPUs that a decoding task reserves; 0 runs a few tasks beside workers that reserve all CPUs.

    Returns:
        One iterator per rank, to be read with `raydet.training.batches`.
    """
    segments = list(plan.segments(start_epoch=start_epoch, start_step=start_step))
    tables = {"train": train, "validate": val}
    groups = {kind: table.row_groups() for kind, table in tables.items()}
    source = ray.put(_StreamSource(plan, tables, groups, world_size, view))
    with one_row_blocks(reserved=reserved):
        dataset = ray.data.read_datasource(
            TaskSource("RunStream", [partial(_read_segment, source, segment) for segment in segments]),
            # A reader spends most of its time waiting and must not reserve a full CPU.
            num_cpus=min(0.01, cpus_per_task),
            compute=TaskPoolStrategy(size=min(len(segments), 2)),
            override_num_blocks=max(1, len(segments)),
        )
    dataset = dataset.map_batches(
        partial(_prepare_micro_batch, view=view),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=cpus_per_task,
        compute=None if cpus_per_task else TaskPoolStrategy(size=_TASKS_WITHOUT_CPUS),
    )
    iterators: list[ray.data.DataIterator] = dataset.streaming_split(world_size, equal=False)
    return iterators


def key_of(table: pa.Table) -> MicroBatch:
    """Return the micro-batch of a block of the stream, without its rows."""
    return MicroBatch(**{name: table[name][0].as_py() for name, _ in _KEY_FIELDS}, rows=())


@dataclass(frozen=True)
class _StreamSource:
    """Data that all reading tasks of a run share, stored once in the object store."""

    plan: RunPlan
    tables: dict[str, Table]
    groups: dict[str, tuple[RowGroup, ...]]
    world_size: int
    view: View


def _read_segment(source_ref: "ray.ObjectRef[_StreamSource]", segment: Segment) -> Iterator[pa.Table]:
    source: _StreamSource = ray.get(source_ref)
    yield from _encoded(source, segment)


def _encoded(source: _StreamSource, segment: Segment) -> Iterator[pa.Table]:
    """Yield the encoded micro-batches of a segment, reading each row group when it is first needed."""
    plan, rows = source.plan, _TableRows(source.tables[segment.kind], source.groups[segment.kind])
    mixes = segment.kind == "train" and source.view.mixes(segment.epoch)
    for micro_batch in plan.micro_batches(segment, source.world_size):
        if segment.kind == "validate":  # rows are read in order, so earlier row groups are no longer needed
            rows.keep_only_latest()
        mosaics: list[Sequence[int]] = [()] * len(micro_batch.rows)
        mixups = mosaics
        if mixes:
            partners = [plan.partner_rows(segment.epoch, micro_batch.step, row) for row in micro_batch.rows]
            mosaics, mixups = [one.mosaic for one in partners], [one.mixup for one in partners]
        columns = [*rows.take(micro_batch.rows).flatten(), rows.take_lists(mosaics), rows.take_lists(mixups)]
        yield _one_row(micro_batch, pa.StructArray.from_arrays(columns, fields=list(_ENCODED_TYPE)), _ENCODED_SCHEMA)


class _TableRows:
    """The rows of a table by number. Each row group is read when it is first needed."""

    def __init__(self, table: Table, groups: Sequence[RowGroup]) -> None:
        self._table, self._groups = table, groups
        self._first_rows = np.cumsum([0, *(group.num_rows for group in groups)])
        self._loaded: dict[int, pa.StructArray] = {}

    def keep_only_latest(self) -> None:
        """Free the memory of all row groups except the one read last."""
        self._loaded = dict(list(self._loaded.items())[-1:])

    def take(self, numbers: Sequence[int]) -> pa.StructArray:
        """Return the rows with these numbers, in this order, as an array of `_ROW_TYPE`."""
        slices = []
        for row in numbers:
            number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            if number not in self._loaded:
                rows = self._table.read_row_group(self._groups[number], READ_COLUMNS).to_struct_array()
                self._loaded[number] = pa.concat_arrays(rows.chunks).cast(_ROW_TYPE)
            slices.append(self._loaded[number].slice(int(row - self._first_rows[number]), 1))
        return pa.concat_arrays(slices) if slices else pa.array([], _ROW_TYPE)

    def take_lists(self, lists: Sequence[Sequence[int]]) -> pa.ListArray:
        """Return several lists of rows as an array of lists of `_ROW_TYPE`."""
        offsets = np.cumsum([0, *(len(numbers) for numbers in lists)])
        return pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), self.take([number for numbers in lists for number in numbers])
        )


def _one_row(micro_batch: MicroBatch, images: pa.Array, schema: pa.Schema, **more: str) -> pa.Table:
    keys = {name: getattr(micro_batch, name) for name, _ in _KEY_FIELDS} | more
    list_type = schema.field("images").type
    offsets = pa.array([0, len(images)], pa.int64() if pa.types.is_large_list(list_type) else pa.int32())
    array_class = pa.LargeListArray if pa.types.is_large_list(list_type) else pa.ListArray
    nested = array_class.from_arrays(offsets, images.cast(list_type.value_type))
    return pa.table({**{name: [value] for name, value in keys.items()}, "images": nested}, schema=schema)


def _prepare_micro_batch(block: pa.Table, view: View) -> pa.Table:
    """Decode, augment and resize the images of one micro-batch."""
    micro_batch = key_of(block)
    images = block["images"].combine_chunks().values
    rule = view.resize_rule
    if micro_batch.kind == "train":
        rule = view.step_resize_rule(micro_batch.epoch, micro_batch.step)
    ready = [_prepare_image(row.as_py(), micro_batch, view, rule) for row in images]
    content = json.dumps(rule.to_dict())
    return _one_row(micro_batch, pa.array(ready, _READY_TYPE), _READY_SCHEMA, resize_rule=content)


def _prepare_image(row: dict[str, Any], micro_batch: MicroBatch, view: View, rule: ResizeRule) -> dict[str, Any]:
    validating = micro_batch.kind == "validate"
    record: dict[str, Any] = {"image_id": row["image_id"], "objects": row["objects"] if validating else None}
    try:
        seen = view.plain(row) if validating else view.augmented(row, epoch=micro_batch.epoch, resize_rule=rule)
    except DecodeError as error:
        unread: dict[str, Any] = {"pixels": None, "height": 0, "width": 0, "boxes": [], "categories": []}
        return {
            **record,
            **unread,
            "error": str(error),
            "original_height": row["height"],
            "original_width": row["width"],
        }
    return {
        **record,
        "error": None,
        "pixels": seen.image.tobytes(),
        "height": seen.image.shape[0],
        "width": seen.image.shape[1],
        "original_height": seen.original_size_hw[0],
        "original_width": seen.original_size_hw[1],
        "boxes": seen.boxes_cxcywh.reshape(-1),
        "categories": seen.categories,
    }
