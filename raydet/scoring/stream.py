"""The Ray Data pipeline of a scoring run: images → encoded batches → pixels → detections → files.

The unit of work is a chunk: consecutive rows of the input that become one output file, named by the chunk's number. A
chunk travels as a fixed number of parts: blocks of one row that each hold a batch. Order is preserved throughout, so
the parts of a chunk arrive together at the task that writes it. A chunk that is processed twice writes the same file.
"""

import dataclasses
import json
import logging
import math
import re
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from raydet.augmentation.view import decoded
from raydet.cluster import job_metrics
from raydet.cluster.ray_data import TaskSource, one_row_blocks
from raydet.cluster.ray_internals import ExecutionCallback, alive_nodes, call_retries, task_retries
from raydet.cluster.shares import Resources, workers_that_fit
from raydet.cluster.stopwatch import FileStats, ProcessStats, Stopwatch
from raydet.cluster.worker_log import log_from_here
from raydet.common.errors import UserError
from raydet.common.threads import available_cpus
from raydet.config import PredictConfig
from raydet.images.collection import Collection, ImageRow
from raydet.images.decode import DecodeError, upright_size_hw
from raydet.images.listing import is_pattern
from raydet.models.checkpoints import fingerprint
from raydet.models.geometry import ResizeRule
from raydet.tables import storage
from raydet.tables.output_folder import RUN_FILE, OutputFolder

if TYPE_CHECKING:
    from raydet.models.detector import Detections

LOG_FOLDER = "_log"
"""Log folder in OUT; names with a leading `_` are not part of the table."""
COUNTS_KEY = b"raydet_counts"
MOST_READ_TASKS = 5_000
"""Ray Data plans all read tasks up front; with more chunks than this, a task reads several."""
_SORT_WINDOW_PARTS = 8
"""Number of parts whose images are read together and sorted by shape."""
_SORT_WINDOW_BYTES = 256 * 2**20
_IMAGES_PER_DECODE_TASK = 128
_LOOK_AT_NODES_EVERY_S = 5.0
_RETRIES = 3
_LOG = logging.getLogger(__name__)
_PART_NAME = re.compile(r"part-(\d{7,})\.parquet")

