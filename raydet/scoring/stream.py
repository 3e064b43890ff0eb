"""Scoring on a Ray cluster: decode actors → blocks in the object store → scoring actors → files.

The driver hands chunks to scoring actors, as many at a time as their decoders can work on. Each scoring actor has
decoders of its own, on its node and on nodes without a model. A decoder keeps the input of a chunk open and returns it
block by block, one block ahead of the model. These are plain actors, because the blocks of a chunk must meet in one
place to become one file; nothing but chunk numbers and statistics ever reaches the driver.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from raydet.cluster import job_metrics
from raydet.cluster.ray_internals import alive_nodes
from raydet.cluster.shares import Resources, decoders_of, workers_that_fit
from raydet.cluster.tasks import has_gpu
from raydet.cluster.worker_log import log_from_here
from raydet.common.allocator import ONE_HEAP, keep_freed_memory
from raydet.common.threads import available_cpus
from raydet.config import CropsConfig, PredictConfig
from raydet.scoring.chunks import ChunkScorer
from raydet.scoring.decoders import DecoderPlace, Decoders, WorkRef, own_node_id, places_on, require_paths
from raydet.scoring.plan import LOG_FOLDER, ChunkStats, Work
from raydet.tables import storage

_LOOK_AT_NODES_EVERY_S = 5.0
_TRIES = 3
_MOST_CHUNKS = 64
"""Maximum number of chunks that a scoring actor works on at the same time."""


class NodeLostError(ConnectionError):
    """Loss of a node after which the remaining nodes cannot hold all workers, so that some would wait forever."""


@dataclass(frozen=True)
class Started:
    """Answer of a scoring actor that has started: its node, and the number of chunks that it can take."""

    node_id: str
    num_chunks: int


class ScoringActor:
    """A copy of the model with its decoders."""

    def __init__(self, work_ref: WorkRef, resources: Resources, num_workers: int) -> None:
        is_on_gpu = has_gpu()
        if not is_on_gpu:
            keep_freed_memory(one_heap=True)
        work: Work = ray.get(work_ref[0])
        log_from_here(storage.join(work.config.out, LOG_FOLDER))
        require_paths(work)
        self._work = work
        self._places = _own_places(resources, num_workers)
        self._decoders = Decoders(work_ref, self._places)
        num_threads = threads_of(work.config, resources)
        self._scorer = ChunkScorer(work, device="cuda" if is_on_gpu else "cpu", num_threads=num_threads)

    def start(self) -> Started:
        """Return the node of this actor, and the number of chunks that it can work on."""
        return Started(own_node_id(), sum(place.num_threads for place in self._places) + 1)

    def add_decoders(self, places: Sequence[DecoderPlace]) -> Started:
        """Start further decoders, and return the number of additional chunks."""
        self._decoders.add(places)
        return Started(own_node_id(), sum(place.num_threads for place in places))

    def score(self, chunk: int) -> ChunkStats:
        """Score a chunk and write its file."""
        rows = self._work.plan.rows_of(chunk)
        stats = self._scorer.score(chunk, self._decoders.blocks(rows, self._scorer.rule.result()))
        num_images = dict.fromkeys(("model", "writer"), stats.num_images)
        for item in stats.processes:
            if item.kind != "decoder":  # decoders count for themselves
                job_metrics.count_stage(item, num_images.pop(item.kind, 0))
        job_metrics.count_written(len(stats.errors), stats.num_detections)
        return stats


def threads_of(config: PredictConfig | CropsConfig, resources: Resources) -> int:
    """Return the number of compute threads of one copy of the model: `threads_per_worker`, or its default.

    By default the machine's CPUs are divided evenly between the workers that fit on it.
    """
    num_cpus = available_cpus()
    num_here = max(1, min(config.num_workers, int(num_cpus / resources.cpus_per_worker)))
    return config.threads_per_worker or max(1, num_cpus // num_here)


def _own_places(resources: Resources, num_workers: int) -> list[DecoderPlace]:
    """Return the decoders of this scoring actor on its own node, which it shares with as many others as fit."""
    own_node = own_node_id()
    node = next(node["Resources"] for node in alive_nodes() if node["NodeID"] == own_node)
    fitting = int(node.get("CPU", 0.0) / resources.cpus_per_worker + 1e-9)
    if resources.use_gpu:
        fitting = min(fitting, int(node.get("GPU", 0.0)))
    num_here = max(1, min(num_workers, fitting))
    (num_threads,) = decoders_of([node], workers=[num_here], cpus_per_worker=resources.cpus_per_worker)
    return places_on(own_node, max(1, num_threads // num_here))


def score(work: Work, chunks: Sequence[int], resources: Resources, *, num_workers: int) -> Iterator[ChunkStats]:
    """Score chunks of a run and yield the statistics of each file once it is written, in any order.

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

    def __init__(self, work_ref: WorkRef, resources: Resources, num_workers: int) -> None:
        self._work_ref, self._resources, self._num_workers = work_ref, resources, num_workers
        self._watch = _NodeWatch(resources, num_workers)
        self._calls: dict[ray.ObjectRef[Any], tuple[Any, int | None]] = {}
        self._actors: dict[Any, str | None] = {}
        """Scoring actors, and the node of each that has started."""
        self._helpers: dict[str, list[Any]] = {}
        """Nodes without a model, and the scoring actors for which they decode."""
        for _ in range(num_workers):
            self._start()

    def _start(self) -> None:
        actor: Any = ray.remote(ScoringActor).options(
            num_cpus=self._resources.cpus_per_worker,
            num_gpus=1 if self._resources.use_gpu else 0,
            # Each chunk blocks a thread until its file is written.
            max_concurrency=_MOST_CHUNKS,
            # The model runs in a thread, and Ray has started others before.
            runtime_env={} if self._resources.use_gpu else {"env_vars": ONE_HEAP},
        )
        actor = actor.remote(self._work_ref, self._resources, self._num_workers)
        self._actors[actor] = None
        self._calls[actor.start.remote()] = (actor, None)

    def score(self, chunks: Sequence[int]) -> Iterator[ChunkStats]:
        waiting, num_left = deque(chunks), len(chunks)
        tries: dict[int, int] = {}
        while num_left:
            for call in self._done():
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
                    self._replace(actor)
                    continue
                if isinstance(result, Started):
                    self._actors[actor] = result.node_id
                    num_free = result.num_chunks
                else:
                    num_left -= 1
                    yield result
                for _ in range(min(num_free, len(waiting))):
                    upcoming = waiting.popleft()
                    self._calls[actor.score.remote(upcoming)] = (actor, upcoming)
            self._use_other_nodes()

    def _done(self) -> "list[ray.ObjectRef[Any]]":
        """Wait for a call to finish, a few seconds at most, and return all that have."""
        calls = list(self._calls)
        done, _ = ray.wait(calls, timeout=_LOOK_AT_NODES_EVERY_S)
        if done:
            done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        self._watch.look()
        return done

    def _replace(self, dead: Any) -> None:
        if dead in self._actors:
            del self._actors[dead]
            self._helpers = {node: actors for node, actors in self._helpers.items() if dead not in actors}
            self._start()

    def _use_other_nodes(self) -> None:
        """Once all models have a node, start decoders on the nodes without a model, including those that join later."""
        hosts = list(self._actors.values())
        if None in hosts:
            return
        for node in self._watch.nodes:
            if node["NodeID"] in hosts or node["NodeID"] in self._helpers:
                continue
            cpus_per_worker = self._resources.cpus_per_worker
            (num_threads,) = decoders_of([node["Resources"]], workers=[0], cpus_per_worker=cpus_per_worker)
            # The actors with the fewest helpers first.
            actors = sorted(self._actors, key=lambda actor: sum(actor in used for used in self._helpers.values()))
            self._helpers[node["NodeID"]] = []
            for actor, place in zip(itertools.cycle(actors), places_on(node["NodeID"], num_threads), strict=False):
                self._helpers[node["NodeID"]].append(actor)
                self._calls[actor.add_decoders.remote([place])] = (actor, None)

    def kill(self) -> None:
        """End all actors; their decoders end with them."""
        for actor in self._actors:
            ray.kill(actor)


class _NodeWatch:
    """Check for lost nodes; an actor that no longer fits anywhere would wait forever.

    Attributes:
        nodes: The live nodes at the last check.
    """

    def __init__(self, resources: Resources, num_workers: int) -> None:
        self._resources, self._num_workers = resources, num_workers
        self._most_nodes, self._next_look_s = 0, 0.0
        self.nodes: list[dict[str, Any]] = []
        self.look()

    def look(self) -> None:
        """Check the nodes, at most once every few seconds.

        Raises:
            NodeLostError: See the class.
        """
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + _LOOK_AT_NODES_EVERY_S
        self.nodes = alive_nodes()
        num_lost = self._most_nodes - len(self.nodes)
        if num_lost > 0 and workers_that_fit(self._resources) < self._num_workers:
            raise NodeLostError(f"{num_lost} of {self._most_nodes} nodes lost")
        self._most_nodes = max(self._most_nodes, len(self.nodes))
