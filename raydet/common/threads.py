"""Threads: as many as this process has CPUs for, and the same work on many items side by side.

Threads pay where the work waits (for storage) or lets go of the interpreter.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

NUM_READ_THREADS = 16
"""Enough to make up for how late remote storage answers."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_threads: int = NUM_READ_THREADS,
    ahead: int | None = None,
) -> Iterator[Result]:
    """Does the same to each item in threads and yields the results in the items' order.

    Items are taken, one at a time, in the thread of the reader. When the reader stops, what has not begun is dropped,
    and what has is waited for.

    Args:
        work: What to do; several threads call it at once.
        items: Of any number; they may be made while they are read.
        num_threads: As many work at once.
        ahead: Items at most whose results have not been handed on, at work, done or waiting, which bounds the memory;
            twice `num_threads` by default.

    Raises:
        Exception: What the work raised, in place of the result of the first item for which it did.
    """
    ahead = ahead or 2 * num_threads
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="in-order") as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def available_cpus(*, system: Path = Path("/")) -> int:
    """CPUs that this process may use, at least 1.

    Those of its CPU affinity, and no more than the CPU quota of its control groups, which is how containers are
    limited (Linux, cgroup v1 and v2); a quota of a fraction is rounded up.

    Args:
        system: Root of the file system.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, _cpu_quota(system))))


def _cpu_quota(system: Path) -> float:
    """The smallest quota of this process's control groups and of those that they lie in, in CPUs."""
    quotas = [math.inf]
    for line in _words(system / "proc/self/cgroup", separator="\n"):
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = system / "sys/fs/cgroup" / controllers  # v2 names no controllers
        if not mount.is_dir():
            mount = system / "sys/fs/cgroup/cpu"
        # In a container the group may be named as its host sees it; then only the mount itself is there.
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
