"""The record of one measured number, and how it stands in a metrics table."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """One number of an evaluation: a row of a metrics table without the names of its run.

    Attributes:
        metric: COCO's name of the number, such as AP50.
        value: In [0, 1], a difference in [-1, 1]; None where it is undefined: there is nothing to measure.
        category: The class; None for the number over all classes.
        slice: The part of the data; None for all of it.
        iou: The IoU threshold; None for the mean over those of the protocol.
        area: Size class of the boxes.
        max_detections: Detections of a class that count in an image.
        low: Lower end of the 95 % interval, at most `value`; None where there is no interval.
        high: Upper end; None where `low` is.
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
        """Whether a difference is significant; False where there is no interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


Block = tuple[MetricValue, ...]
"""The numbers over all classes, or of one class."""


def metric_rows(
    values: Iterable[MetricValue], *, run: str | None, model: str | None, split: str | None
) -> list[dict[str, Any]]:
    """Rows of a metrics table."""
    return [{"run": run, "model": model, "split": split, **vars(value)} for value in values]


def values_in(metrics: pa.Table) -> list[MetricValue]:
    """The numbers in a metrics table, in the order of its rows."""
    names = [item.name for item in dataclasses.fields(MetricValue)]
    return [MetricValue(**row) for row in metrics.select(names).to_pylist()]