_ENCODED_FIELDS = [
    ("position", pa.int64()),
    ("image_id", pa.int64()),
    ("path", pa.string()),
    ("error", pa.string()),
    ("height", pa.int64()),
    ("width", pa.int64()),
]
_ENCODED_TYPE = pa.struct([*_ENCODED_FIELDS, ("data", pa.large_binary())])
_DECODED_TYPE = pa.struct(
    [*_ENCODED_FIELDS, ("pixel_height", pa.int64()), ("pixel_width", pa.int64()), ("pixels", pa.large_binary())]
)


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """Division of the images into chunks and parts; a resumed run keeps its first plan.

    Attributes:
        num_rows: Number of all images.
        rows_per_file: Images per chunk; the last chunk may have fewer.
        images_per_part: Images that are decoded and passed to the model's actor together.
        batch_size: Images or tiles per forward pass.
    """

    num_rows: int
    rows_per_file: int
    images_per_part: int
    batch_size: int

    @property
    def num_chunks(self) -> int:
        """Number of chunks, which equals the number of output files."""
        return math.ceil(self.num_rows / self.rows_per_file)

    @property
    def parts_per_chunk(self) -> int:
        """Parts per chunk; the last chunk may have fewer."""
        return math.ceil(self.rows_per_file / self.images_per_part)

    def rows_of(self, chunk: int) -> range:
        """Return the positions of a chunk's images."""
        start = chunk * self.rows_per_file
        return range(start, min(start + self.rows_per_file, self.num_rows))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Data that the tasks and actors of a scoring run share.

    Attributes:
        config: Options of the run, with absolute paths.
        folder: Output folder.
        model_fingerprint: Fingerprint of the checkpoint at the start of the run.
        images: Images to score.
        plan: Chunks and parts.
        schema: Schema of the detections table.
        sorts_by_shape: True if images of similar shape share a part, to reduce the model's padding.
        reduce_to: The model's resize rule if JPEGs may be decoded at reduced size, but no smaller than its target.
    """

    config: PredictConfig
    folder: OutputFolder
    model_fingerprint: str
    images: Collection
    plan: ScoringPlan
    schema: pa.Schema
    sorts_by_shape: bool
    reduce_to: ResizeRule | None


def part_name(chunk: int) -> str:
    """Return the file name of a chunk."""
    return f"part-{chunk:07d}.parquet"


def done_chunks(folder: OutputFolder) -> set[int]:
    """Return the chunks whose file exists; files appear atomically."""
    matches = map(_PART_NAME.fullmatch, folder.list_files())
    return {int(match[1]) for match in matches if match}


class NodeLostError(ConnectionError):
    """Loss of a node after which the remaining nodes cannot hold all workers, so that some would wait forever."""


def score(work: Work, chunks: Sequence[int], resources: Resources, *, num_workers: int) -> Iterator[FileStats]:
    """Score chunks of a run and yield the statistics of each file once it is written.

    Args:
        work: Shared data of the run.
        chunks: Chunks to score, ascending.
        resources: Resources of each worker and each decoding task.
        num_workers: Copies of the model.

    Raises:
        NodeLostError: The cluster has become too small for this number of workers.
        ray.exceptions.RayError: A task failed, or Ray could not recover from a loss.
    """
    for row in _pipeline(work, chunks, resources, num_workers).iter_rows():
        yield FileStats.from_dict(json.loads(row["stats"]))


def _pipeline(work: Work, chunks: Sequence[int], resources: Resources, num_workers: int) -> ray.data.Dataset:
    work_ref = ray.put(work)
    per_task = math.ceil(len(chunks) / MOST_READ_TASKS)
    tasks = [partial(_read, work_ref, chunks[at : at + per_task]) for at in range(0, len(chunks), per_task)]
    with one_row_blocks(watch=_watch_nodes(resources, num_workers)):
        dataset: ray.data.Dataset = ray.data.read_datasource(
            TaskSource("Collection", tasks),
            num_cpus=0.01,
            compute=TaskPoolStrategy(size=min(len(tasks), max(2, num_workers))),
            override_num_blocks=len(tasks),
        )
    dataset = dataset.map_batches(
        partial(_decode, max_pixels=work.config.max_pixels, reduce_to=work.reduce_to),
        # Ray Data polls its tasks about seven times a second: small tasks would mostly wait.
        batch_size=math.ceil(_IMAGES_PER_DECODE_TASK / work.plan.images_per_part),
        batch_format="pyarrow",
        zero_copy_batch=True,
        # Ray Data fuses stages with equal resources into one process: the model's actors would then decode as well.
        num_cpus=resources.cpus_per_task + (0.01 if resources.cpus_per_task == resources.cpus_per_worker else 0.0),
        **task_retries(_RETRIES),
    )
    dataset = dataset.map_batches(
        _ScoringActor,
        fn_constructor_args=(work_ref, resources),
        # Two concurrent calls per actor: while the model runs on one batch, the next is resized and collated.
        compute=ActorPoolStrategy(size=num_workers, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True),
        num_cpus=resources.cpus_per_worker,
        num_gpus=1 if resources.use_gpu else 0,
        # Each block has one row already; with GPUs Ray Data requires the batch size as a number.
        batch_size=1 if resources.use_gpu else None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        **call_retries(_RETRIES),
    )
    dataset = dataset.map_batches(
        partial(_write, folder=work.folder, schema=work.schema),
        batch_size=work.plan.parts_per_chunk,
        batch_format="pyarrow",
        # Ray Data assigns CPUs to the stages in order: a write stage that needs one might wait until reading ends.
        num_cpus=0,
        compute=TaskPoolStrategy(size=max(2, num_workers)),
        **task_retries(_RETRIES),
    )
    return dataset


def missing_here(work: Work) -> str | None:
    """Return the first local path of the run that this machine does not see, or None."""
    config = work.config
    places = [work.folder.uri_of(RUN_FILE), *([] if is_pattern(config.data) else [config.data])]
    return next((place for place in places if "://" not in place and not storage.exists(place)), None)


def _watch_nodes(resources: Resources, num_workers: int) -> type[ExecutionCallback]:
    """Build a callback that fails when nodes are lost; Ray Data would wait forever for an actor that no longer fits."""

    class Watch(ExecutionCallback):
        def __init__(self) -> None:
            self._num_nodes, self._next_look_s = 0, 0.0

        def on_execution_step(self, executor: object) -> None:
            if time.monotonic() < self._next_look_s:
                return
            self._next_look_s = time.monotonic() + _LOOK_AT_NODES_EVERY_S
            num_nodes = len(alive_nodes())
            if num_nodes < self._num_nodes and workers_that_fit(resources) < num_workers:
                raise NodeLostError(f"{self._num_nodes - num_nodes} of {self._num_nodes} nodes lost")
            self._num_nodes = max(num_nodes, self._num_nodes)

    return Watch


def _read(work_ref: "ray.ObjectRef[Work]", chunks: Sequence[int]) -> Iterator[pa.Table]:
    work: Work = ray.get(work_ref)
    missing = missing_here(work)
    if missing:  # otherwise every image would count as a deleted file
        raise ConnectionError(f"{missing} is missing on {socket.gethostname()}")
    for chunk in chunks:
        yield from _parts_of(work, chunk)


def _parts_of(work: Work, chunk: int) -> Iterator[pa.Table]:
    """Yield a chunk's images with their encoded bytes, in parts of the planned size."""
    rows, size = work.plan.rows_of(chunk), work.plan.images_per_part
    num_parts, part = math.ceil(len(rows) / size), 0
    watch = Stopwatch("reader")
    window: list[tuple[int, ImageRow]] = []
    num_bytes = 0
    images = work.images.read(rows.start, rows.stop)
    for position in rows:
        with watch.measuring("read"):
            row = next(images)
        window.append((position, row))
        num_bytes += len(row.data or b"")
        is_last = position == rows.stop - 1
        is_full = len(window) == size * _SORT_WINDOW_PARTS or num_bytes > _SORT_WINDOW_BYTES
        if is_last or (len(window) % size == 0 and (is_full or not work.sorts_by_shape)):
            if work.sorts_by_shape:
                window.sort(key=lambda item: _aspect(item[1]))
            for at in range(0, len(window), size):
                encoded = pa.array([_encoded(*item) for item in window[at : at + size]], _ENCODED_TYPE)
                yield _block(chunk, part, num_parts, encoded, [watch.lap()])
                part += 1
            window, num_bytes = [], 0
    assert part == num_parts, f"chunk {chunk} has {part} parts, expected {num_parts}"


