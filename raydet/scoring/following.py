"""Progress of a scoring run on the console, from the statistics of its files."""

import time

from raydet.cluster.stopwatch import FileStats
from raydet.common.display.progress import Progress

_LOW_SHARE = 0.5
_LEAST_S = 5.0
"""Seconds over which the share of the model's time is measured before it is shown."""


class ScoringProgress:
    """Images scored, memory of the processes that run the model, and what the model waits for."""

    def __init__(self, progress: Progress, *, num_workers: int) -> None:
        self._progress, self._num_workers = progress, num_workers
        self._began: float | None = None
        self._model_s = 0.0
        progress.wait_for("loading the model")

    def add(self, file: FileStats) -> None:
        """Count a written file."""
        progress, now = self._progress, time.monotonic()
        progress.advance(file.num_images)
        models = [stats for stats in file.processes if stats.kind == "model"]
        device_mb = max((stats.device_mb for stats in models), default=0.0)
        memory_mb = max((stats.resident_mb for stats in models), default=0.0)
        progress.note(**({"device_memory_mb": device_mb} if device_mb else {"memory_mb": memory_mb or None}))
        waiting_for = None
        if self._began is None:  # the work on the first file includes the start-up
            self._began = now
        else:
            self._model_s += sum(stats.seconds.get("model", 0.0) for stats in models)
            busy_share = self._model_s / max((now - self._began) * self._num_workers, 1e-9)
            if now - self._began >= _LEAST_S and busy_share < _LOW_SHARE:
                waiting_for = f"the model waits for images {1 - busy_share:.0%} of the time"
        progress.wait_for(waiting_for)
