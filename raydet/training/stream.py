"""Ray Data pipelines: the stream of a training run, and the decoding of a table to be scored.

Both go table → encoded images → decoded images, and hand on plain Arrow. Pixels stay uint8.

The stream of a run is one Ray Data execution from its first step to its last, validations included, so that no
epoch waits for a pipeline to start. Every block of it holds one row, a whole micro-batch; Ray Data deals the blocks
out to the workers in turn and in order, and each worker checks that it got what the plan says.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, Datasource, ExecutionOptions, ExecutionResources, ReadTask, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata

from raydet.common.boxes import xywh_to_normalised_cxcywh
from raydet.images.decode import DecodeError, decode
from raydet.images.references import image_bytes
from raydet.models.geometry import ResizeRule, resize
from raydet.tables.schema import IMAGE_TYPE, OBJECTS_TYPE
from raydet.tables.table import RowGroup, Table
from raydet.training.ordering import MicroBatch, RunPlan, Segment, augmentation_seed, scale_choice

if TYPE_CHECKING:
    from raydet.augmentation.mixing import Sample
    from raydet.config import AugmentationSpec

SCHEDULING_PAUSE_S = 0.03
"""Short beside the decoding of a batch, long beside a turn of Ray Data's scheduling loop (2–3 ms)."""
_TASKS_WITHOUT_CPUS = 3
"""Decoding tasks at once that reserve nothing; one more than readers, with which Ray Data would make them one stage."""
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
# A row of the table with the rows that it is mixed with.
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
        ("labels", pa.list_(pa.int64())),
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


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What happens to an image between the table and the model.

    Attributes:
        augmentation: A preset's name, or a pipeline of albumentations.
        plain_from_epoch: From this epoch on, counted from 0, there is no augmentation but flips, and one size.
        resize_rule: The model's own resize.
        max_pixels: Larger pictures are unreadable.
        seed: Of the augmentation and of the choice among `resize_rules`.
        resize_rules: Each training step before `plain_from_epoch` draws one of these; none means `resize_rule`.
    """

    augmentation: "AugmentationSpec"
    plain_from_epoch: int
    resize_rule: ResizeRule
    max_pixels: int
    seed: int
    resize_rules: tuple[ResizeRule, ...] = ()

    def mixes(self, kind: str, epoch: int) -> bool:
        """Whether images need their partners."""
        return kind == "train" and self.augmentation == "strong" and epoch < self.plain_from_epoch

    def rule_of(self, micro_batch: MicroBatch) -> ResizeRule:
        """How the images of a step are resized, on all ranks alike."""
        if micro_batch.kind != "train" or micro_batch.epoch >= self.plain_from_epoch or not self.resize_rules:
            return self.resize_rule
        return self.resize_rules[scale_choice(self.seed, micro_batch.epoch, micro_batch.step, len(self.resize_rules))]


def run_stream(
    plan: RunPlan,
    *,
    train: Table,
    val: Table,
    preparation: Preparation,
    world_size: int,
    start_epoch: int,
    start_step: int,
    reserved: ExecutionResources,
    cpus_per_task: float,
) -> list[ray.data.DataIterator]:
    """Starts the stream of a run and splits it among its workers.

    Args:
        plan: Which rows make which step.
        train: Training table.
        val: Validation table.
        preparation: What happens to each image.
        world_size: Number of workers.
        start_epoch: Where to begin, from 0.
        start_step: The step in that epoch to begin with, from 0.
        reserved: CPUs and GPUs that the training workers hold, so that Ray Data leaves them alone.
        cpus_per_task: CPUs that a decoding task asks for; with 0 a few run beside workers that hold all there are.

    Returns:
        One iterator for each rank; read it with `raydet.training.batches`.
    """
    use_one_row_blocks(ExecutionOptions(preserve_order=True, exclude_resources=reserved))
    segments = list(plan.segments(start_epoch=start_epoch, start_step=start_step))
    tables = {"train": train, "validate": val}
    groups = {kind: table.row_groups() for kind, table in tables.items()}
    source = ray.put(_Source(plan, tables, groups, world_size, preparation))
    dataset = ray.data.read_datasource(
        TaskSource("RunStream", [partial(_read_segment, source, segment) for segment in segments]),
        # A reader waits for most of its life; a fraction of a CPU keeps it from holding one while it does.
        num_cpus=min(0.01, cpus_per_task),
        compute=TaskPoolStrategy(size=min(len(segments), 2)),
        override_num_blocks=max(1, len(segments)),
    )
    dataset = dataset.map_batches(
        partial(_prepare_micro_batch, preparation=preparation),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=cpus_per_task,
        compute=None if cpus_per_task else TaskPoolStrategy(size=_TASKS_WITHOUT_CPUS),
    )
    iterators: list[ray.data.DataIterator] = dataset.streaming_split(world_size, equal=False)
    return iterators


def use_one_row_blocks(options: ExecutionOptions, *, watch: type[ExecutionCallback] | None = None) -> None:
    """Sets this process's Ray Data up so that each row, which is a whole batch, becomes a block of its own.

    Args:
        options: Of the executions to come.
        watch: Is called at each turn of their scheduling loop; what it raises ends the execution.
    """
    context = DataContext.get_current()
    # A block ends as soon as it is larger than this, in bytes. It is what makes the dealing out exact.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    # Else what a task raises comes wrapped, and loses its cause on the way to the driver.
    context.raise_original_map_exception = True
    context.execution_options = options
    context.custom_execution_callback_classes = [_Pace] if watch is None else [_Pace, watch]


class _Pace(ExecutionCallback):
    """Keeps Ray Data's scheduling loop from spinning.

    While all that is decoded waits for a busy consumer the loop has nothing to wait for itself, and takes more than
    half of a CPU from those who work. Each turn of it deals with all that happened since the last.
    """

    def on_execution_step(self, executor: object) -> None:
        """Rests after each turn of the loop."""
        time.sleep(SCHEDULING_PAUSE_S)


def key_of(table: pa.Table) -> MicroBatch:
    """The micro-batch of a block of the stream, without its rows."""
    return MicroBatch(**{name: table[name][0].as_py() for name, _ in _KEY_FIELDS}, rows=())


@dataclass(frozen=True)
class _Source:
    """What all reading tasks of a run share; put into the object store once."""

    plan: RunPlan
    tables: dict[str, Table]
    groups: dict[str, tuple[RowGroup, ...]]
    world_size: int
    preparation: Preparation


class TaskSource(Datasource):
    """A source for Ray Data made of tasks, each of which yields blocks."""

    def __init__(self, name: str, tasks: Sequence[Callable[[], Iterator[pa.Table]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name, self._tasks = name, tasks

    def get_name(self) -> str:
        """What Ray's progress and dashboard call it."""
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: it depends on what is left to do."""
        return None

    def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> list[ReadTask]:
        """The tasks as they are, whatever the parallelism."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(task, metadata) for task in self._tasks]


