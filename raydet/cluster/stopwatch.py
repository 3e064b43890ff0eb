"""Where a worker's time goes: seconds by stage, and its memory, lap by lap."""

import os
import socket
import time
from functools import lru_cache

import psutil

from raydet.cluster.job_report import ProcessStats


class Stopwatch:
    """Adds up the seconds that a process spends on a part, by stage."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._seconds: dict[str, float] = {}

    def measuring(self, stage: str) -> "_Measurement":
        """Adds the time of a `with` to a stage."""
        return _Measurement(self._seconds, stage)

    def lap(self) -> ProcessStats:
        """What was added up since the last lap, and the process's memory."""
        seconds, self._seconds = dict(self._seconds), {}
        return ProcessStats(
            node=_node(), pid=os.getpid(), kind=self._kind, seconds=seconds, resident_mb=_own_memory_mb()
        )


class _Measurement:
    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        elapsed = time.perf_counter() - self._started
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + elapsed


@lru_cache(maxsize=1)
def _node() -> str:
    return socket.gethostname()


def _own_memory_mb() -> float:
    """Resident memory without what is shared with others, as the object store is."""
    memory = psutil.Process().memory_info()
    return float(memory.rss - getattr(memory, "shared", 0)) / 2**20
