"""The Ray Data stream of a training run: table → chunks of encoded images → chunks of decoded micro-batches, as Arrow.

A single Ray Data execution covers all steps and validations of a run, so that no epoch waits for a pipeline to start.
Each node with training workers has one, for its own workers, so their pixels do not cross the network.
Each block has one row, which is a chunk: consecutive micro-batches of one worker. Readers fetch row groups and cut them
into chunks; decoders, which live as long as the run, turn each chunk into pixels in one call. Ray Data distributes the
blocks to the workers in turn and in order, and each worker checks them against the plan. Pixels stay uint8.

Neither readers nor decoders reserve CPUs: Ray Data would divide the free ones by the number of executions in the
cluster and might end at none. raydet computes their number instead, and the operating system shares the CPUs.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from raydet.cluster.ray_data import TaskSource, one_row_blocks
from raydet.cluster.ray_internals import actors_on, alive_nodes, away_from_empty_nodes
from raydet.models.geometry import PixelBuffer
from raydet.tables.table import RowGroup, Table
from raydet.training.feeding.batches import ReadyBatch, ready_batches
from raydet.training.feeding.chunks import ENCODED_TYPE, ROW_TYPE, decode_chunk, encoded_chunk, header_of
from raydet.training.feeding.mixture import Mixture, read_images
from raydet.training.feeding.ordering import RunPlan, Segment
from raydet.training.feeding.views import Views

_MOST_IMAGES = 1024
"""Most images in a chunk. Each chunk costs Ray about 20 ms of CPU time, so chunks of small images must hold many."""
_MOST_CHUNK_BYTES = 128 * 2**20
"""Most bytes of decoded pixels in a chunk, fewer if the object store is small. Images of 640 px take 5 ms each: in
chunks of 64 MB, Ray's share was a tenth of the decoding."""
_MOST_ENCODED_BYTES = 256 * 2**20
_CHUNKS_PER_DECODER = 6
"""Chunks that are sent to a decoder before it has finished the first, so that it never waits for Ray Data."""
_CHUNKS_PER_WORKER = 2
_READERS = 2
_IMAGES_PER_READ_TASK = 10_000
_READ_THREADS = 4


def run_stream(
    plan: RunPlan,
    *,
    train: Table | Mixture,
    val: Table | Mixture,
    views: Views,
    world_size: int,
    ranks: Sequence[int],
    start_epoch: int,
    start_step: int,
    decoders: Sequence[str],
) -> list[ray.data.DataIterator]:
    """Start the stream of a run for some of its workers, and split it among them.

    Args:
        plan: Assignment of rows to steps.
        train: Training table.
        val: Validation table.
        views: Augmentation and resize of the images of each step. The plan must break where they change.
        world_size: Number of workers of the run.
        ranks: The workers to serve.
        start_epoch: First epoch, from 0.
        start_step: First step within that epoch, from 0.
        decoders: Ray's node id for each decoder; another node takes over if it is lost.

    Returns:
        One iterator for each of the ranks, to be read with `read_stream`; with a single worker, in this process only.
    """
    segments = list(plan.segments(start_epoch=start_epoch, start_step=start_step))
    tables: dict[str, Table | Mixture] = {"train": train, "validate": val}
    groups = {kind: table.row_groups() for kind, table in tables.items()}
    num_chunks = len(decoders) * _CHUNKS_PER_DECODER + _CHUNKS_PER_WORKER * len(ranks)
    stores = [node["Resources"].get("object_store_memory", math.inf) for node in alive_nodes()]
    most_bytes = int(min(_MOST_CHUNK_BYTES, min(stores) / (2 * num_chunks)))
    stream = StreamSource(plan, tables, groups, world_size, tuple(ranks), views, most_bytes)
    source = ray.put(stream)
    tasks = [partial(_read, source, part, ramp=number == 0) for number, part in enumerate(_parts(plan, segments))]
    # Ray Data divides half of the limit between the stages, and the readers need little of theirs.
    with one_row_blocks(most_bytes=2 * num_chunks * stream.chunk_bytes):
        dataset = ray.data.read_datasource(
            TaskSource("RunStream", tasks),
            num_cpus=0,
            compute=TaskPoolStrategy(size=max(1, min(len(tasks), _READERS))),
            override_num_blocks=max(1, len(tasks)),
            **away_from_empty_nodes(),
        )
    dataset = dataset.map_batches(
        _ChunkDecoder,
        fn_constructor_args=(views,),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=0,
        compute=ActorPoolStrategy(size=len(decoders), max_tasks_in_flight_per_actor=_CHUNKS_PER_DECODER),
        **actors_on(decoders),
    )
    if world_size == 1:  # runs in the worker's process, without a coordinator
        return [dataset.iterator()]
    iterators: list[ray.data.DataIterator] = dataset.streaming_split(len(ranks), equal=False)
    return iterators