def _read_segment(source_ref: "ray.ObjectRef[_Source]", segment: Segment) -> Iterator[pa.Table]:
    source: _Source = ray.get(source_ref)
    yield from _encoded(source, segment)


def _encoded(source: _Source, segment: Segment) -> Iterator[pa.Table]:
    """Reads each row group of a segment when it is first needed and deals its rows into micro-batches."""
    plan, rows = source.plan, _Rows(source.tables[segment.kind], source.groups[segment.kind])
    mixes = source.preparation.mixes(segment.kind, segment.epoch)
    for micro_batch in plan.micro_batches(segment, source.world_size):
        if segment.kind == "validate":  # in order: what came before is not needed again
            rows.keep_only_latest()
        mosaics: list[Sequence[int]] = [()] * len(micro_batch.rows)
        mixups = mosaics
        if mixes:
            partners = [plan.partner_rows(segment.epoch, micro_batch.step, row) for row in micro_batch.rows]
            mosaics, mixups = [one.mosaic for one in partners], [one.mixup for one in partners]
        columns = [*rows.take(micro_batch.rows).flatten(), rows.take_lists(mosaics), rows.take_lists(mixups)]
        yield _one_row(micro_batch, pa.StructArray.from_arrays(columns, fields=list(_ENCODED_TYPE)), _ENCODED_SCHEMA)


