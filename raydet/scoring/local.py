"""A scoring run in this process: threads decode while the model runs."""

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import psutil

from raydet.cluster.job_record import JobRecord, NodeKind, versions
from raydet.common.allocator import keeping_freed_memory
from raydet.common.console import Console
from raydet.common.signals import ending_on_sigterm
from raydet.common.threads import available_cpus, in_order
from raydet.config import PredictConfig
from raydet.engines.loading import EngineLoader, device_here
from raydet.scoring.blocks import blocks_of
from raydet.scoring.chunks import ChunkScorer
from raydet.scoring.plan import ChunkStats, Work
from raydet.scoring.recovery import Losses

_MOST_DECODE_THREADS = 16
"""More would fill the memory with blocks, and the GIL would not let them decode faster."""


class ThisProcess:
    """This process as the place of a scoring run.

    Attributes:
        losses: Errors after which another attempt follows.
        device: cpu or cuda.
        num_threads: Compute threads of the model.
        num_decode_threads: Threads that decode.
    """

    losses = Losses()

    def __init__(self, config: PredictConfig) -> None:
        """Choose the device.

        Raises:
            UserError: The config requires a GPU that torch does not see, or a precision that needs one.
        """
        self.device = device_here(use_gpu=config.use_gpu, precision=config.precision, engine=config.engine)
        self.num_threads = config.threads_per_worker or available_cpus()
        self.num_decode_threads = min(available_cpus(), _MOST_DECODE_THREADS)

    def attempt(self, work: Work, chunks: Sequence[int]) -> Iterator[ChunkStats]:
        """Score chunks and yield the statistics of each file once it is written, in any order."""
        scorer = ChunkScorer(work, device=self.device, num_threads=self.num_threads)

        def score(chunk: int) -> ChunkStats:
            return scorer.score(chunk, blocks_of(work, work.plan.rows_of(chunk), scorer.rule.result()))

        # One thread more than decode, since one is usually writing its file or waiting for the model.
        pool = ThreadPoolExecutor(min(len(chunks), self.num_decode_threads + 1), thread_name_prefix="chunk")
        try:
            for future in as_completed([pool.submit(score, chunk) for chunk in chunks]):
                yield future.result()
        finally:
            scorer.close()
            pool.shutdown(wait=False, cancel_futures=True)

    def apply(self, write: Callable[[int], ChunkStats], chunks: Sequence[int]) -> Iterator[ChunkStats]:
        """Write chunks with a function that needs no model, and yield the statistics of each file."""
        return in_order(write, chunks, num_threads=available_cpus())

    def prepare_again(self, reason: str) -> str:
        """Return a line for the terminal about another attempt."""
        return f"scoring failed ({reason}); trying again"

    def best_batch_size(self, config: PredictConfig, load: EngineLoader) -> int:
        """Measure the fastest batch size."""
        from raydet.engines.batch_size import best_batch_size

        return best_batch_size(load(config, device=self.device, num_threads=self.num_threads))

    def job_record(self) -> JobRecord:
        """Build the record of a job that runs on this machine without Ray."""
        memory_gb = round(psutil.virtual_memory().total / 2**30)
        return JobRecord(
            ray_job_id="",
            submission_id=None,
            commit=None,
            started=datetime.datetime.now().astimezone().isoformat(timespec="microseconds"),
            num_workers=1,
            use_gpu=self.device == "cuda",
            num_nodes=1,
            nodes=[NodeKind(1, available_cpus(), float(self.device == "cuda"), None, memory_gb)],
            versions=versions(),
        )

    def with_joined_nodes(self, record: JobRecord) -> JobRecord:
        """Return the record unchanged: this machine is the only node."""
        return record


@contextlib.contextmanager
def this_process(config: PredictConfig, console: Console) -> Iterator[ThisProcess]:
    """Context manager: score in this process while the block runs; SIGTERM ends it.

    Afterwards torch has as many threads as before.
    """
    with ending_on_sigterm():
        console.line("few images: scoring in this process, without Ray; loading the model")
        import torch

        here, num_threads_before = ThisProcess(config), torch.get_num_threads()
        try:
            with keeping_freed_memory() if here.device == "cpu" else contextlib.nullcontext():
                yield here
        finally:
            torch.set_num_threads(num_threads_before)
