"""What the history of a training run says: which epoch is the best, and whether it is time to stop.

The history is a list with one entry for each epoch, kept in OUT/log/history.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]


def metric_value(entry: Entry, metric: str) -> float | None:
    """A number of an epoch, such that more is better; null where the epoch has not measured it.

    Args:
        entry: Of the history.
        metric: One of COCO's twelve, `AP:CLASS` for the AP of one class, or `loss`, of which less is better.
    """
    if metric == "loss":
        return -float(entry["loss"])
    if metric.startswith("AP:"):
        value = (entry.get("AP_by_class") or {}).get(metric.removeprefix("AP:"))
    else:
        value = entry.get(metric)
    return None if value is None else float(value)


def best_entry(history: Sequence[Entry], metric: str) -> Entry | None:
    """The epoch with the best number, of equal ones the newest; the newest of all where none has been measured."""
    if not history:
        return None
    scored = [
        (value, number) for number, entry in enumerate(history) if (value := metric_value(entry, metric)) is not None
    ]
    return history[max(scored)[1]] if scored else history[-1]


def is_best_so_far(history: Sequence[Entry], metric: str) -> bool:
    """Whether the newest epoch is the best."""
    return bool(history) and best_entry(history, metric) is history[-1]


def is_out_of_patience(history: Sequence[Entry], metric: str, patience: int | None) -> bool:
    """Whether the last `patience` measured epochs have brought nothing better than those before them."""
    if patience is None:
        return False
    values = [value for entry in history if (value := metric_value(entry, metric)) is not None]
    return len(values) > patience and max(values[-patience:]) <= max(values[:-patience])


def is_over(history: Sequence[Entry], *, epochs: int, metric: str, patience: int | None) -> bool:
    """Whether a run has no epoch left to do, or is out of patience."""
    return len(history) >= epochs or is_out_of_patience(history, metric, patience)
