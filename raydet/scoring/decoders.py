"""Decode actors on a Ray cluster, and the part of a scoring actor that uses them."""

import logging
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydet.cluster import job_metrics
from raydet.cluster.stopwatch import ProcessStats
from raydet.cluster.worker_log import log_from_here
from raydet.images.listing import is_pattern
from raydet.models.geometry import ResizeRule
from raydet.scoring.blocks import blocks_of
from raydet.scoring.plan import LOG_FOLDER, Work
from raydet.tables import storage
from raydet.tables.output_folder import RUN_FILE

_TRIES = 3
_THREADS_PER_DECODER = 4
"""With more threads, the GIL would limit the process."""
_LOG = logging.getLogger(__name__)

_Block = tuple[pa.Table, ProcessStats]
WorkRef = list["ray.ObjectRef[Work]"]
"""In a list, so that the actor fetches the work itself and a failed fetch is its error."""


@dataclass(frozen=True)
class DecoderPlace:
    """The place of a decoder: its node and the number of its threads."""

    node_id: str
    num_threads: int


class Decoder:
    """A process that reads, decodes and resizes images in several threads, with one chunk per thread."""

    def __init__(self, work_ref: WorkRef, num_threads: int) -> None:
        self._work: Work = ray.get(work_ref[0])
        log_from_here(storage.join(self._work.config.out, LOG_FOLDER))
        require_paths(self._work)
        import torch

        torch.set_num_threads(1)  # in each thread
        self._open: dict[int, Iterator[_Block]] = {}
        _LOG.info("decoding in %d threads", num_threads)

    def decode(self, start: int, stop: int, rule: ResizeRule | None) -> _Block:
        """Return the block that starts at a position; `stop` is the position after the last image of the chunk."""
        blocks = self._open.pop(start, None) or blocks_of(self._work, range(start, stop), rule)
        block, stats = next(blocks)
        if start + block.num_rows < stop:
            self._open[start + block.num_rows] = blocks
        job_metrics.count_stage(stats, block.num_rows)
        return block, stats


class Decoders:
    """The decoders of a scoring actor; its threads share them."""

    def __init__(self, work_ref: WorkRef, places: Sequence[DecoderPlace]) -> None:
        self._work_ref = work_ref
        self._free: queue.SimpleQueue[tuple[Any, DecoderPlace]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._replacements: dict[Any, Any] = {}
        first = self.add(places)
        # One slot more than threads, since one chunk is usually about to be written or waiting for the model.
        self._free.put(first)

    def add(self, places: Sequence[DecoderPlace]) -> tuple[Any, DecoderPlace]:
        """Start decoders, and return the first."""
        decoders = [(self._start(place), place) for place in places]
        for decoder, place in decoders:
            for _ in range(place.num_threads):
                self._free.put((decoder, place))
        return decoders[0]

    def _start(self, place: DecoderPlace) -> Any:
        # A decoder waits as soon as its consumer has enough, so it needs no CPU of its own and never waits for one.
        actor = ray.remote(Decoder).options(
            num_cpus=0,
            max_concurrency=place.num_threads,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=True),
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
                        decoder, place = self._replaced(decoder, place)
                    upcoming = decoder.decode.remote(position, rows.stop, rule)
                    continue
                position, tries = position + block.num_rows, 0
                if position < rows.stop:
                    upcoming = decoder.decode.remote(position, rows.stop, rule)
                yield block, stats
        finally:
            self._free.put((decoder, place))

    def _replaced(self, dead: Any, place: DecoderPlace) -> tuple[Any, DecoderPlace]:
        """Return the replacement of a decoder that died; it runs on this node, which is known to see the input."""
        here = DecoderPlace(own_node_id(), place.num_threads)
        with self._lock:
            if dead not in self._replacements:
                self._replacements[dead] = self._start(here)
            return self._replacements[dead], here


def require_paths(work: Work) -> None:
    """Raise ConnectionError if this machine does not see the paths of the run."""
    places = [work.folder.uri_of(RUN_FILE), *([] if is_pattern(work.config.data_uri) else [work.config.data_uri])]
    for place in places:
        if "://" not in place and not storage.exists(place):  # otherwise every image would count as a deleted file
            raise ConnectionError(f"{place} is missing on {socket.gethostname()}")


def own_node_id() -> str:
    """Return Ray's id of the node on which this process runs."""
    return str(ray.get_runtime_context().get_node_id())


def places_on(node_id: str, num_threads: int) -> list[DecoderPlace]:
    """Divide decode threads between processes."""
    whole, rest = divmod(num_threads, _THREADS_PER_DECODER)
    sizes = [_THREADS_PER_DECODER] * whole + ([rest] if rest else [])
    return [DecoderPlace(node_id, size) for size in sizes]