def _aspect(row: ImageRow) -> float:
    size_hw = row.size_hw
    if size_hw is None and row.data is not None:
        try:
            size_hw = upright_size_hw(row.data)
        except DecodeError:
            return 0.0
    return size_hw[1] / max(size_hw[0], 1) if size_hw is not None else 0.0


def _encoded(position: int, row: ImageRow) -> dict[str, Any]:
    height, width = row.size_hw or (None, None)
    return {
        "position": position,
        "image_id": row.image_id,
        "path": row.path,
        "error": row.error,
        "height": height,
        "width": width,
        "data": row.data,
    }


def _block(chunk: int, part: int, num_parts: int, rows: pa.Array, stats: list[ProcessStats]) -> pa.Table:
    job_metrics.count_stage(stats[-1], len(rows))
    return pa.table(
        {
            "chunk": [chunk],
            "part": [part],
            "num_parts": [num_parts],
            "rows": pa.LargeListArray.from_arrays(pa.array([0, len(rows)], pa.int64()), rows),
            "stats": [json.dumps([dataclasses.asdict(item) for item in stats])],
        }
    )


def _next_block(block: pa.Table, rows: pa.Array, stats: ProcessStats) -> pa.Table:
    """Build the block for the next stage, with the statistics of all stages so far."""
    earlier = [ProcessStats(**item) for item in json.loads(block["stats"][0].as_py())]
    chunk, part, num_parts = (block[name][0].as_py() for name in ("chunk", "part", "num_parts"))
    return _block(chunk, part, num_parts, rows, [*earlier, stats])


