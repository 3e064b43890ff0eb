"""Progress of a search on the console."""

import dataclasses
from typing import Any

from raydet.common.console import Console, shown
from raydet.common.display.progress import Progress
from raydet.tuning.plan import TuningPlan
from raydet.tuning.records import Trial, natural


class Follower:
    """Progress reporter of a search: a line per ended trial, and the state of the running ones."""

    def __init__(self, plan: TuningPlan, console: Console, progress: Progress) -> None:
        self._plan, self._console, self._progress = plan, console, progress
        self._running: dict[str, str] = {}
        progress.wait_for("starting trials")

    def started(self, trial: Trial) -> None:
        """Report the start of a trial."""
        self._running[trial.name] = f"{trial.name} starts"
        self._show()

    def advanced(self, trial: Trial, epoch: int, score: float) -> None:
        """Report an epoch of a trial, counted from 1, with the trial's best score so far."""
        value = natural(score, self._plan.metric)
        self._running[trial.name] = f"{trial.name} epoch {epoch}, {self._plan.metric} {value:.3f}"
        self._show()

    def ended(self, trial: Trial, best: tuple[Trial, float] | None) -> None:
        """Report the end of a trial; `best` is the best trial so far with its score."""
        self._progress.advance()
        self._running.pop(trial.name, None)
        metric = self._plan.metric
        if best is not None:
            self._progress.note(**{f"best_{metric}": natural(best[1], metric)}, best_trial=best[0].name)
        is_best = best is not None and best[0].number == trial.number
        score = trial.score(metric)
        values = {item.name: getattr(trial, item.name) for item in dataclasses.fields(trial) if item.name != "history"}
        values |= {"name": trial.name, "epochs": len(trial.history), "is_best": is_best}
        values |= {"metric": metric, "value": None if score is None else natural(score, metric)}
        self._console.record("trial", values, [trial_line(self._plan, trial, is_best=is_best)])
        self._show()

    def _show(self) -> None:
        self._progress.wait_for("; ".join(self._running.values()) or None)


def trial_line(plan: TuningPlan, trial: Trial, *, is_best: bool) -> str:
    """Format a trial as one line."""
    score = trial.score(plan.metric)
    value = shown(None if score is None else natural(score, plan.metric))
    epochs = f"{len(trial.history)} epoch{'' if len(trial.history) == 1 else 's'}"
    values = ", ".join(f"{name} {in_short(value)}" for name, value in plan.values(trial.parameters).items())
    mark = " *" if is_best else "  "
    text = f"{trial.name}{mark} {trial.state:<10} {epochs:>10}  {plan.metric} {value:>6}  {values}"
    return f"{text}: {trial.error}" if trial.error else text


def in_short(value: Any) -> str:
    """Format a value with at most four significant digits; None becomes a dash."""
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
