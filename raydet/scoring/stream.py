"""Scoring on a Ray cluster: decode actors → blocks in the object store → scoring actors → files.

The driver hands chunks to scoring actors, as many at a time as their decoders can work on. Each scoring actor has
decoders of its own, on its node and on nodes without a model. A decoder keeps the input of a chunk open and returns it
block by block, one block ahead of the model. Plain actors, because the blocks of a chunk must meet in one place to
become one file, and because nothing but chunk numbers and statistics ever reaches the driver.
"""

import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydet.cluster import job_metrics
from raydet.cluster.ray_internals import alive_nodes
from raydet.cluster.shares import Resources, decoders_of, workers_that_fit
from raydet.cluster.stopwatch import FileStats, ProcessStats
from raydet.cluster.worker_log import log_from_here
from raydet.common.threads import available_cpus
from raydet.config import PredictConfig
from raydet.models.geometry import ResizeRule
from raydet.scoring.blocks import blocks_of
from raydet.scoring.chunks import ChunkScorer
from raydet.scoring.plan import LOG_FOLDER, Work, missing_here
from raydet.tables import storage

_LOOK_AT_NODES_EVERY_S = 5.0
_TRIES = 3
_MOST_CHUNKS = 64
"""Maximum number of chunks that a scoring actor works on at the same time."""
_THREADS_PER_DECODER = 4
"""Python's lock limits a process with more threads."""
_LOG = logging.getLogger(__name__)

_Block = tuple[pa.Table, ProcessStats]
_WorkRef = list["ray.ObjectRef[Work]"]
"""In a list, so that the actor fetches the work itself and a failed fetch is its error."""


class NodeLostError(ConnectionError):
    """A node was lost and the remaining nodes cannot hold all workers, so that some would wait forever."""


@dataclass(frozen=True)
class DecoderPlace:
    """Threads that decode on a node for one scoring actor; `node_id` None is the actor's own node."""

    node_id: str | None
    num_threads: int


class Decoder:
    """A process that reads, decodes and resizes, in several threads, a chunk in each."""

    def __init__(self, work_ref: _WorkRef, num_threads: int) -> None:
        self._work: Work = ray.get(work_ref[0])
        log_from_here(storage.join(self._work.config.out, LOG_FOLDER))
        _require_paths(self._work)
        import torch
        import torchvision.transforms.v2  # noqa: F401 - takes seconds, which would count as work on the first images

        torch.set_num_threads(1)  # of each of the threads
        self._open: dict[int, Iterator[_Block]] = {}
        _LOG.info("decoding in %d threads", num_threads)

    def decode(self, start: int, stop: int, rule: ResizeRule | None) -> _Block:
        """Return the block of a chunk that starts at a position.

        Args:
            start: Position of the first image.
            stop: Position after the last image of the chunk.
            rule: Resize rule of the model.
        """
        blocks = self._open.pop(start, None) or blocks_of(self._work, range(start, stop), rule)
        block, stats = next(blocks)
        if start + block.num_rows < stop:
            self._open[start + block.num_rows] = blocks
        job_metrics.count_stage(stats, block.num_rows)
        return block, stats


class _Decoders:
    """The decoders of a scoring actor; its threads share them."""

    def __init__(self, work_ref: _WorkRef, places: Sequence[DecoderPlace]) -> None:
        self._work_ref = work_ref
        self._own_node = ray.get_runtime_context().get_node_id()
        self._free: queue.SimpleQueue[tuple[Any, DecoderPlace]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._replacements: dict[Any, tuple[Any, DecoderPlace]] = {}
        decoders = [(self._start(place), place) for place in places]
        for decoder, place in decoders:
            for _ in range(place.num_threads):
                self._free.put((decoder, place))
        # One more than decode, since one is usually about to write its file or to wait for the model.
        self._free.put(decoders[0])
        self.num_slots = min(sum(place.num_threads for place in places) + 1, _MOST_CHUNKS)

    def _start(self, place: DecoderPlace) -> Any:
        # A decoder waits as soon as its consumer has enough, so it needs no CPU of its own and never waits for one.
        actor = ray.remote(Decoder).options(
            num_cpus=0,
            max_concurrency=place.num_threads,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id or self._own_node, soft=True),
        )
        return actor.remote(self._work_ref, place.num_threads)

    def blocks(self, rows: range, rule: ResizeRule | None) -> Iterator[_Block]:
        """Yield the blocks of a chunk in order, while a decoder works on the next one."""
        position, tries = rows.start, 0
        decoder, place = self._free.get()
        try:
            upcoming = decoder.decode.remote(position, rows.stop, rule)
            while position < rows.stop:
                try:
                    block, stats = ray.get(upcoming)
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    tries += 1
                    if tries == _TRIES:
                        raise
                    if isinstance(error, ray.exceptions.RayActorError):
                        decoder, place = self._replaced(decoder)
                    upcoming = decoder.decode.remote(position, rows.stop, rule)
                    continue
                position, tries = position + block.num_rows, 0
                if position < rows.stop:
                    upcoming = decoder.decode.remote(position, rows.stop, rule)
                yield block, stats
        finally:
            self._free.put((decoder, place))

    def _replaced(self, dead: Any) -> tuple[Any, DecoderPlace]:
        """Return the replacement of a decoder that died, on this node, which sees the input for certain."""
        with self._lock:
            if dead not in self._replacements:
                place = DecoderPlace(None, 1)
                self._replacements[dead] = (self._start(place), place)
            return self._replacements[dead]


