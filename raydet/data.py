"""Ray Data pipelines: the stream of a training run, and the decoding of a table to be scored.

Both go table → encoded images → decoded images, and hand on plain Arrow. Pixels stay uint8.

The stream of a run is one Ray Data execution from its first step to its last, validations included, so that no
epoch waits for a pipeline to start. Every block of it holds one row, a whole micro-batch; Ray Data deals the blocks
out to the workers in turn and in order, and each worker checks that it got what the plan says.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from raydet import storage
from raydet.boxes import as_boxes, clip_xywh, xywh_to_normalised_cxcywh
from raydet.decode import DecodeError, decode
from raydet.geometry import ResizeRule, resize
from raydet.metrics import ImageTruth
from raydet.ordering import MicroBatch, RunPlan, Segment, augmentation_seed
from raydet.schema import IMAGE_TYPE, OBJECTS_TYPE
from raydet.tables import RowGroup, Table

if TYPE_CHECKING:
    from raydet.config import Augmentation

SCHEDULING_PAUSE_S = 0.03
"""Short beside the decoding of a batch, long beside a turn of Ray Data's scheduling loop (2–3 ms)."""
READ_COLUMNS = ("image_id", "image", "width", "height", "objects")

_ENCODED_TYPE = pa.struct(
    [
        ("image_id", pa.int64()),
        ("image", IMAGE_TYPE),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("objects", OBJECTS_TYPE),
    ]
)
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
_READY_SCHEMA = pa.schema([*_KEY_FIELDS, ("images", pa.large_list(_READY_TYPE))])


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What happens to an image between the table and the model."""

    augmentation: "Augmentation"
    plain_from_epoch: int
    resize_rule: ResizeRule
    max_pixels: int
    seed: int


@dataclass(frozen=True)
class ReadyImage:
    """One image as a worker gets it: pixels and normalised boxes, or the reason why it cannot be read.

    Attributes:
        image_id: As in the table.
        error: Null, or why there are no pixels.
        image: uint8 RGB [H, W, 3] at the model's size; null when there is an error.
        original_size_hw: Of the upright image before augmentation and resizing, in pixels.
        boxes_cxcywh: Normalised to the image, float32 [N, 4].
        labels: Category indices, int64 [N].
        objects: The table's own annotations, untouched; only in validation.
    """

    image_id: int
    error: str | None
    image: npt.NDArray[np.uint8] | None
    original_size_hw: tuple[int, int]
    boxes_cxcywh: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    objects: dict[str, Any] | None

    def truth(self) -> ImageTruth:
        """The table's annotations, as evaluation takes them."""
        assert self.objects is not None, "only images of a validation carry their annotations"
        return ImageTruth(
            as_boxes(self.objects["bbox"]),
            np.asarray(self.objects["category"], np.int64),
            np.asarray(self.objects["area"], np.float64),
            np.asarray(self.objects["iscrowd"], bool),
        )


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
        cpus_per_task: CPUs that a decoding task asks for.

    Returns:
        One iterator for each rank; read it with `micro_batches`.
    """
    use_one_row_blocks(ExecutionOptions(preserve_order=True, exclude_resources=reserved))
    segments = list(plan.segments(start_epoch=start_epoch, start_step=start_step))
    tables = {"train": train, "validate": val}
    groups = {kind: table.row_groups() for kind, table in tables.items()}
    source = ray.put(_Source(plan, tables, groups, world_size))
    dataset = ray.data.read_datasource(
        TaskSource("RunStream", [partial(_read_segment, source, segment) for segment in segments]),
        # A reader waits for most of its life; a fraction of a CPU keeps it from holding one while it does.
        num_cpus=0.01,
        compute=TaskPoolStrategy(size=min(len(segments), 2)),
        override_num_blocks=max(1, len(segments)),
    )
    dataset = dataset.map_batches(
        partial(_prepare_micro_batch, preparation=preparation),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=cpus_per_task,
    )
    iterators: list[ray.data.DataIterator] = dataset.streaming_split(world_size, equal=False)
    return iterators


def use_one_row_blocks(options: ExecutionOptions) -> None:
    """Sets this process's Ray Data up so that each row, which is a whole batch, becomes a block of its own."""
    context = DataContext.get_current()
    # A block ends as soon as it is larger than this, in bytes. It is what makes the dealing out exact.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.execution_options = options
    if _Pace not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(_Pace)


