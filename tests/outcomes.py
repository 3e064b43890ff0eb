"""Complete results of runs, for tests that compare an interrupted or disturbed run with an undisturbed one."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raydet.common.console import Console
from raydet.models.checkpoints import HISTORY_FILE

Rows = list[dict[str, Any]]

_MEASURED = ("ended", "images_per_s", "seconds", "step_s", "start_s", "peak_memory_mb", "validation_s")
"""Fields of an epoch that depend on the machine."""


class RecordingConsole(Console):
    """A console that keeps its lines.

    Attributes:
        lines: All lines so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        """Keep and print a line."""
        self.lines.append(text)
        super().line(text)


def assert_same_rows(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Check that each column of each row is equal to the last bit, NaN included.

    The message names the first difference, because a diff of large tables would take minutes.
    """
    assert len(found) == len(expected), f"{len(found)} rows instead of {len(expected)}"
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.keys() == theirs.keys(), f"columns {[*mine]} instead of {[*theirs]}"
        for name, value in theirs.items():
            assert repr(mine[name]) == repr(value), f"row {number}, {name}: {mine[name]} instead of {value}"


def epochs_of(run: Path | str) -> Rows:
    """Return one row per epoch of a training run, with all numbers that a repetition on one thread reproduces."""
    history = json.loads(Path(run, HISTORY_FILE).read_text())
    return [{name: value for name, value in entry.items() if name not in _MEASURED} for entry in history]


def weights_hash(checkpoint: Path | str) -> str:
    """Return the hash of a checkpoint's weights."""
    return hashlib.sha256(Path(checkpoint, "model.safetensors").read_bytes()).hexdigest()


def outcome_of_training(run: Path | str) -> Rows:
    """Return the numbers of all epochs, and the weights of the best and the last one."""
    return [*epochs_of(run), {name: weights_hash(Path(run, name)) for name in ("checkpoint", "last")}]
