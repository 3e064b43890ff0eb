"""Parallel work in threads, and the number of CPUs available to this process.

Threads pay off where the work waits for storage or releases the interpreter lock.
"""

import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

NUM_READ_THREADS = 16
"""Enough to hide the latency of remote storage."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_threads: int = NUM_READ_THREADS,
    ahead: int | None = None,
    weigh: Callable[[Result], int] | None = None,
    most: int = 0,
) -> Iterator[Result]:
    """Apply a function to each item in threads and yield the results in the order of the items.

    The consumer's thread fetches the items, one at a time. When the consumer stops early, queued items are dropped and
    running ones are awaited.

    Args:
        work: Function to apply; several threads call it concurrently.
        items: Items; may be generated lazily.
        num_threads: Number of threads.
        ahead: Maximum number of items fetched but not yet yielded (queued, running or finished), which bounds the
            memory; twice `num_threads` by default.
        weigh: Size of a result, such as its bytes; with `most`, it bounds the memory for results of any size.
        most: While finished results that are not yet yielded weigh more in total, no further item is begun.

    Raises:
        Exception: The exception of the first item for which `work` failed, raised instead of its result.
    """
    ahead = ahead or 2 * num_threads
    pending: deque[Future[Result]] = deque()
    waiting = _Load(weigh)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="in-order") as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if weigh is not None:
                    pending[-1].add_done_callback(waiting.add)
                while pending and (len(pending) >= ahead or (weigh is not None and waiting.total > most)):
                    yield waiting.taken(pending.popleft())
            while pending:
                yield waiting.taken(pending.popleft())
        finally:
            for future in pending:
                future.cancel()


class _Load(Generic[Result]):
    """Total weight of the results that wait."""

    def __init__(self, weigh: Callable[[Result], int] | None) -> None:
        self.total = 0
        self._weigh, self._lock = weigh, threading.Lock()

    def add(self, done: "Future[Result]", sign: int = 1) -> None:
        if self._weigh is not None and not done.cancelled() and done.exception() is None:
            with self._lock:
                self.total += sign * self._weigh(done.result())

    def taken(self, future: "Future[Result]") -> Result:
        result = future.result()
        self.add(future, -1)
        return result


@contextlib.contextmanager
def running_beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Context manager: run a function in a thread while the block runs.

    The event that it takes is set when the block ends; it then has ten seconds to return.
    """
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def available_cpus(*, system: Path = Path("/")) -> int:
    """Return the number of CPUs that this process may use, at least 1.

    This is the size of the CPU affinity mask, capped by the CPU quota of the control groups (Linux cgroup v1 and v2),
    which is how containers are limited. A fractional quota is rounded up.

    Args:
        system: Root folder of the file system.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, _cpu_quota(system))))


def _cpu_quota(system: Path) -> float:
    """Return the smallest CPU quota of this process's control groups and their ancestors, in CPUs."""
    quotas = [math.inf]
    for line in _words(system / "proc/self/cgroup", separator="\n"):
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = system / "sys/fs/cgroup" / controllers  # empty in v2
        if not mount.is_dir():
            mount = system / "sys/fs/cgroup/cpu"
        # In a container the group may carry the host's name; then only the mount itself exists.
        inside = Path(group.lstrip("/"))
        for folder in (mount / inside, *(mount / parent for parent in inside.parents), mount):
            limits = _words(folder / "cpu.max") or [
                *_words(folder / "cpu.cfs_quota_us"),
                *_words(folder / "cpu.cfs_period_us"),
            ]
            if len(limits) == 2 and limits[0] not in ("max", "-1"):
                quotas.append(int(limits[0]) / int(limits[1]))
    return min(quotas)


def _words(path: Path, separator: str | None = None) -> list[str]:
    try:
        return [word for word in path.read_text("utf-8").split(separator) if word]
    except OSError:
        return []
