"""A crops run on a Ray cluster: each actor has a copy of the model, and decodes the next chunk while it runs."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from raydet.cluster import session, shares
from raydet.cluster.shared_storage import check_shared
from raydet.cluster.tasks import LostTaskError, fetched, has_gpu, run_on_actors, shared, start_actor
from raydet.common.console import Console
from raydet.common.errors import RunError
from raydet.config import CropsConfig
from raydet.engines.engine import no_fp16_on_cpu
from raydet.scoring.distributed import shared_inputs
from raydet.scoring.plan import LOG_FOLDER
from raydet.scoring.stream import threads_of
from raydet.second_looks.models.looker import Looker, Pixels
from raydet.second_looks.work import CropsWork
from raydet.second_looks.writing import WrittenChunk, write_chunk
from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME

_CHUNKS_AT_ONCE = 2
"""One runs while the next is decoded."""


class Actors:
    """The connected cluster as the place of a crops run."""

    def __init__(self, config: CropsConfig, resources: shares.Resources) -> None:
        self._config, self._resources = config, resources

    def run(self, work: CropsWork, chunks: Sequence[int]) -> Iterator[WrittenChunk]:
        """Write the files of chunks, in any order.

        Raises:
            RunError: A worker failed, or was lost more often than `max_failures`.
        """
        reference = shared(work)
        actors = [
            start_actor(
                _CropsActor,
                [reference],
                self._resources,
                cpus=self._resources.cpus_per_worker,
                gpus=int(self._resources.use_gpu),
                calls_at_once=_CHUNKS_AT_ONCE,
                max_failures=self._config.max_failures,
            )
            for _ in range(min(self._config.num_workers, len(chunks)))
        ]
        try:
            yield from run_on_actors([actor.write for actor in actors], chunks, calls_at_once=_CHUNKS_AT_ONCE)
        except LostTaskError as error:
            limit = f"--max-failures {self._config.max_failures}"
            raise RunError(
                f"a worker was lost more than {limit} times ({error.reason}); run the same command again to resume"
            ) from error


@contextlib.contextmanager
def connected(config: CropsConfig, console: Console) -> Iterator[Actors]:
    """Context manager: connect to the cluster, or start one, and check that its nodes see what they need."""
    log_folder = storage.join(config.out, LOG_FOLDER)
    with session.session(log_folder):
        resources = shares.share_out(
            min_workers=config.num_workers,
            max_workers=config.num_workers,
            use_gpu=config.use_gpu,
            cpus_per_worker=config.cpus_per_worker,
        )
        console.line(resources.describe(config.num_workers, config.num_workers))
        if resources.use_gpu is False and config.precision == "fp16":
            raise no_fp16_on_cpu()
        reads = shared_inputs(config.data, {"--model": config.model})
        reads["--detections"] = (config.detections, storage.join(config.detections, MANIFEST_NAME))
        check_shared(reads=reads, writes=(config.out, log_folder))
        yield Actors(config, resources)


class _CropsActor:
    """A copy of the model."""

    def __init__(self, work_ref: list[Any], resources: shares.Resources) -> None:
        self._work: CropsWork = fetched(work_ref[0])
        config = self._work.config
        self._num_threads = threads_of(config, resources)
        self._looker = _OnFirstUse(config, "cuda" if has_gpu() else "cpu", self._num_threads)

    def write(self, chunk: int) -> WrittenChunk:
        """Write the file of a chunk."""
        return write_chunk(self._work, self._looker, chunk, num_threads=self._num_threads)


class _OnFirstUse:
    """A model for several threads, loaded when a chunk needs it, so that its faults are errors of a call."""

    def __init__(self, config: CropsConfig, device: str, num_threads: int) -> None:
        self._config, self._device, self._num_threads = config, device, num_threads
        self._looker: Looker | None = None
        self._lock = threading.Lock()

    def look(self, crops: Sequence[Pixels]) -> list[dict[str, Any]]:
        """See `Looker.look`."""
        from raydet.second_looks.models.loading import load_looker

        with self._lock:
            if self._looker is None:
                self._looker = load_looker(self._config, device=self._device, num_threads=self._num_threads)
            return self._looker.look(crops)