def _decode(blocks: pa.Table, max_pixels: int, reduce_to: ResizeRule | None) -> Iterator[pa.Table]:
    """Decode some parts and yield each as soon as it is ready."""
    watch = Stopwatch("decoder")
    for at in range(blocks.num_rows):
        yield _decode_part(blocks.slice(at, 1), watch, max_pixels, reduce_to)


def _decode_part(block: pa.Table, watch: Stopwatch, max_pixels: int, reduce_to: ResizeRule | None) -> pa.Table:
    records: list[dict[str, Any]] = []
    images: list[npt.NDArray[np.uint8]] = []
    for row in block["rows"].combine_chunks().values:
        record = {name: row[name].as_py() for name, _ in _ENCODED_FIELDS}
        record |= {"pixel_height": None, "pixel_width": None}
        image: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        if record["error"] is None:
            try:
                with watch.measuring("decode"):
                    data = row["data"].as_py()
                    image, (height, width) = decoded(data, max_pixels=max_pixels, reduce_to=reduce_to)
            except DecodeError as error:
                record["error"] = str(error)
            else:
                record |= {"height": height, "width": width}
                record |= {"pixel_height": image.shape[0], "pixel_width": image.shape[1]}
        records.append(record)
        images.append(image)
    with watch.measuring("decode"):
        rows = _with_pixels(records, images)
    return _next_block(block, rows, watch.lap())


def _with_pixels(records: list[dict[str, Any]], images: list[npt.NDArray[np.uint8]]) -> pa.StructArray:
    """Put the pixels of all images into one buffer, the only copy between decoder and model."""
    offsets = np.cumsum([0, *(image.size for image in images)])
    flat = np.concatenate([image.reshape(-1) for image in images]) if images else np.zeros(0, np.uint8)
    pixels = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(images), [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(flat)]
    )
    columns = [
        pixels if field.name == "pixels" else pa.array([record[field.name] for record in records], field.type)
        for field in _DECODED_TYPE
    ]
    return pa.StructArray.from_arrays(columns, fields=list(_DECODED_TYPE))


