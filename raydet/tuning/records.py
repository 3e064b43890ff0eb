"""Records of a search: a small file and a run folder for each trial.

The files hold parameters and outcome; the metrics are in the histories of the run folders. A killed search resumes from
these, and nothing is stored twice.
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
"""Folder in OUT with the table of all trials and their run folders."""
_RECORDS_FOLDER = ("log", "trials")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of a search.

    Attributes:
        number: Number in order of creation, from 0.
        source: `default` for the unchanged config, `point` for a point given by the user, `search` for a drawn one.
        parameters: Options that differ from the unchanged config, by name.
        state: `stopped` by the scheduler in favour of better trials; `unfinished` while training or after an
            interruption.
        error: Reason for the failure; None otherwise.
        history: One record per epoch, from the trial's run folder.
    """

    number: int
    source: Source
    parameters: dict[str, Any]
    state: State = "unfinished"
    error: str | None = None
    history: list[EpochRecord] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the trial and of its folder."""
        return f"trial-{self.number:04d}"

    def folder(self, out: str) -> str:
        """Return the run folder of the trial."""
        return storage.join(out, TRIALS_FOLDER, self.name)

    def best(self, metric: str) -> EpochRecord | None:
        """Return the record of the best epoch; None without a measured epoch."""
        return best_epoch(self.history, metric) if self.scores(metric) else None

    def score(self, metric: str) -> float | None:
        """Return the score of the best epoch (higher is better); None without a measured epoch."""
        scores = self.scores(metric)
        return max(scores.values()) if scores else None

    def scores(self, metric: str) -> dict[int, float]:
        """Return the best score so far (higher is better) after each measured epoch."""
        return best_so_far(self.history, metric)


def best_so_far(history: Sequence[EpochRecord], metric: str) -> dict[int, float]:
    """Return the best score so far (higher is better) after each measured epoch, by epoch number from 1."""
    scores: dict[int, float] = {}
    best = -float("inf")
    for record in history:
        score = record.score(metric)
        if score is not None:
            best = max(best, score)
            scores[record.epoch] = best
    return scores


def natural(score: float, metric: str) -> float:
    """Convert a score back to the metric's value: the score of a loss is its negative."""
    return -score if metric == "loss" else score


def with_history(trial: Trial, out: str) -> Trial:
    """Return the trial with the current history of its run folder."""
    return dataclasses.replace(trial, history=read_history(trial.folder(out)))


def read_history(folder: str) -> list[EpochRecord]:
    """Read the epochs in a run folder; empty before the first epoch has ended."""
    try:
        return read_whole_history(folder)
    except (FileNotFoundError, ValueError):
        return []


def save(trial: Trial, out: str) -> None:
    """Write the record of a trial atomically."""
    content = {name: getattr(trial, name) for name in ("number", "source", "parameters", "state", "error")}
    uri = storage.join(out, *_RECORDS_FOLDER, f"{trial.name}.json")
    storage.write_bytes(uri, json.dumps(content, indent=1).encode())


def load(out: str) -> list[Trial]:
    """Load all trials of a search in number order, with their histories."""
    return [with_history(trial, out) for trial in load_states(out)]


def load_states(out: str) -> list[Trial]:
    """Load all trials of a search in number order, without their histories."""
    folder = storage.join(out, *_RECORDS_FOLDER)
    names = [name for name in storage.list_files(folder) if name.startswith("trial-") and name.endswith(".json")]
    trials = [Trial(**json.loads(storage.read_bytes(storage.join(folder, name)))) for name in names]
    return sorted(trials, key=lambda trial: trial.number)
