"""The progress of a training run on the console: a table with one line per epoch, and a status line."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from raydet.cluster.forecast.measured import DATA_BOUND
from raydet.common.console import Console, shown
from raydet.training.history import EpochRecord, ValidationRecord

_COCO_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_MOST_CLASSES_IN_A_LINE = 8

Entry = EpochRecord | str
"""A finished epoch, or a line from the workers."""


@contextlib.contextmanager
def following(
    console: Console, read: Callable[[int], tuple[Sequence[Entry], dict[str, Any]]], *, epochs: int
) -> Iterator[None]:
    """Context manager: print each entry that `read` returns while the block runs.

    Args:
        console: The console to print on.
        read: Takes an index; returns the entries from that index onwards, and the progress.
        epochs: Epochs of the complete run.
    """
    stop, table = threading.Event(), _EpochTable(console, epochs)

    def follow(update: Callable[[str], None]) -> None:
        num_seen = 0
        while True:
            is_last = stop.wait(0.5)
            entries, progress = read(num_seen)
            num_seen += len(entries)
            for entry in entries:
                table.add(entry)
            if progress:
                update("epoch {epoch}, step {step} of {num_steps}".format(**progress))
            if is_last:
                return

    with console.status("starting workers") as update:
        thread = threading.Thread(target=follow, args=(update,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=10)


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
        if header != self._header:
            self._header = header
            self._console.title("".join(f"{name:>10}" for name in header))
        values = [entry.value(name) for name in _COCO_COLUMNS]
        cells = [f"{entry.epoch}/{self._epochs}", f"{entry.loss:.3f}"]
        cells += [f"{entry.losses[name]:.3f}" for name in terms]
        cells += [shown(value) for value in values]
        cells += [f"{entry.learning_rate:.1e}", f"{entry.images_per_s:.1f}", f"{entry.total_s:.1f}"]
        self._console.line("".join(f"{cell:>10}" for cell in cells))
        for note in _notes(entry):
            self._console.line(f"          {note}")


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