class _ScoringActor:
    """A copy of the model, loaded once, that turns decoded parts into detections."""

    def __init__(self, work_ref: "ray.ObjectRef[Work]", resources: Resources) -> None:
        from raydet.engines.loading import load_engine
        from raydet.engines.scorer import Scorer

        work: Work = ray.get(work_ref)
        config = work.config
        log_from_here(storage.join(config.out, LOG_FOLDER))
        started = time.perf_counter()
        name = config.checkpoint or config.model
        assert name is not None, "the config asks for a checkpoint or a model"
        if fingerprint(name) != work.model_fingerprint:
            raise UserError(f"{name} changed during the run; restore the model and run the same command again")
        has_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        device, num_threads = "cuda" if has_gpu else "cpu", threads_of(config, resources)
        engine = load_engine(config, device=device, num_threads=num_threads)
        self._scorer = Scorer(engine, config, batch_size=work.plan.batch_size)
        self._row_type = pa.struct([pa.field(name, work.schema.field(name).type) for name in work.schema.names])
        # All forward passes run in one thread: each calling thread would get its own pool of compute threads.
        self._thread = ThreadPoolExecutor(1)
        text = "model loaded on %s in %.1f s, %d threads"
        _LOG.info(text, device, time.perf_counter() - started, num_threads)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn one decoded part into rows of the detections table."""
        watch = Stopwatch("model")
        rows = block["rows"].combine_chunks().flatten()
        images = [
            np.frombuffer(row["pixels"].as_buffer(), np.uint8).reshape(
                row["pixel_height"].as_py(), row["pixel_width"].as_py(), 3
            )
            for row in rows
            if row["error"].as_py() is None
        ]
        found: Iterator[Detections] = iter(())
        if images:
            with watch.measuring("prepare"):
                prepared = self._scorer.prepare(images)
            found = iter(self._thread.submit(self._predict, prepared, watch).result())
        records = [_record(row, found) for row in rows]
        result = pa.array(records, pa.struct([("position", pa.int64()), *self._row_type]))
        return _next_block(block, result, watch.lap())

    def _predict(self, prepared: Any, watch: "Stopwatch") -> "list[Detections]":
        with watch.measuring("model"):
            return self._scorer.predict(prepared)


def threads_of(config: PredictConfig, resources: Resources) -> int:
    """Return the compute threads of one copy of the model: `threads_per_worker`, or its default.

    By default the machine's CPUs are divided evenly between the workers that fit on it.
    """
    num_cpus = available_cpus()
    num_here = max(1, min(config.num_workers, int(num_cpus / resources.cpus_per_worker)))
    return config.threads_per_worker or max(1, num_cpus // num_here)


def _record(row: pa.StructScalar, found: "Iterator[Detections]") -> dict[str, Any]:
    record = {name: row[name].as_py() for name, _ in _ENCODED_FIELDS}
    if record["error"] is not None:
        return {**record, "detections": {"bbox": [], "score": [], "category": []}}
    detections = next(found)
    boxes = detections.boxes_xywh
    if row["pixel_height"].as_py() != record["height"] or row["pixel_width"].as_py() != record["width"]:
        scale = np.array([record["width"] / row["pixel_width"].as_py(), record["height"] / row["pixel_height"].as_py()])
        boxes = boxes * np.tile(scale, 2)
    return {
        **record,
        "detections": {
            "bbox": boxes.tolist(),
            "score": detections.scores.tolist(),
            "category": detections.categories.tolist(),
        },
    }


def _write(blocks: pa.Table, folder: OutputFolder, schema: pa.Schema) -> pa.Table:
    """Write the parts of one chunk into its file, atomically."""
    watch = Stopwatch("writer")
    chunk, num_parts = blocks["chunk"][0].as_py(), blocks["num_parts"][0].as_py()
    assert set(blocks["chunk"].to_pylist()) == {chunk}, f"parts of several chunks: {blocks['chunk'].to_pylist()}"
    parts = blocks["part"].to_pylist()
    assert parts == list(range(num_parts)), f"parts {parts} of chunk {chunk}, expected {num_parts}"
    with watch.measuring("write"):
        table = pa.Table.from_struct_array(blocks["rows"].combine_chunks().flatten())
        table = table.sort_by("position").select(schema.names).cast(schema)
        counts = {
            "num_errors": table.num_rows - table["error"].null_count,
            "num_detections": pc.sum(pc.list_value_length(pc.struct_field(table["detections"], "score"))).as_py() or 0,
        }
        # In the footer, so that counting the rows of a finished run reads no detections.
        metadata = {**schema.metadata, COUNTS_KEY: json.dumps(counts)}
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), sink)
        folder.write_bytes(sink.getvalue().to_pybytes(), part_name(chunk))
    processes = [item for text in blocks["stats"].to_pylist() for item in json.loads(text)]
    own = watch.lap()
    job_metrics.count_stage(own, table.num_rows)
    job_metrics.count_written(counts["num_errors"], counts["num_detections"])
    stats = FileStats(
        num_images=table.num_rows,
        num_detections=counts["num_detections"],
        errors=[reason for reason in table["error"].to_pylist() if reason is not None],
        processes=[*(ProcessStats(**item) for item in processes), own],
    )
    return pa.table({"stats": [json.dumps(stats.to_dict())]})
