"""The progress of a task: counts that the work advances, and the rate and the remaining time that follow from them."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

Value = float | str | None
Item = TypeVar("Item")

_SECONDS_BETWEEN_MARKS = 0.5
_MOST_MARKS = 60
"""Marks that the rate is measured over: about the last half minute, or the last 60 steps of a slow task."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a task at one moment.

    Attributes:
        task: The task, such as `epoch 3/10`.
        completed: Units done, those of an earlier run included.
        total: Units of the complete task; None if unknown.
        unit: Plural noun of what is counted.
        elapsed_s: Seconds since the task began.
        rate_per_s: Recent units per second; None before the first one.
        eta_s: Remaining seconds of the task; None if unknown.
        run_eta_s: Remaining seconds of the complete run, if it has several tasks and they are known.
        waiting_for: The present obstacle or activity, such as `workers`; None while the task advances.
        values: Further values by name, such as `loss`.
    """

    task: str
    completed: int
    total: int | None
    unit: str
    elapsed_s: float
    rate_per_s: float | None
    eta_s: float | None
    run_eta_s: float | None = None
    waiting_for: str | None = None
    values: Mapping[str, Value] = field(default_factory=dict)


class Progress:
    """Counter of a task, or of several tasks one after another, that any thread may advance.

    Counting takes well below a microsecond: formatting and output happen in the thread of the display, which takes
    snapshots.
    """

    def __init__(
        self,
        task: str = "",
        *,
        total: int | None = None,
        unit: str = "images",
        completed: int = 0,
        ended: Callable[[Snapshot], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock, self._ended, self._clock = threading.RLock(), ended, clock
        self._values: dict[str, Value] = {}
        self._start(task, total, unit, completed)

    def _start(self, task: str, total: int | None, unit: str, completed: int) -> None:
        self._task, self._total, self._unit = task, total, unit
        self._completed = self._before = completed
        self._waiting_for: str | None = None
        self._run_eta_s: float | None = None
        self._started = self._clock()
        self._marks: deque[tuple[float, int]] = deque(maxlen=_MOST_MARKS)

    def begin(self, task: str, *, total: int | None = None, unit: str = "images", completed: int = 0) -> None:
        """End the current task, and begin another one; values that were noted stay.

        Args:
            task: A short name for the user, such as `epoch 3/10`.
            total: Units of the task; None if unknown.
            unit: Plural noun of what is counted.
            completed: Units that an earlier run has done; they do not count for the rate.
        """
        with self._lock:
            self._ended(self.snapshot())
            self._start(task, total, unit, completed)

    def advance(self, count: int = 1) -> None:
        """Add completed units."""
        with self._lock:
            self._completed += count

    def reach(self, completed: int) -> None:
        """Set the number of completed units."""
        with self._lock:
            self._completed = completed

    def over(self, items: Iterable[Item], *, count: Callable[[Item], int] = lambda _: 1) -> Iterator[Item]:
        """Yield items; each counts once the next one is requested."""
        for item in items:
            yield item
            self.advance(count(item))

    def wait_for(self, what: str | None) -> None:
        """Name the present activity or obstacle, such as `starting workers`; None for none."""
        with self._lock:
            self._waiting_for = what

    def expect_run_end(self, in_s: float | None) -> None:
        """Set the remaining seconds of the complete run, of which the task is a part; None if unknown."""
        with self._lock:
            self._run_eta_s = in_s

    def note(self, **values: Value) -> None:
        """Set values to show beside the count; None removes one."""
        with self._lock:
            self._values.update(values)

    def snapshot(self) -> Snapshot:
        """Return the present state, and mark the count for the rate."""
        with self._lock:
            now, completed, total = self._clock(), self._completed, self._total
            rate = self._rate(now, completed)
            eta_s = None
            if total is not None and rate:
                since = now - self._marks[-1][0]
                eta_s = max(0.0, (total - completed) / rate - since)
            return Snapshot(
                task=self._task,
                completed=completed,
                total=total,
                unit=self._unit,
                elapsed_s=now - self._started,
                rate_per_s=rate,
                eta_s=eta_s,
                run_eta_s=self._run_eta_s,
                waiting_for=self._waiting_for,
                values={name: value for name, value in self._values.items() if value is not None},
            )

    def _rate(self, now: float, completed: int) -> float | None:
        """Mark a change of the count, and return units per second between the first and the last mark.

        The first mark is the first change, so that the time until then, when workers start, does not count.
        """
        last_s, last = self._marks[-1] if self._marks else (self._started, self._before)
        if completed != last and (not self._marks or now - last_s >= _SECONDS_BETWEEN_MARKS):
            self._marks.append((now, completed))
        if not self._marks:
            return None
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        if first_s == last_s:
            first_s, first = self._started, self._before
        return max(0, last - first) / max(last_s - first_s, 1e-9)


SILENT = Progress()
"""Counter that nothing displays: the default of functions that the command line is not the only caller of."""
