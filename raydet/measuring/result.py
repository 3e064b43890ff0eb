"""What an evaluation found, and how it is said."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydet.common.console import aligned
from raydet.measuring.numbers.matches import Protocol
from raydet.measuring.numbers.metrics import CocoResult

if TYPE_CHECKING:
    from raydet.measuring.bootstrap import Interval, Intervals

Row = tuple[str, str | None, float | None, str | None, int | None, float | None]
"""Metric, class (None: all), IoU (None: the mean over all thresholds), size class, limit of detections, value."""
Block = Sequence[Row]
"""The numbers over all classes, or of one class."""


@dataclass(frozen=True)
class Measured:
    """The numbers over some images.

    Attributes:
        name: Of the slice; None for all images.
        blocks: Over all classes, then of each class by its index (none of them where classes count as one).
        intervals: How sure the numbers are, where that was asked for.
        num_images: Images in it.
        num_truth: Labelled boxes in it that count.
    """

    name: str | None
    blocks: tuple[Block, ...]
    intervals: "Intervals | None"
    num_images: int
    num_truth: int


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        result: The numbers over all images, by the rules of the protocol; -1 where there is nothing to measure, or
            where the protocol has no such number.
        out: The folder with the tables; None where none was asked for.
        whole: The same numbers with their intervals.
        slices: Those of the slices.
        num_left_out: Images that only one side has, which were left out.
    """

    result: CocoResult
    out: str | None
    whole: Measured
    slices: tuple[Measured, ...] = ()
    num_left_out: int = 0

    def lines(self) -> list[str]:
        """The numbers as text: over all classes, then those of each class; "–" where there is nothing to measure."""
        result = self.result
        lines = [f"{result.num_images:,} images, {result.num_truth:,} boxes, {result.num_detections:,} detections"]
        if self.num_left_out:
            lines.insert(
                0, f"PARTIAL: {self.num_left_out:,} images are in only one of truth and detections, and left out"
            )
        if result.num_unreadable:
            lines.append(f"{result.num_unreadable:,} images could not be read; their boxes count as missed")
        overall, *by_class = self.whole.blocks
        bounds = self.whole.intervals.overall if self.whole.intervals is not None else {}
        rows = [("", "", "IoU", "area", "detections", *(["95 %"] if bounds else []))]
        for name, _, iou, area, limit, value in overall:
            row = (
                name,
                _format(value),
                _iou_text(iou, result.protocol),
                area or "",
                "" if limit is None else str(limit),
            )
            rows.append((*row, *([_bounds_text(bounds, name)] if bounds else [])))
        lines += ["", *aligned(rows)]
        if by_class:
            names = [row[0] for row in by_class[0] if row[0] not in ("ARs", "ARm", "ARl")]
            class_rows: list[tuple[str, ...]] = [("class", *names)]
            for category, block in zip(result.categories, by_class, strict=True):
                values = {row[0]: row[5] for row in block}
                class_rows.append((category.name, *(_format(values[name]) for name in names)))
            lines += ["", *aligned(class_rows)]
        if self.slices:
            lines += ["", *aligned(_slice_rows(self.slices))]
        if self.out is not None:
            lines += ["", f"metrics: {self.out}"]
        return lines


def _slice_rows(slices: Sequence[Measured]) -> list[tuple[str, ...]]:
    first = slices[0].blocks[0][0][0]
    rows: list[tuple[str, ...]] = [("slice", first, "95 %", "images", "boxes")]
    for item in slices:
        bounds = item.intervals.overall if item.intervals is not None else {}
        value = next((row[5] for row in item.blocks[0] if row[0] == first), None)
        counts = f"{item.num_images:,}", f"{item.num_truth:,}"
        rows.append((item.name or "", _format(value), _bounds_text(bounds, first), *counts))
    return rows


def _format(value: float | None) -> str:
    return "–" if value is None or value == -1 else f"{value:.3f}"


def _iou_text(iou: float | None, protocol: Protocol) -> str:
    if iou is not None:
        return f"{iou:.2f}".lstrip("0")
    first, last = (f"{value:.2f}".lstrip("0") for value in (protocol.iou_thresholds[0], protocol.iou_thresholds[-1]))
    return f"{first}:{last}"


def _bounds_text(bounds: dict[str, "Interval"], name: str) -> str:
    interval = bounds.get(name)
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"{interval.low:.3f}–{interval.high:.3f}"
