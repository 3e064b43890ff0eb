"""Seconds by stage: measurements in a scoring run's processes, and their records."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

STAGES = ("read", "decode", "prepare", "model", "write")
"""Stages of an image, in order; decoders read, decode and prepare (cut views and resize)."""
STAGES_OF_KIND = {"decoder": ("read", "decode", "prepare"), "model": ("model",), "writer": ("write",)}
"""Stages that a thread of each kind performs."""


@dataclass(frozen=True, kw_only=True)
class ProcessStats:
    """The work of one thread on some images of a file.

    Attributes:
        node: Host name of the machine.
        thread: Id of the thread within its process.
        kind: Task of the thread: decoder, model or writer.
        seconds: Busy seconds by stage (see `STAGES`).
        resident_mb: Resident memory at the end of the work, in units of 2²⁰ bytes, preferably without shared memory.
        device_mb: Peak memory on the process's GPU, in the same units; 0 without one.
        ended_unix_s: End of the work, Unix time in seconds.
    """

    node: str
    pid: int
    thread: int
    kind: str
    seconds: Mapping[str, float]
    resident_mb: float
    device_mb: float = 0.0
    ended_unix_s: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class FileStats:
    """Statistics of one written file: counts, errors, and the work that it took.

    Attributes:
        num_images: Rows of the file.
        errors: The reason for each image that could not be read.
        processes: Work of all threads involved; a thread may occur many times.
    """

    file: str
    num_images: int
    num_detections: int
    errors: Sequence[str]
    processes: Sequence[ProcessStats]


class Stopwatch:
    """Busy seconds of a thread by stage, summed since the last lap."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measuring(self, stage: str) -> Iterator[None]:
        """Context manager: add the block's duration to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - started

    def lap(self) -> ProcessStats:
        """Return the seconds by stage since the last lap, and the process's memory."""
        seconds, self._seconds = dict(self._seconds), {}
        return ProcessStats(
            node=socket.gethostname(),
            pid=os.getpid(),
            thread=threading.get_native_id(),
            kind=self._kind,
            seconds=seconds,
            resident_mb=_own_memory_mb(),
            device_mb=_device_memory_mb(),
        )


def _own_memory_mb() -> float:
    """Return the resident memory in units of 2²⁰ bytes, without shared memory such as the object store's."""
    memory = psutil.Process().memory_info()
    return float(memory.rss - getattr(memory, "shared", 0)) / 2**20


def _device_memory_mb() -> float:
    torch = sys.modules.get("torch")  # processes that decode do not import it
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    return float(torch.cuda.max_memory_allocated()) / 2**20