def read_stream(iterator: ray.data.DataIterator) -> Iterator[ReadyBatch]:
    """Yield the batches of one rank's part of a run's stream; their pixels are views into the object store."""
    blocks = iterator.iter_batches(
        batch_size=None,  # type: ignore[arg-type]
        batch_format="pyarrow",
        prefetch_batches=1,
    )
    for block in blocks:
        yield from ready_batches(block)


class _ChunkDecoder:
    """Decoder of chunks, in a process that lives as long as the stream, so that its imports are paid for once."""

    def __init__(self, views: Views) -> None:
        self._views, self._buffer = views, PixelBuffer()

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Decode, augment and resize the images of one chunk."""
        header = header_of(chunk)
        return decode_chunk(chunk, self._views.at(header["epoch"], header["step"][0]), self._buffer)


@dataclass(frozen=True)
class StreamSource:
    """Data that all reading tasks of a run share, stored once in the object store."""

    plan: RunPlan
    tables: dict[str, Table | Mixture]
    groups: dict[str, tuple[RowGroup, ...]]
    world_size: int
    ranks: tuple[int, ...]
    views: Views
    most_chunk_bytes: int = _MOST_CHUNK_BYTES

    @property
    def chunk_bytes(self) -> int:
        """Approximate upper bound of the size of a decoded chunk, in bytes."""
        return max(self._image_bytes, min(_MOST_IMAGES * self._image_bytes, self.most_chunk_bytes)) + 2**20

    def mixes(self, segment: Segment) -> bool:
        """Return True if images of a segment are mixed with partners."""
        return segment.kind == "train" and self.views.at(segment.epoch, segment.first).mixes(segment.epoch)

    def images_per_chunk(self, segment: Segment) -> int:
        """Return the number of images of a chunk, limited by their pixels and by their encoded size."""
        mixes = self.mixes(segment)
        groups = self.groups[segment.kind]
        encoded = sum(group.num_bytes for group in groups) / max(1, sum(group.num_rows for group in groups))
        limits = (
            self.most_chunk_bytes / self._image_bytes,
            _MOST_ENCODED_BYTES / max(encoded * (5 if mixes else 1), 1.0),
        )
        return max(1, min(_MOST_IMAGES, *(int(limit) for limit in limits)))

    @property
    def _image_bytes(self) -> int:
        view = self.views.first  # all resize to the same sizes
        return max(3 * rule.most_pixels() for rule in (view.resize_rule, *view.step_resize_rules))


def _parts(plan: RunPlan, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Yield the segments in groups, each large enough to be worth a task."""
    part: list[Segment] = []
    num_images = 0
    for segment in segments:
        part.append(segment)
        num_images += (
            plan.num_validated if segment.kind == "validate" else (segment.last - segment.first) * plan.batch_size
        )
        if num_images >= _IMAGES_PER_READ_TASK:
            yield part
            part, num_images = [], 0
    if part:
        yield part


