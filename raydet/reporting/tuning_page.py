"""Trials of a search → one HTML page with progress, search space and importance of the options."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydet.reporting.page import fill

_MOST_TICKS = 9


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Varied option.

    Attributes:
        is_log: Values were drawn uniformly on a logarithmic scale.
        choices: Choices in order, as text; None for a number.
    """

    name: str
    is_log: bool = False
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """Trial on the page.

    Attributes:
        name: Name of its folder.
        state: finished, stopped, failed or unfinished.
        source: default, point or search.
        values: Value on each axis: a number, the text of a choice, or None.
        value: Metric at the best epoch.
        seconds: Seconds of these epochs, including start-up and validation.
    """

    name: str
    state: str
    source: str
    values: tuple[Any, ...]
    value: float | None
    best_epoch: int | None
    num_epochs: int
    seconds: float
    error: str | None


def render_tuning(
    *,
    metric: str,
    is_less_better: bool,
    axes: Sequence[Axis],
    trials: Sequence[TrialRow],
    best: str | None,
    importance: Mapping[str, float] | None,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
) -> str:
    """Render the page: trials in the order in which they started, the name of the best, and each option's importance.

    `facts` are labels and texts about the search, `notes` notices at the top of the page.
    """
    return fill(
        "tuning.html",
        "tuning.js",
        _charts(metric, is_less_better, axes, trials, importance),
        metric=metric,
        axes=axes,
        trials=trials,
        best=next((trial for trial in trials if trial.name == best), None),
        default=next((trial for trial in trials if trial.source == "default"), None),
        counts={state: sum(trial.state == state for trial in trials) for state in sorted({t.state for t in trials})},
        importance=importance,
        facts=facts,
        notes=notes,
        text_of=text_of,
    )


def _charts(
    metric: str,
    is_less_better: bool,
    axes: Sequence[Axis],
    trials: Sequence[TrialRow],
    importance: Mapping[str, float] | None,
) -> dict[str, Any]:
    return {
        "metric": metric,
        "less_is_better": is_less_better,
        "trials": [
            {
                "name": trial.name,
                "state": trial.state,
                "value": trial.value,
                "texts": [text_of(value) for value in trial.values],
                "places": [_place(axis, value, trials, index) for index, (axis, value) in _pairs(axes, trial)],
            }
            for trial in trials
        ],
        "axes": [{"name": axis.name, "ticks": _ticks(axis, index, trials)} for index, axis in enumerate(axes)],
        "importance": None if importance is None else sorted(importance.items(), key=lambda item: item[1]),
    }


def _pairs(axes: Sequence[Axis], trial: TrialRow) -> list[tuple[int, tuple[Axis, Any]]]:
    return list(enumerate(zip(axes, trial.values, strict=True)))


def text_of(value: Any) -> str:
    """Return a value as readable text."""
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _range(axis: Axis, index: int, trials: Sequence[TrialRow]) -> tuple[float, float]:
    """Return the lowest and highest value on an axis, on its scale."""
    found = [trial.values[index] for trial in trials if isinstance(trial.values[index], int | float)]
    scaled = [_scaled(axis, value) for value in found if not axis.is_log or value > 0]
    return (min(scaled), max(scaled)) if scaled else (0.0, 1.0)


def _scaled(axis: Axis, value: float) -> float:
    return math.log10(value) if axis.is_log else float(value)


def _place(axis: Axis, value: Any, trials: Sequence[TrialRow], index: int) -> float | None:
    """Return the position of a value on its axis, from 0 to 1; None for a missing value."""
    if axis.choices is not None:
        if value not in axis.choices:
            return None
        return round((axis.choices.index(value) + 0.5) / len(axis.choices), 4)
    if not isinstance(value, int | float) or (axis.is_log and value <= 0):
        return None
    low, high = _range(axis, index, trials)
    return 0.5 if low == high else round((_scaled(axis, value) - low) / (high - low), 4)


def _ticks(axis: Axis, index: int, trials: Sequence[TrialRow]) -> list[tuple[float, str]]:
    """Return positions on an axis with their labels."""
    if axis.choices is not None:
        step = math.ceil(len(axis.choices) / _MOST_TICKS)
        shown = list(enumerate(axis.choices))[::step]
        return [(round((number + 0.5) / len(axis.choices), 4), text) for number, text in shown]
    low, high = _range(axis, index, trials)
    if low == high:
        return [(0.5, f"{10**low if axis.is_log else low:.3g}")]
    values = [low + (high - low) * quarter / 4 for quarter in range(5)]
    return [(quarter / 4, f"{10**v if axis.is_log else v:.3g}") for quarter, v in enumerate(values)]
