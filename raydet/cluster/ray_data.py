"""Settings of Ray Data: each row, which is a whole batch, becomes a block of its own, and blocks keep their order."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
from ray.data import Datasource, ExecutionResources

from raydet.cluster import ray_internals
from raydet.cluster.ray_internals import BlockMetadata, DataContext, ExecutionCallback, ReadTask

SCHEDULING_PAUSE_S = 0.03
"""Short beside the decoding of a batch, long beside a turn of Ray Data's scheduling loop (2–3 ms)."""


@contextlib.contextmanager
def one_row_blocks(
    *, reserved: ExecutionResources | None = None, watch: type[ExecutionCallback] | None = None
) -> Iterator[None]:
    """Make every row of the data sets that are created inside a block of its own.

    The caller's `DataContext` is the current one again afterwards. A data set keeps the settings that it was created
    with.

    Args:
        reserved: CPUs and GPUs that others hold, so that Ray Data leaves them alone.
        watch: Called at each turn of Ray Data's scheduling loop; what it raises ends the execution.
    """
    context = DataContext.get_current().copy()
    # A block ends as soon as it is larger than this, in bytes. It is what makes the dealing out exact.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    # Else what a task raises comes wrapped, and loses its cause on the way to the driver.
    context.raise_original_map_exception = True
    context.execution_options = ray_internals.execution_options(reserved)
    ray_internals.set_callbacks(context, *([_Pace] if watch is None else [_Pace, watch]))
    with DataContext.current(context):
        yield


class _Pace(ExecutionCallback):
    """Keeps Ray Data's scheduling loop from spinning.

    While all that is decoded waits for a busy consumer the loop has nothing to wait for itself, and takes more than
    half of a CPU from those who work. Each turn of it deals with all that happened since the last.
    """

    def on_execution_step(self, executor: object) -> None:
        """Rest after each turn of the loop."""
        time.sleep(SCHEDULING_PAUSE_S)


class TaskSource(Datasource):
    """A source for Ray Data made of tasks, each of which yields blocks."""

    def __init__(self, name: str, tasks: Sequence[Callable[[], Iterator[pa.Table]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name, self._tasks = name, tasks

    def get_name(self) -> str:
        """Name for Ray's progress and dashboard."""
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: it depends on what is left to do."""
        return None

    def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> list[ReadTask]:
        """The tasks as they are, whatever the parallelism."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(task, metadata) for task in self._tasks]
