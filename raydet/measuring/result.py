"""Result of an evaluation and its text output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from raydet.common.console import aligned, shown
from raydet.common.notebook.showing import Shown
from raydet.measuring.numbers.matches import Protocol
from raydet.measuring.numbers.metrics import CocoResult
from raydet.measuring.numbers.values import Block, MetricValue

if TYPE_CHECKING:
    from raydet.measuring.verification import Verification


@dataclass(frozen=True)
class Measured:
    """Metrics over a set of images.

    Attributes:
        name: Name of the slice; None for all images.
        blocks: Values over all classes, then of each class by index (no class blocks if classes count as one).
        num_truth: Number of labelled boxes that count.
    """

    name: str | None
    blocks: tuple[Block, ...]
    num_images: int
    num_truth: int


@dataclass(frozen=True)
class Evaluation(Shown):
    """Result of `evaluate`.

    Attributes:
        result: Metrics over all images under the protocol's rules; a value is None if it is undefined or the protocol
            does not define it.
        out: Folder with the tables; None if not requested.
        whole: The same metrics with their intervals.
        slices: Metrics of the slices.
        num_left_out: Number of images that only one side has, which were left out.
        num_other_class: Number of detections left out, because the truth lacks their class.
        note: Line about how the images were joined, if worth reporting.
        verification: Comparison with pycocotools, if requested.
    """

    result: CocoResult
    out: str | None
    whole: Measured
    slices: tuple[Measured, ...] = ()
    num_left_out: int = 0
    num_other_class: int = 0
    note: str | None = None
    verification: "Verification | None" = None

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 1 if pycocotools computed another number."""
        return int(self.verification is not None and bool(self.verification.differing))

    @property
    def numbers(self) -> dict[str, float | None]:
        """The metrics over all classes and images by name, such as `AP50`; None if undefined."""
        return {value.metric: value.value for value in self.whole.blocks[0]}

    @property
    def per_class(self) -> pa.Table:
        """A row for each class: `class_name`, and a float64 column for each metric, null if it is undefined.

        Without rows if the classes count as one.
        """
        by_class = self.whole.blocks[1:]
        names = [value.metric for value in by_class[0]] if by_class else []
        rows = [
            {"class_name": category.name, **{value.metric: value.value for value in block}}
            for category, block in zip(self.result.categories, by_class, strict=True)
        ]
        fields = [("class_name", pa.string()), *((name, pa.float64()) for name in names)]
        return pa.Table.from_pylist(rows, schema=pa.schema(fields))

    def lines(self) -> list[str]:
        """Return the metrics as text: over all classes, then by class; "–" for undefined values."""
        result = self.result
        lines = [f"{result.num_images:,} images, {result.num_truth:,} boxes, {result.num_detections:,} detections"]
        if self.num_left_out:
            lines.insert(0, f"PARTIAL: left out {self.num_left_out:,} images that only one of truth and detections has")
        if self.num_other_class:
            lines.append(f"left out {self.num_other_class:,} detections of classes that the truth lacks")
        if self.note is not None:
            lines.append(self.note)
        if result.num_unreadable:
            lines.append(f"{result.num_unreadable:,} images could not be read; their boxes count as missed")
        overall, *by_class = self.whole.blocks
        has_bounds = any(value.low is not None for value in overall)
        rows = [("", "", "IoU", "area", "detections", *(["95 %"] if has_bounds else []))]
        for value in overall:
            limit = "" if value.max_detections is None else str(value.max_detections)
            row = value.metric, shown(value.value), _iou_text(value.iou, result.protocol), value.area or "", limit
            rows.append((*row, *([value.bounds_text] if has_bounds else [])))
        lines += ["", *aligned(rows), *_notes_on_intervals(overall)]
        if by_class:
            names = [value.metric for value in by_class[0] if value.metric not in ("ARs", "ARm", "ARl")]
            class_rows: list[tuple[str, ...]] = [("class", *names)]
            for category, block in zip(result.categories, by_class, strict=True):
                values = {value.metric: value.value for value in block}
                class_rows.append((category.name, *(shown(values[name]) for name in names)))
            lines += ["", *aligned(class_rows)]
        if self.slices:
            lines += ["", *aligned(_slice_rows(self.slices))]
        if self.verification is not None:
            lines += ["", *self.verification.lines()]
        if self.out is not None:
            lines += ["", f"metrics: {self.out}"]
        return lines


def _slice_rows(slices: Sequence[Measured]) -> list[tuple[str, ...]]:
    first = slices[0].blocks[0][0].metric
    rows: list[tuple[str, ...]] = [("slice", first, "95 %", "images", "boxes")]
    for item in slices:
        value = next(value for value in item.blocks[0] if value.metric == first)
        counts = f"{item.num_images:,}", f"{item.num_truth:,}"
        rows.append((item.name or "", shown(value.value), value.bounds_text, *counts))
    return rows


def _notes_on_intervals(values: Sequence[MetricValue]) -> list[str]:
    """Explain the intervals below the table."""
    notes = []
    if any(value.low is not None and not value.is_limit for value in values):
        notes.append(
            "95 %: from resampling the images, corrected for the bias of AP on few images, so a value need not be in "
            "the middle"
        )
    if any(value.is_limit for value in values):
        notes.append("≤, ≥: all images agree, so this is no spread but the limit of what so few images can exclude")
    return notes


def _iou_text(iou: float | None, protocol: Protocol) -> str:
    if iou is not None:
        return f"{iou:.2f}".lstrip("0")
    first, last = (f"{value:.2f}".lstrip("0") for value in (protocol.iou_thresholds[0], protocol.iou_thresholds[-1]))
    return f"{first}:{last}"
