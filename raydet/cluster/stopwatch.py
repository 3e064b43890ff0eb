"""Seconds by stage: what the processes of a scoring run measure, batch by batch, and its records."""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Self

import psutil

STAGES = ("read", "decode", "prepare", "model", "write")
"""Stages of an image, in this order; `prepare` (resizing) and `model` are in the processes of kind `model`."""
LAST_STAGE_OF_KIND = {"reader": "read", "decoder": "decode", "model": "model", "writer": "write"}
"""The stage after which a process of this kind hands its images on."""


@dataclass(frozen=True, kw_only=True)
class ProcessStats:
    """The work of one process on some images of a file.

    Attributes:
        node: The machine.
        pid: The process on it.
        kind: What it does: reader, decoder, model or writer.
        seconds: Busy with these images, by stage (see `STAGES`).
        resident_mb: Its memory then, 2²⁰ bytes, best without what it shares with others.
        ended_unix_s: When it was done with them.
    """

    node: str
    pid: int
    kind: str
    seconds: Mapping[str, float]
    resident_mb: float
    ended_unix_s: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class FileStats:
    """The images of one written file: numbers, errors, and the work of the processes.

    Attributes:
        num_images: Rows of the file.
        num_detections: In all its rows together.
        errors: Why images could not be read, a reason for each of them.
        processes: Of all processes that worked on them; one may stand here many times.
    """

    num_images: int
    num_detections: int
    errors: Sequence[str]
    processes: Sequence[ProcessStats]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Reads back `to_dict`."""
        return cls(**{**content, "processes": [ProcessStats(**item) for item in content["processes"]]})


class Stopwatch:
    """Adds up the seconds that a process spends on a part, by stage."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._seconds: dict[str, float] = {}

    def measuring(self, stage: str) -> "_Measurement":
        """Adds the time of a `with` to a stage."""
        return _Measurement(self._seconds, stage)

    def lap(self) -> ProcessStats:
        """Seconds since the last lap, by stage, and the process's memory."""
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