class _Pace(ExecutionCallback):
    """Keeps Ray Data's scheduling loop from spinning.

    While all that is decoded waits for a busy consumer the loop has nothing to wait for itself, and takes more than
    half of a CPU from those who work. Each turn of it deals with all that happened since the last.
    """

    def on_execution_step(self, executor: object) -> None:
        """Rests after each turn of the loop."""
        time.sleep(SCHEDULING_PAUSE_S)


def micro_batches(iterator: ray.data.DataIterator) -> Iterator[tuple[MicroBatch, list[ReadyImage]]]:
    """Reads a rank's part of the stream of a run: what each micro-batch is, and its images.

    The images' arrays are read-only views into the object store, valid until the next one is asked for. The rows of
    the `MicroBatch` are not filled in.
    """
    blocks: Iterable[pa.Table] = iterator.iter_batches(
        batch_size=None,  # type: ignore[arg-type]
        batch_format="pyarrow",
        prefetch_batches=2,
    )
    for table in blocks:
        assert table.num_rows == 1, f"a block of the stream holds one micro-batch, got {table.num_rows}"
        record = {name: table[name][0].as_py() for name, _ in _KEY_FIELDS}
        images = table["images"].combine_chunks()
        yield MicroBatch(**record, rows=()), [_unpack(scalar) for scalar in images.values]


@dataclass(frozen=True)
class _Source:
    """What all reading tasks of a run share; put into the object store once."""

    plan: RunPlan
    tables: dict[str, Table]
    groups: dict[str, tuple[RowGroup, ...]]
    world_size: int


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
    """Reads each row group of a segment when it is first needed and deals its rows into micro-batches."""
    source: _Source = ray.get(source_ref)
    table, groups = source.tables[segment.kind], source.groups[segment.kind]
    first_rows = np.cumsum([0, *(group.num_rows for group in groups)])
    loaded: dict[int, pa.StructArray] = {}
    for micro_batch in source.plan.micro_batches(segment, source.world_size):
        scalars = []
        for row in micro_batch.rows:
            number = int(np.searchsorted(first_rows, row, side="right")) - 1
            if number not in loaded:
                if segment.kind == "validate":  # in order: what came before is not needed again
                    loaded.clear()
                rows = table.read_row_group(groups[number], READ_COLUMNS).to_struct_array()
                loaded[number] = pa.concat_arrays(rows.chunks).cast(_ENCODED_TYPE)
            scalars.append(loaded[number].slice(int(row - first_rows[number]), 1))
        images = pa.concat_arrays(scalars) if scalars else pa.array([], _ENCODED_TYPE)
        yield _one_row(micro_batch, images, _ENCODED_SCHEMA)


def _one_row(micro_batch: MicroBatch, images: pa.Array, schema: pa.Schema) -> pa.Table:
    keys = [pa.array([getattr(micro_batch, name)], dtype) for name, dtype in _KEY_FIELDS]
    list_type = schema.field("images").type
    offsets = pa.array([0, len(images)], pa.int64() if pa.types.is_large_list(list_type) else pa.int32())
    array_class = pa.LargeListArray if pa.types.is_large_list(list_type) else pa.ListArray
    nested = array_class.from_arrays(offsets, images.cast(list_type.value_type))
    return pa.Table.from_arrays([*keys, nested], schema=schema)


