"""Measured processes: start, termination and CPU seconds."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import psutil

from raydet.common.errors import RunError, UserError

READY = "ready"
"""Line of a measuring process after its warm-up."""
_LOOK_EVERY_S = 0.25


@contextlib.contextmanager
def started(command: Sequence[str], errors: IO[str]) -> "Iterator[subprocess.Popen[str]]":
    """Context manager: start a process and terminate it when the block ends."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "NO_ALBUMENTATIONS_UPDATE": "1"}
    # Measure on this machine, not on the cluster that RAY_ADDRESS selects.
    environment.pop("RAY_ADDRESS", None)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def raise_failure(returncode: int, errors: IO[str], what: str) -> NoReturn:
    """Raise the last line of a failed process, as UserError if its exit code is 2."""
    errors.seek(0)
    lines = [line for line in errors.read().splitlines() if line.strip()]
    reason = lines[-1].removeprefix("raydet: error: ") if lines else f"it exited with code {returncode}"
    raise UserError(reason) if returncode == 2 else RunError(f"{what} failed: {reason}")


@dataclass(frozen=True)
class Watched:
    """A finished command.

    Attributes:
        seconds: Duration.
        unix_s: Times at which its CPU seconds were read, ascending.
        cpu_s: Cumulative CPU seconds at these times, of the command and all its descendants that count.
    """

    seconds: float
    unix_s: Sequence[float]
    cpu_s: Sequence[float]

    def cpu_s_between(self, began_unix_s: float, ended_unix_s: float) -> float:
        """Return the CPU seconds between two times."""
        began_s, ended_s = np.interp([began_unix_s, ended_unix_s], self.unix_s, self.cpu_s)
        return float(ended_s - began_s)


def run_watched(command: Sequence[str], folder: str, *, not_counted: str | None = None) -> Watched:
    """Run a command and record its CPU seconds over time.

    Args:
        command: Command line to run.
        folder: Folder for its log.
        not_counted: Prefix of titles of processes that do not count.

    Raises:
        UserError: The command exited with code 2, a user error.
        RunError: The command failed.
    """
    with Path(folder, "run.log").open("w+") as errors, started(command, errors) as process:
        began = time.perf_counter()
        watch = _CpuOfTree(process.pid, not_counted)
        try:
            process.communicate()
        finally:
            watch.stop()
        seconds = time.perf_counter() - began
        if process.returncode:
            raise_failure(process.returncode, errors, f"a short run of {' '.join(command[2:4])}")
    return Watched(seconds, watch.unix_s, watch.cpu_s)


class _CpuOfTree:
    """Sum of the CPU seconds of a process and of all its descendants, including ended ones."""

    def __init__(self, pid: int, not_counted: str | None) -> None:
        self._root, self._not_counted = psutil.Process(pid), not_counted
        self._by_process: dict[tuple[int, float], float] = {}
        self.unix_s, self.cpu_s = [time.time()], [0.0]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            with contextlib.suppress(psutil.Error):
                for process in [self._root, *self._root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        times, counts = process.cpu_times(), self._counts(process)
                        key = process.pid, process.create_time()
                        self._by_process[key] = times.user + times.system if counts else 0.0
            self.unix_s.append(time.time())
            self.cpu_s.append(sum(self._by_process.values()))

    def _counts(self, process: psutil.Process) -> bool:
        return self._not_counted is None or not " ".join(process.cmdline()).startswith(self._not_counted)
