"""Record of one metric value, and its form in a metrics table."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """Value of one metric: a row of a metrics table without the names of its run.

    Attributes:
        metric: COCO's name of the metric, such as AP50.
        value: In [0, 1], or in [-1, 1] for a difference; None if undefined (no labelled box counts).
        category: Class; None for the value over all classes.
        slice: Slice of the data; None for all of it.
        iou: IoU threshold; None for the mean over those of the protocol.
        area: Size class of the boxes.
        max_detections: Limit of detections per class and image.
        low: Lower bound of the 95 % interval, at most `value`; None without an interval.
        high: Upper bound; None if `low` is.
    """

    metric: str
    value: float | None
    category: str | None = None
    slice: str | None = None
    iou: float | None = None
    area: str | None = None
    max_detections: int | None = None
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """True if the interval of a difference excludes 0 (significant); False without an interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def is_limit(self) -> bool:
        """True if the interval of a metric is a limit: all images agree on 0 or 1, so resampling shows no spread."""
        return self.low is not None and self.value is not None and not _ROUNDING < self.value < 1 - _ROUNDING

    @property
    def bounds_text(self) -> str:
        """The interval as text: "0.412–0.530", or "≤ 0.088" for a limit; empty without an interval."""
        if self.low is None or self.high is None or self.value is None:
            return ""
        if self.is_limit:
            return f"≤ {self.high:.3f}" if self.value < 1 - _ROUNDING else f"≥ {self.low:.3f}"
        return f"{self.low:.3f}–{self.high:.3f}"


Block = tuple[MetricValue, ...]
"""Metrics over all classes or for one class."""


def metric_rows(
    values: Iterable[MetricValue], *, run: str | None, model: str | None, split: str | None
) -> list[dict[str, Any]]:
    """Return the values as rows of a metrics table."""
    return [{"run": run, "model": model, "split": split, **vars(value)} for value in values]


def values_in(metrics: pa.Table) -> list[MetricValue]:
    """Return the values in a metrics table, in row order."""
    names = [item.name for item in dataclasses.fields(MetricValue)]
    return [MetricValue(**row) for row in metrics.select(names).to_pylist()]
