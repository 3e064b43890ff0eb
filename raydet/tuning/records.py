"""What a search has tried so far: a small file for each trial, and each trial's own run folder.

The files say what was tried and how it ended; the numbers are in the histories of the run folders. So a search that was
killed goes on with what it had, and nothing is kept twice.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raydet.tables import storage
from raydet.training.history import EpochRecord, best_epoch
from raydet.training.history import read_history as read_whole_history

State = Literal["unfinished", "finished", "stopped", "failed"]
Source = Literal["default", "point", "search"]

TRIALS_FOLDER = "trials"
"""In OUT: the table of all trials, and below it the run folder of each."""
_RECORDS_FOLDER = ("log", "trials")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of a search.

    Attributes:
        number: From 0, in the order in which they began.
        source: `default`: `train` as it stands; `point`: given by the user; `search`: drawn.
        parameters: What differs from the default, by name.
        state: `stopped` by the scheduler, since others were ahead; `unfinished` while it trains, or was cut off.
        error: Why it failed.
        history: Of its run folder: a record an epoch.
    """

    number: int
    source: Source
    parameters: dict[str, Any]
    state: State = "unfinished"
    error: str | None = None
    history: list[EpochRecord] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"trial-{self.number:04d}"

    def folder(self, out: str) -> str:
        """Its run folder."""
        return storage.join(out, TRIALS_FOLDER, self.name)

    def best(self, metric: str) -> EpochRecord | None:
        """Its best epoch; None where none has been measured."""
        return best_epoch(self.history, metric) if self.scores(metric) else None

    def score(self, metric: str) -> float | None:
        """The metric at its best epoch, such that more is better; None where none has been measured."""
        scores = self.scores(metric)
        return max(scores.values()) if scores else None

    def scores(self, metric: str) -> dict[int, float]:
        """The best so far after each epoch that was measured, such that more is better."""
        return best_so_far(self.history, metric)


def best_so_far(history: Sequence[EpochRecord], metric: str) -> dict[int, float]:
    """By epoch, counted from 1, the best value until then, such that more is better; only of epochs measured."""
    scores: dict[int, float] = {}
    best = -float("inf")
    for record in history:
        score = record.score(metric)
        if score is not None:
            best = max(best, score)
            scores[record.epoch] = best
    return scores


def natural(score: float, metric: str) -> float:
    """A score as the metric is written: the loss is a score with its sign changed."""
    return -score if metric == "loss" else score


def with_history(trial: Trial, out: str) -> Trial:
    """The trial with the history that its run folder has now."""
    return dataclasses.replace(trial, history=read_history(trial.folder(out)))


def read_history(folder: str) -> list[EpochRecord]:
    """The epochs of a run folder; none where it has not got so far."""
    try:
        return read_whole_history(folder)
    except (FileNotFoundError, ValueError):
        return []


def save(trial: Trial, out: str) -> None:
    """Writes the file of a trial, whole or not at all."""
    content = {name: getattr(trial, name) for name in ("number", "source", "parameters", "state", "error")}
    uri = storage.join(out, *_RECORDS_FOLDER, f"{trial.name}.json")
    storage.write_bytes(uri, json.dumps(content, indent=1).encode())


def load(out: str) -> list[Trial]:
    """All trials of a search so far, by number, with their histories."""
    return [with_history(trial, out) for trial in load_states(out)]


def load_states(out: str) -> list[Trial]:
    """All trials of a search so far, by number, without what is in their run folders."""
    folder = storage.join(out, *_RECORDS_FOLDER)
    names = [name for name in storage.list_files(folder) if name.startswith("trial-") and name.endswith(".json")]
    trials = [Trial(**json.loads(storage.read_bytes(storage.join(folder, name)))) for name in names]
    return sorted(trials, key=lambda trial: trial.number)
