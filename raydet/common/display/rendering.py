"""A snapshot of a task → its words on a terminal, a plain line, or a JSON object."""

from typing import Any

from raydet.common.display.progress import Snapshot, Value

_MEMORY_UNITS = {"device_memory_mb": "GPU memory", "memory_mb": "memory"}


def clock_text(seconds: float) -> str:
    """Format a duration as h:mm:ss, with days in front of one longer than a day."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours}:{minutes:02d}:{rest:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"


def count_text(snapshot: Snapshot) -> str:
    """Format the count, such as "1,200/5,000 images"; empty for a task that counts nothing."""
    if snapshot.total is not None:
        return f"{snapshot.completed:,}/{snapshot.total:,} {snapshot.unit}"
    return f"{snapshot.completed:,} {snapshot.unit}" if snapshot.completed else ""


def rate_text(snapshot: Snapshot) -> str:
    """Format the rate, such as "31.4 images/s"; empty if it is unknown."""
    rate = snapshot.rate_per_s
    if not rate:
        return ""
    if rate < 0.1:  # an item takes longer than ten seconds
        return f"{1 / rate:,.0f} s each"
    return f"{rate:,.0f} {snapshot.unit}/s" if rate >= 100 else f"{rate:.1f} {snapshot.unit}/s"


def time_text(snapshot: Snapshot) -> str:
    """Format the remaining time, such as "0:01:12 left"; for a task without a total, the time since it began."""
    if snapshot.eta_s is not None:
        return f"{clock_text(snapshot.eta_s)} left"
    return clock_text(snapshot.elapsed_s) if snapshot.total is None else ""


def details(snapshot: Snapshot) -> list[str]:
    """Return what else is known: the remaining time of the run, what it waits for, and the noted values."""
    found = [] if snapshot.run_eta_s is None else [f"run {clock_text(snapshot.run_eta_s)} left"]
    found += [] if snapshot.waiting_for is None else [snapshot.waiting_for]
    return found + [_value_text(name, value) for name, value in snapshot.values.items()]


def _value_text(name: str, value: Value) -> str:
    if name in _MEMORY_UNITS and isinstance(value, (int, float)):
        return f"{_MEMORY_UNITS[name]} {value / 1024:.1f} GB"
    words = name.replace("_", " ")
    return f"{words} {value:.3f}" if isinstance(value, float) else f"{words} {value}"


def plain_line(snapshot: Snapshot) -> str:
    """Format a task as a line of a log."""
    texts = [count_text(snapshot), rate_text(snapshot), time_text(snapshot), *details(snapshot)]
    if snapshot.total and snapshot.completed:
        texts[0] += f" ({snapshot.completed / snapshot.total:.0%})"
    return f"{snapshot.task}: {', '.join(text for text in texts if text)}".removesuffix(": ")


def end_line(snapshot: Snapshot) -> str:
    """Format a task that has ended."""
    count = f"{snapshot.completed:,} {snapshot.unit} in " if snapshot.completed else ""
    rate = snapshot.completed / max(snapshot.elapsed_s, 1e-9)
    rates = f", {rate:,.1f} {snapshot.unit}/s" if snapshot.completed and rate >= 0.1 else ""
    return f"{snapshot.task}: {count}{clock_text(snapshot.elapsed_s)}{rates}"


def progress_object(snapshot: Snapshot) -> dict[str, Any]:
    """Return the fields of a progress object of `--json`."""
    return {
        "task": snapshot.task,
        "completed": snapshot.completed,
        "total": snapshot.total,
        "unit": snapshot.unit,
        "elapsed_s": round(snapshot.elapsed_s, 3),
        "rate_per_s": None if snapshot.rate_per_s is None else round(snapshot.rate_per_s, 3),
        "eta_s": None if snapshot.eta_s is None else round(snapshot.eta_s, 1),
        "run_eta_s": None if snapshot.run_eta_s is None else round(snapshot.run_eta_s, 1),
        "waiting_for": snapshot.waiting_for,
        "values": dict(snapshot.values),
    }
