"""Lines, tables and progress on the terminal. Imports no Ray."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from raydet.common.redaction import without_secrets

_COCO_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_MOST_CLASSES_IN_A_LINE = 8
_DATA_BOUND = 0.15
"""Share of a step's time spent waiting for images above which faster decoding would speed up the run."""


def write_out(text: str) -> None:
    """Write a page of text to stdout; a reader such as `head` may close the pipe before the end."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay out a table: the first column flush left, the others flush right."""
    first_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths, strict=True)]
        lines.append("  ".join([first.ljust(first_width), *cells]).rstrip())
    return lines


class Console:
    """Plain lines, and on a terminal a status line below them with the progress."""

    def __init__(self) -> None:
        # Imported late: layout alone does not need it.
        from rich.console import Console as RichConsole

        self._rich = RichConsole(highlight=False, markup=False, soft_wrap=True)
        self._is_terminal = self._rich.is_terminal
        self._header: list[str] = []

    def line(self, text: str = "") -> None:
        """Print one line, with passwords and keys masked."""
        self._rich.print(without_secrets(text))

    def title(self, text: str) -> None:
        """Print the title of the next step."""
        self._rich.print(text, style="bold" if self._is_terminal else None)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show a status line during a `with` block; yields the function that changes it."""
        if not self._is_terminal:
            yield lambda _: None
            return
        with self._rich.status(text) as status:
            yield status.update

    @contextlib.contextmanager
    def following_training(
        self, read: Callable[[int], tuple[list[dict[str, Any]], dict[str, Any]]], *, epochs: int
    ) -> Iterator[None]:
        """Print a line for each epoch that `read` returns, during a `with` block.

        Args:
            read: Takes a number; returns the entries from that number on, and the progress.
            epochs: Epochs of the whole run.
        """
        stop = threading.Event()

        def follow(update: Callable[[str], None]) -> None:
            num_seen = 0
            while True:
                is_last = stop.wait(0.5)
                entries, progress = read(num_seen)
                num_seen += len(entries)
                for entry in entries:
                    self._epoch(entry, epochs)
                if progress:
                    update("epoch {epoch}, step {step} of {num_steps}".format(**progress))
                if is_last:
                    return

        with self.status("starting workers") as update:
            thread = threading.Thread(target=follow, args=(update,), daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join(timeout=10)

    def _epoch(self, entry: dict[str, Any], epochs: int) -> None:
        if "note" in entry:
            self.line(f"          {entry['note']}")
            return
        terms = [name for name in sorted(entry["losses"]) if not name[-1].isdigit()]
        header = [
            "epoch",
            "loss",
            *[name.removeprefix("loss_") for name in terms],
            *_COCO_COLUMNS,
            "rate",
            "images/s",
            "s",
        ]
        if header != self._header:
            self._header = header
            self.title("".join(f"{name:>10}" for name in header))
        cells = [f"{entry['epoch']}/{epochs}", f"{entry['loss']:.3f}"]
        cells += [f"{entry['losses'][name]:.3f}" for name in terms]
        cells += ["–" if entry.get(name) is None else f"{entry[name]:.3f}" for name in _COCO_COLUMNS]
        seconds = entry["start_s"] + entry["seconds"] + entry.get("validation_s", 0.0)
        cells += [f"{entry['learning_rate']:.1e}", f"{entry['images_per_s']:.1f}", f"{seconds:.1f}"]
        self.line("".join(f"{cell:>10}" for cell in cells))
        for remark in _remarks(entry):
            self.line(f"          {remark}")


def _remarks(entry: dict[str, Any]) -> list[str]:
    """Remarks on an epoch: AP by class, unreadable images, a bottleneck."""
    remarks = []
    by_class = entry.get("AP_by_class") or {}
    if 1 < len(by_class) <= _MOST_CLASSES_IN_A_LINE:
        numbers = [f"{name} {'–' if value is None else format(value, '.3f')}" for name, value in by_class.items()]
        remarks.append(f"AP by class: {', '.join(numbers)}")
    if entry["unreadable"]:
        remarks.append(f"{entry['unreadable']} training images could not be read; raydet skipped them")
    times = entry["step_s"]
    share = times["data"] / max(sum(times.values()), 1e-9)
    if share > _DATA_BOUND:
        remarks.append(
            f"data is the bottleneck: in each step of {sum(times.values()):.2f} s the model waited "
            f"{times['data']:.2f} s ({share:.0%}) for images; give decoding more CPUs "
            "(lower --cpus-per-worker, or add CPU nodes), store smaller images, or choose a lighter augmentation"
        )
    return remarks