def _read(source_ref: "ray.ObjectRef[StreamSource]", segments: Sequence[Segment], *, ramp: bool) -> Iterator[pa.Table]:
    source: StreamSource = ray.get(source_ref)
    for number, segment in enumerate(segments):
        yield from read_segment(source, segment, ramp=ramp and number == 0)
    pa.default_memory_pool().release_unused()  # the process lives on, and the next reader may be another


def read_segment(source: StreamSource, segment: Segment, *, ramp: bool = False) -> Iterator[pa.Table]:
    """Yield the encoded chunks of a segment, reading row groups ahead."""
    plan = source.plan
    mixes = source.mixes(segment)
    most_images = source.images_per_chunk(segment)
    chunks = plan.chunks(segment, source.world_size, ranks=source.ranks, most_images=most_images, ramp=ramp)
    with _TableRows(source.tables[segment.kind], source.groups[segment.kind]) as rows:
        for chunk in chunks:
            numbers = [row for micro_batch in chunk for row in micro_batch.rows]
            if segment.kind == "validate":  # rows are read in order, so earlier row groups are no longer needed
                rows.keep_from(min(numbers, default=0))
            mosaics: list[Sequence[int]] = [()] * len(numbers)
            mixups = mosaics
            if mixes:
                partners = [
                    plan.partner_rows(segment.epoch, micro_batch.step, row)
                    for micro_batch in chunk
                    for row in micro_batch.rows
                ]
                mosaics, mixups = [one.mosaic for one in partners], [one.mixup for one in partners]
            repetitions = pa.array(rows.repetitions_of(numbers))
            columns = [*rows.take(numbers).flatten(), repetitions, rows.take_lists(mosaics), rows.take_lists(mixups)]
            yield encoded_chunk(chunk, pa.StructArray.from_arrays(columns, fields=list(ENCODED_TYPE)))


class _TableRows:
    """The rows of a table by number, as in `MicroBatch.rows`.

    Row groups are read when first needed, several at a time, by threads.
    """

    def __init__(self, table: Table | Mixture, groups: Sequence[RowGroup]) -> None:
        self._table, self._groups = table, groups
        self._first_rows = np.cumsum([0, *(group.num_rows for group in groups)])
        self._num_rows = max(1, int(self._first_rows[-1]))
        self._loaded: dict[int, Future[pa.StructArray]] = {}

    def __enter__(self) -> "_TableRows":
        self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read")
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def keep_from(self, row: int) -> None:
        """Free the memory of all row groups before the one of this row."""
        first = int(self._groups_of([row])[0]) if self._groups else 0
        self._loaded = {number: rows for number, rows in self._loaded.items() if number >= first}

    def repetitions_of(self, numbers: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return how often the epoch has shown each of these rows before."""
        return np.asarray(numbers, np.int64) // self._num_rows

    def take(self, numbers: Sequence[int]) -> pa.StructArray:
        """Return the rows with these numbers, in this order, as an array of `ROW_TYPE`."""
        if not len(numbers):
            return pa.array([], ROW_TYPE)
        rows = np.asarray(numbers) % self._num_rows
        groups = self._groups_of(rows)
        distinct = np.unique(groups).tolist()
        for group in distinct:
            if group not in self._loaded:
                self._loaded[group] = self._pool.submit(read_images, self._table, self._groups[group])
        places = rows - self._first_rows[groups]
        taken = [self._loaded[group].result().take(pa.array(places[groups == group])) for group in distinct]
        if len(distinct) == 1:
            return taken[0]
        return pa.concat_arrays(taken).take(pa.array(np.argsort(np.argsort(groups, kind="stable"))))

    def take_lists(self, lists: Sequence[Sequence[int]]) -> pa.ListArray:
        """Return several lists of rows as an array of lists of `ROW_TYPE`."""
        offsets = np.cumsum([0, *(len(numbers) for numbers in lists)])
        return pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), self.take([number for numbers in lists for number in numbers])
        )

    def _groups_of(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._first_rows, rows, side="right") - 1