def _prepare_micro_batch(block: pa.Table, preparation: Preparation) -> pa.Table:
    """Decodes, augments and resizes the images of one micro-batch."""
    micro_batch = MicroBatch(**{name: block[name][0].as_py() for name, _ in _KEY_FIELDS}, rows=())
    images = block["images"].combine_chunks().values
    ready = [_prepare_image(row.as_py(), micro_batch, preparation) for row in images]
    return _one_row(micro_batch, pa.array(ready, _READY_TYPE), _READY_SCHEMA)


@lru_cache(maxsize=4)
def _augmenter(name: "Augmentation") -> Any:
    # albumentations takes seconds to import: only in the workers that augment.
    from raydet.transforms import Augmenter

    return Augmenter(name)


def _prepare_image(row: dict[str, Any], micro_batch: MicroBatch, preparation: Preparation) -> dict[str, Any]:
    validating = micro_batch.kind == "validate"
    objects = row["objects"]
    record: dict[str, Any] = {
        "image_id": row["image_id"],
        "error": None,
        "original_height": row["height"],
        "original_width": row["width"],
        "boxes": [],
        "labels": [],
        "objects": objects if validating else None,
    }
    try:
        image = decode(image_bytes(row["image"]), max_pixels=preparation.max_pixels)
    except DecodeError as error:
        return {**record, "error": str(error), "pixels": None, "height": 0, "width": 0}
    record["original_height"], record["original_width"] = image.shape[:2]
    if not validating:
        image, record["boxes"], record["labels"] = _augment(image, objects, row["image_id"], micro_batch, preparation)
    resized = resize(image, preparation.resize_rule.target_size_hw(image.shape[:2]), preparation.resize_rule.resample)
    return {**record, "pixels": resized.tobytes(), "height": resized.shape[0], "width": resized.shape[1]}


def _augment(
    image: npt.NDArray[np.uint8],
    objects: dict[str, Any],
    image_id: int,
    micro_batch: MicroBatch,
    preparation: Preparation,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    from raydet.transforms import Sample

    crowd = np.asarray(objects["iscrowd"], dtype=bool)
    # A crowd box covers many objects: no single query can learn it.
    sample = Sample(
        image,
        clip_xywh(as_boxes(objects["bbox"]), image.shape[:2])[~crowd],
        np.asarray(objects["category"], dtype=np.int64)[~crowd],
    )
    name = preparation.augmentation
    if micro_batch.epoch >= preparation.plain_from_epoch and name != "none":
        name = "flip"
    seed = augmentation_seed(preparation.seed, micro_batch.epoch, image_id)
    sample = _augmenter(name)(sample, seed=seed)
    boxes = xywh_to_normalised_cxcywh(sample.boxes_xywh, sample.size_hw).astype(np.float32)
    return sample.image, boxes.reshape(-1), sample.labels


def image_bytes(image: dict[str, Any]) -> bytes:
    """The encoded image of a table's row: the bytes that it holds, or those that its path leads to.

    Raises:
        DecodeError: The file cannot be read.
    """
    if image["bytes"] is not None:
        return bytes(image["bytes"])
    try:
        return storage.read_bytes(image["path"])
    except FileNotFoundError:
        raise DecodeError("the file is not there any more") from None
    except OSError as error:
        raise DecodeError(f"the file cannot be read: {error.strerror or error}") from None


def _unpack(scalar: pa.StructScalar) -> ReadyImage:
    error = scalar["error"].as_py()
    height, width = scalar["height"].as_py(), scalar["width"].as_py()
    image = None
    if error is None:
        image = np.frombuffer(scalar["pixels"].as_buffer(), np.uint8).reshape(height, width, 3)
    return ReadyImage(
        image_id=scalar["image_id"].as_py(),
        error=error,
        image=image,
        original_size_hw=(scalar["original_height"].as_py(), scalar["original_width"].as_py()),
        boxes_cxcywh=np.asarray(scalar["boxes"].as_py(), np.float32).reshape(-1, 4),
        labels=np.asarray(scalar["labels"].as_py(), np.int64),
        objects=scalar["objects"].as_py(),
    )
