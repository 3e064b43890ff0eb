"""The progress of a training run on the console: a table with one line per epoch, and the epoch that is under way."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from raydet.cluster.forecast.measured import DATA_BOUND
from raydet.common.console import Console, shown
from raydet.common.display.progress import Progress
from raydet.common.threads import running_beside
from raydet.training.history import EpochRecord, ValidationRecord, best_epoch

_COCO_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_MOST_CLASSES_IN_A_LINE = 8


@dataclass(frozen=True, kw_only=True)
class WorkerProgress:
    """Progress that rank 0 reports, many times a second.

    Attributes:
        epoch: The epoch under way, from 1.
        step: Completed steps of the epoch.
        num_images: Images of the complete epoch, or of the validation.
        share_done: Completed share of them.
        is_validating: True while the validation after the epoch runs.
        data_share: Share of the time of the epoch's steps in which the model waited for images.
        loss: Recent mean loss per step; None before the first one.
        memory_mb: Peak memory of rank 0's process, in MiB.
        device_memory_mb: Peak memory on rank 0's GPU, in MiB; None without a GPU.
    """

    epoch: int
    step: int
    num_steps: int
    num_images: int = 0
    share_done: float = 0.0
    is_validating: bool = False
    data_share: float = 0.0
    loss: float | None = None
    memory_mb: float | None = None
    device_memory_mb: float | None = None


Entry = EpochRecord | str
"""A finished epoch, or a line from the workers."""


@contextlib.contextmanager
def following(
    console: Console,
    read: Callable[[int], tuple[Sequence[Entry], WorkerProgress | None]],
    *,
    epochs: int,
    metric: str,
) -> Iterator[None]:
    """Context manager: print each entry that `read` returns, and show the progress, while the block runs.

    Args:
        console: The console to print on.
        read: Takes an index; returns the entries from that index onwards, and the progress.
        epochs: Epochs of the complete run.
        metric: Metric that selects the best epoch.
    """
    table = _EpochTable(console, epochs)

    def follow(counter: Progress, stop: threading.Event) -> None:
        run, num_seen = RunProgress(counter, epochs=epochs, metric=metric), 0
        while True:
            is_last = stop.wait(0.5)
            entries, progress = read(num_seen)
            num_seen += len(entries)
            for entry in entries:
                table.add(entry)
                run.add(entry)
            if progress is not None:
                run.show(progress)
            if is_last:
                return

    with console.progress("training", leaves_line=False) as counter:
        counter.wait_for("starting workers")
        with running_beside(partial(follow, counter)):
            yield


class RunProgress:
    """Progress of the epoch and of the complete run, from the reports of the workers."""

    def __init__(self, counter: Progress, *, epochs: int, metric: str) -> None:
        self._counter, self._epochs, self._metric = counter, epochs, metric
        self._history: list[EpochRecord] = []
        self._task: tuple[int, bool] | None = None

    def add(self, entry: Entry) -> None:
        """Take note of a finished epoch."""
        if isinstance(entry, str):
            return
        self._history.append(entry)
        best = best_epoch(self._history, self._metric)
        values = {"AP": entry.value("AP"), f"best_{self._metric}": None if best is None else best.value(self._metric)}
        self._counter.note(**{name: value for name, value in values.items() if value is not None})

    def show(self, progress: WorkerProgress) -> None:
        """Show a report."""
        counter = self._counter
        completed = round(progress.share_done * progress.num_images)
        task = progress.epoch, progress.is_validating
        if task != self._task:
            self._task = task
            name = f"epoch {progress.epoch}/{self._epochs}{', validation' if progress.is_validating else ''}"
            counter.begin(name, total=progress.num_images or None, completed=completed)
        counter.reach(completed)
        is_bound = progress.data_share >= DATA_BOUND and not progress.is_validating
        counter.wait_for(f"waiting for images {progress.data_share:.0%} of the time" if is_bound else None)
        memory = progress.memory_mb if progress.device_memory_mb is None else None
        counter.note(loss=progress.loss, device_memory_mb=progress.device_memory_mb, memory_mb=memory)
        counter.expect_run_end(self._run_eta_s(progress))

    def _run_eta_s(self, progress: WorkerProgress) -> float | None:
        """Estimate the remaining seconds of the run, with as many epochs as it may have, from the last epoch."""
        present = self._counter.snapshot()
        if present.eta_s is None or present.rate_per_s is None:
            return None
        left = self._epochs - progress.epoch
        if not self._history:
            return None if progress.is_validating else present.eta_s + left * progress.num_images / present.rate_per_s
        last = self._history[-1]
        validation_s = 0.0 if last.validation is None else last.validation.seconds or 0.0
        to_come_s = 0.0 if progress.is_validating else validation_s
        return present.eta_s + to_come_s + left * (last.seconds + validation_s)


class _EpochTable:
    """A table with one line per epoch. Prints the header again when the columns change."""

    def __init__(self, console: Console, epochs: int) -> None:
        self._console, self._epochs = console, epochs
        self._header: list[str] = []

    def add(self, entry: Entry) -> None:
        if isinstance(entry, str):
            self._console.line(f"          {entry}")
            return
        terms = [name for name in sorted(entry.losses) if not name[-1].isdigit()]
        names = [name.removeprefix("loss_") for name in terms]
        header = ["epoch", "loss", *names, *_COCO_COLUMNS, "rate", "images/s", "s"]
        is_new, self._header = header != self._header, header
        values = [entry.value(name) for name in _COCO_COLUMNS]
        cells = [f"{entry.epoch}/{self._epochs}", f"{entry.loss:.3f}"]
        cells += [f"{entry.losses[name]:.3f}" for name in terms]
        cells += [shown(value) for value in values]
        cells += [f"{entry.learning_rate:.1e}", f"{entry.images_per_s:.1f}", f"{entry.total_s:.1f}"]
        widths = [max(10, len(name) + 2) for name in header]
        line, heading = (
            "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True)) for texts in (cells, header)
        )
        lines = [line, *(f"          {note}" for note in _notes(entry))]
        self._console.record("epoch", entry.to_json(), lines, heading=heading if is_new else "")


def _notes(record: EpochRecord) -> list[str]:
    """Return notes on an epoch: AP by class, unreadable images, a bottleneck."""
    notes = []
    by_class = (record.validation or ValidationRecord()).ap_by_class
    if 1 < len(by_class) <= _MOST_CLASSES_IN_A_LINE:
        numbers = [f"{name} {shown(value)}" for name, value in by_class.items()]
        notes.append(f"AP by class: {', '.join(numbers)}")
    if record.validation is not None and record.validation.loss is not None:
        notes.append(f"validation loss: {record.validation.loss:.4f}")
    if record.num_skipped_steps:
        notes.append(f"steps skipped because their gradient was not finite: {record.num_skipped_steps}")
    if record.num_unreadable:
        notes.append(f"training images skipped because they could not be read: {record.num_unreadable}")
    step_s = sum(record.step_s.values())
    data_s = record.step_s.get("data", 0.0)
    share = data_s / max(step_s, 1e-9)
    if share >= DATA_BOUND:
        notes.append(
            f"data is the bottleneck: in each step of {step_s:.2f} s the model waited {data_s:.2f} s ({share:.0%}) for "
            "images; give decoding more CPUs (lower --cpus-per-worker, or add CPU nodes), store smaller images, or "
            "choose a lighter augmentation"
        )
    return notes