class ScoringActor:
    """A copy of the model with its decoders."""

    def __init__(
        self, work_ref: _WorkRef, resources: Resources, num_workers: int, remote_places: Sequence[DecoderPlace]
    ) -> None:
        work: Work = ray.get(work_ref[0])
        log_from_here(storage.join(work.config.out, LOG_FOLDER))
        _require_paths(work)
        self._work = work
        self._decoders = _Decoders(work_ref, [*_own_places(resources, num_workers), *remote_places])
        has_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        num_threads = threads_of(work.config, resources)
        self._scorer = ChunkScorer(work, device="cuda" if has_gpu else "cpu", num_threads=num_threads)

    def num_slots(self) -> int:
        """Return the number of chunks that this actor scores at the same time."""
        return self._decoders.num_slots

    def score(self, chunk: int) -> FileStats:
        """Score a chunk and write its file."""
        rows = self._work.plan.rows_of(chunk)
        stats = self._scorer.score(chunk, self._decoders.blocks(rows, self._scorer.rule.result()))
        for item in stats.processes:
            if item.kind != "decoder":
                job_metrics.count_stage(item, stats.num_images if item.kind == "writer" else 0)
        job_metrics.count_written(len(stats.errors), stats.num_detections)
        return stats


def threads_of(config: PredictConfig, resources: Resources) -> int:
    """Return the compute threads of one copy of the model: `threads_per_worker`, or this machine's CPUs divided.

    By default the machine's CPUs are divided evenly between the workers that fit on it.
    """
    num_cpus = available_cpus()
    num_here = max(1, min(config.num_workers, int(num_cpus / resources.cpus_per_worker)))
    return config.threads_per_worker or max(1, num_cpus // num_here)


def _require_paths(work: Work) -> None:
    missing = missing_here(work)
    if missing:  # otherwise every image would count as a deleted file
        raise ConnectionError(f"{missing} is missing on {socket.gethostname()}")


def _capacity(node: dict[str, float], resources: Resources) -> int:
    """Return the number of workers that fit on a node."""
    by_cpus = int(node.get("CPU", 0.0) / resources.cpus_per_worker + 1e-9)
    return min(by_cpus, int(node.get("GPU", 0.0))) if resources.use_gpu else by_cpus


def _own_places(resources: Resources, num_workers: int) -> list[DecoderPlace]:
    """Return the decoders of this scoring actor on its own node, which it shares with as many others as fit."""
    own_node = ray.get_runtime_context().get_node_id()
    node = next(node["Resources"] for node in alive_nodes() if node["NodeID"] == own_node)
    num_here = max(1, min(num_workers, _capacity(node, resources)))
    (num_threads,) = decoders_of([node], workers=[num_here], cpus_per_worker=resources.cpus_per_worker)
    return _places(None, max(1, num_threads // num_here))


def _places(node_id: str | None, num_threads: int) -> list[DecoderPlace]:
    whole, rest = divmod(num_threads, _THREADS_PER_DECODER)
    sizes = [_THREADS_PER_DECODER] * whole + ([rest] if rest else [])
    return [DecoderPlace(node_id, size) for size in sizes]


def remote_places(nodes: Sequence[dict[str, Any]], resources: Resources, num_workers: int) -> list[list[DecoderPlace]]:
    """Divide the decoders on nodes that hold no model between the scoring actors.

    Args:
        nodes: Live nodes.
        resources: Resources of each worker.
        num_workers: Number of workers.

    Returns:
        The decoders of each worker, in addition to those on its own node.
    """
    left, spare = num_workers, []
    # Ray places workers on nodes with GPUs if they need one, otherwise anywhere; large nodes first is a fair guess.
    for node in sorted(nodes, key=lambda node: -_capacity(node["Resources"], resources)):
        num_here = min(left, _capacity(node["Resources"], resources))
        left -= num_here
        if not num_here:
            (num_threads,) = decoders_of([node["Resources"]], workers=[0], cpus_per_worker=resources.cpus_per_worker)
            spare += _places(node["NodeID"], num_threads)
    return [spare[number::num_workers] for number in range(num_workers)]


def score(work: Work, chunks: Sequence[int], resources: Resources, *, num_workers: int) -> Iterator[FileStats]:
    """Score chunks of a run and yield the statistics of each file once it is written, in any order.

    Args:
        work: Shared data of the run.
        chunks: Chunks to score.
        resources: Resources of each worker.
        num_workers: Copies of the model.

    Raises:
        NodeLostError: The cluster has become too small for this number of workers.
        ray.exceptions.RayError: A chunk failed, or Ray could not recover from a loss.
    """
    scorers = _Scorers([ray.put(work)], resources, num_workers)
    try:
        yield from scorers.score(chunks)
    finally:
        scorers.kill()


class _Scorers:
    """The scoring actors of a run, and what each of them is doing."""

    def __init__(self, work_ref: _WorkRef, resources: Resources, num_workers: int) -> None:
        self._work_ref, self._resources, self._num_workers = work_ref, resources, num_workers
        self._watch = _NodeWatch(resources, num_workers)
        self._calls: dict[ray.ObjectRef[Any], tuple[Any, int | None]] = {}
        self._alive: dict[Any, list[DecoderPlace]] = {}
        for places in remote_places(alive_nodes(), resources, num_workers):
            self._start(places)

    def _start(self, places: list[DecoderPlace]) -> None:
        actor: Any = (
            ray.remote(ScoringActor)
            .options(
                num_cpus=self._resources.cpus_per_worker,
                num_gpus=1 if self._resources.use_gpu else 0,
                # Each chunk blocks a thread until its file is written.
                max_concurrency=_MOST_CHUNKS,
            )
            .remote(self._work_ref, self._resources, self._num_workers, places)
        )
        self._alive[actor] = places
        self._calls[actor.num_slots.remote()] = (actor, None)

    def score(self, chunks: Sequence[int]) -> Iterator[FileStats]:
        waiting, num_left = deque(chunks), len(chunks)
        tries: dict[int, int] = {}
        while num_left:
            done, _ = ray.wait(list(self._calls), timeout=_LOOK_AT_NODES_EVERY_S)
            if done:
                done, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
            self._watch.look()
            for call in done:
                actor, chunk = self._calls.pop(call)
                num_free = 1
                try:
                    result = ray.get(call)
                except ray.exceptions.RayTaskError:  # even if its cause is the loss of decoders
                    raise
                except ray.exceptions.RayActorError:
                    if chunk is not None:
                        tries[chunk] = tries.get(chunk, 0) + 1
                        waiting.appendleft(chunk)
                    if chunk is None or tries[chunk] == _TRIES:
                        raise
                    if actor in self._alive:
                        self._start(self._alive.pop(actor))
                    continue
                if chunk is None:
                    num_free = result
                else:
                    num_left -= 1
                    yield result
                for _ in range(min(num_free, len(waiting))):
                    upcoming = waiting.popleft()
                    self._calls[actor.score.remote(upcoming)] = (actor, upcoming)

    def kill(self) -> None:
        """End all actors; their decoders end with them."""
        for actor in self._alive:
            ray.kill(actor)


class _NodeWatch:
    """Check for lost nodes; an actor that no longer fits anywhere would wait forever."""

    def __init__(self, resources: Resources, num_workers: int) -> None:
        self._resources, self._num_workers = resources, num_workers
        self._num_nodes, self._next_look_s = 0, 0.0

    def look(self) -> None:
        """Look at the nodes every few seconds.

        Raises:
            NodeLostError: See the class.
        """
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + _LOOK_AT_NODES_EVERY_S
        num_nodes = len(alive_nodes())
        if num_nodes < self._num_nodes and workers_that_fit(self._resources) < self._num_workers:
            raise NodeLostError(f"{self._num_nodes - num_nodes} of {self._num_nodes} nodes lost")
        self._num_nodes = max(num_nodes, self._num_nodes)