class _Rows:
    """The rows of a table by number, each row group read when it is first needed."""

    def __init__(self, table: Table, groups: Sequence[RowGroup]) -> None:
        self._table, self._groups = table, groups
        self._first_rows = np.cumsum([0, *(group.num_rows for group in groups)])
        self._loaded: dict[int, pa.StructArray] = {}

    def keep_only_latest(self) -> None:
        """Gives back the memory of all row groups but the one read last."""
        self._loaded = dict(list(self._loaded.items())[-1:])

    def take(self, numbers: Sequence[int]) -> pa.StructArray:
        """The rows of these numbers, in this order, as an array of `_ROW_TYPE`."""
        slices = []
        for row in numbers:
            number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            if number not in self._loaded:
                rows = self._table.read_row_group(self._groups[number], READ_COLUMNS).to_struct_array()
                self._loaded[number] = pa.concat_arrays(rows.chunks).cast(_ROW_TYPE)
            slices.append(self._loaded[number].slice(int(row - self._first_rows[number]), 1))
        return pa.concat_arrays(slices) if slices else pa.array([], _ROW_TYPE)

    def take_lists(self, lists: Sequence[Sequence[int]]) -> pa.ListArray:
        """Several lists of rows, as an array of lists of `_ROW_TYPE`."""
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


def _prepare_micro_batch(block: pa.Table, preparation: Preparation) -> pa.Table:
    """Decodes, augments and resizes the images of one micro-batch."""
    _use_one_thread()
    micro_batch = key_of(block)
    images = block["images"].combine_chunks().values
    ready = [_prepare_image(row.as_py(), micro_batch, preparation) for row in images]
    rule = json.dumps(preparation.rule_of(micro_batch).to_dict())
    return _one_row(micro_batch, pa.array(ready, _READY_TYPE), _READY_SCHEMA, resize_rule=rule)


@lru_cache(maxsize=1)
def _use_one_thread() -> None:
    """One image is too little work to share among threads; those would take the cores from the model."""
    import torch

    torch.set_num_threads(1)


@lru_cache(maxsize=4)
def _augmenter(spec_json: str) -> Any:
    # OpenCV and, for some pipelines, albumentations: only in the workers that augment.
    from raydet.augmentation.transforms import Augmenter

    return Augmenter(json.loads(spec_json))


def _prepare_image(row: dict[str, Any], micro_batch: MicroBatch, preparation: Preparation) -> dict[str, Any]:
    validating = micro_batch.kind == "validate"
    record: dict[str, Any] = {
        "image_id": row["image_id"],
        "error": None,
        "original_height": row["height"],
        "original_width": row["width"],
        "boxes": [],
        "labels": [],
        "objects": row["objects"] if validating else None,
    }
    try:
        image = decode(image_bytes(row["image"]), max_pixels=preparation.max_pixels)
    except DecodeError as error:
        return {**record, "error": str(error), "pixels": None, "height": 0, "width": 0}
    record["original_height"], record["original_width"] = image.shape[:2]
    if not validating:
        sample = _augment(image, row, micro_batch, preparation)
        image = sample.image
        boxes = xywh_to_normalised_cxcywh(sample.boxes_xywh, sample.size_hw).astype(np.float32)
        # A crowd box covers many objects: no single query can learn it.
        record["boxes"] = boxes[~sample.iscrowd].reshape(-1)
        record["labels"] = sample.labels[~sample.iscrowd]
    rule = preparation.rule_of(micro_batch)
    resized = resize(image, rule.target_size_hw((image.shape[0], image.shape[1])), rule.resample)
    return {**record, "pixels": resized.tobytes(), "height": resized.shape[0], "width": resized.shape[1]}


def _augment(
    image: npt.NDArray[np.uint8], row: dict[str, Any], micro_batch: MicroBatch, preparation: Preparation
) -> "Sample":
    from raydet.augmentation.mixing import Partners, sample_of
    from raydet.augmentation.transforms import plain_of

    spec = preparation.augmentation
    if micro_batch.epoch >= preparation.plain_from_epoch:
        spec = plain_of(spec)
    partners = Partners(
        mosaic=_readable(row.get("mosaic"), preparation.max_pixels),
        mixup=_readable(row.get("mixup"), preparation.max_pixels),
    )
    seed = augmentation_seed(preparation.seed, micro_batch.epoch, row["image_id"])
    augmented: Sample = _augmenter(json.dumps(spec))(sample_of(image, row["objects"]), seed=seed, partners=partners)
    return augmented


def _readable(rows: list[dict[str, Any]] | None, max_pixels: int) -> "tuple[Sample, ...]":
    """Partners as samples; without those that cannot be read, which have their own turn to be reported."""
    from raydet.augmentation.mixing import sample_of

    samples = []
    for row in rows or ():
        with contextlib.suppress(DecodeError):
            samples.append(sample_of(decode(image_bytes(row["image"]), max_pixels=max_pixels), row["objects"]))
    return tuple(samples)
