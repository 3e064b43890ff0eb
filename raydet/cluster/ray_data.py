"""Settings of Ray Data: each row, a complete batch, becomes a separate block, and blocks keep their order."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
from ray.data import Datasource

from raydet.cluster import ray_internals
from raydet.cluster.ray_internals import BlockMetadata, DataContext, ExecutionCallback, ReadTask

SCHEDULING_PAUSE_S = 0.05
"""Short compared to decoding a batch, long compared to an iteration of Ray Data's scheduling loop (2–3 ms)."""
_BLOCKS_AHEAD = 8
"""Blocks that a task may yield before Ray Data takes them, which it does a few times a second."""


@contextlib.contextmanager
def one_row_blocks(*, most_bytes: int | None = None) -> Iterator[None]:
    """Context manager: data sets created while the block runs keep every row in a separate Ray block.

    The caller's `DataContext` is restored afterwards; a data set keeps the settings that it was created with.
    `most_bytes` limits the blocks that wait in the object store, by default to half of the store.
    """
    context = DataContext.get_current().copy()
    # In bytes; every row exceeds it, so that each row ends its block and the distribution of rows is exact.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    # Otherwise a task's exception is wrapped and loses its cause on the way to the driver.
    context.raise_original_map_exception = True
    context.execution_options = ray_internals.execution_options(most_bytes)
    ray_internals.set_blocks_ahead(context, _BLOCKS_AHEAD)
    ray_internals.set_callbacks(context, _Pace)
    with DataContext.current(context):
        yield


class _Pace(ExecutionCallback):
    """Pause that keeps Ray Data's scheduling loop from spinning.

    While decoded batches wait for a busy consumer, the loop never blocks and uses more than half a CPU. Each iteration
    handles everything since the last, so a pause loses nothing.
    """

    def on_execution_step(self, executor: object) -> None:
        """Sleep after each iteration of the loop."""
        time.sleep(SCHEDULING_PAUSE_S)


class TaskSource(Datasource):
    """A Ray Data source made of tasks that yield blocks."""

    def __init__(self, name: str, tasks: Sequence[Callable[[], Iterator[pa.Table]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name, self._tasks = name, tasks

    def get_name(self) -> str:
        """Return the name for Ray's progress and dashboard."""
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the size is unknown."""
        return None

    def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> list[ReadTask]:
        """Return all tasks unchanged, regardless of the parallelism."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(task, metadata) for task in self._tasks]
