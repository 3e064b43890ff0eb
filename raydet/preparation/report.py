"""What `prepare` found and wrote, in numbers and in words."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raydet.preparation.examining import ROTATED, SIZE_MISMATCH, WITHOUT_BOXES
from raydet.preparation.sources.fitting import CLIPPED, NO_AREA, OUTSIDE, REPEATED_DROPPED, REPEATED_KEPT
from raydet.preparation.target import Target
from raydet.tables import storage
from raydet.tables.table import FINDINGS_FOLDER, REJECTED_FOLDER

REPEATED_IMAGES_KEPT = "images with the content of one before them, kept"
REPEATED_IMAGES_DROPPED = "images with the content of one before them, left out"

_MOST_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` found and wrote.

    Attributes:
        out: Where the table is, or the tables are.
        already_done: All was there before, made by the same configuration; nothing was done.
        found: Images that the source names; always accepted + rejected.
        accepted: Rows of the tables.
        rejected: Rows of OUT/_rejected.
        without_boxes: Accepted images that have no box.
        boxes: Boxes in the tables, crowds included.
        crowd_boxes: Those that stand for a crowd.
        clipped: Boxes that ran out of their image and were cut to it.
        dropped: Boxes without area, or with none inside their image, that were left out.
        outside: Those of them that had an area, outside their image.
        duplicate_boxes: Boxes that repeat another of their class in their image; kept unless the configuration says
            otherwise.
        duplicate_images: Images with the content of one before them; likewise.
        size_mismatches: Accepted images whose size is not the one stated in the annotations, `rotated` excepted.
        rotated: Accepted images whose boxes were turned, since they were drawn before the EXIF rotation.
        boxes_by_class: Boxes of each class, by its name.
        reasons: Rejected images by reason.
        findings: What else was odd in the annotations, and how often. All of it, and all that is counted above, is
            listed in OUT/_findings.
        splits: For each split its `images`, its `boxes` and, as `boxes_by_class`, those of each class.
        not_in_val: Names of the classes that have boxes, but none in the split `val`.
        tables: The tables written, by the names of the splits; empty where there is but one, in `out`.
    """

    out: str
    already_done: bool = False
    found: int = 0
    accepted: int = 0
    rejected: int = 0
    without_boxes: int = 0
    boxes: int = 0
    crowd_boxes: int = 0
    clipped: int = 0
    dropped: int = 0
    outside: int = 0
    duplicate_boxes: int = 0
    duplicate_images: int = 0
    size_mismatches: int = 0
    rotated: int = 0
    boxes_by_class: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    findings: Mapping[str, int] = field(default_factory=dict)
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    not_in_val: Sequence[str] = ()
    tables: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in a few plain lines."""
        where = f" (listed in {storage.join(self.out, REJECTED_FOLDER)})" if self.rejected else ""
        lines = [f"{self.found:,} images found, {self.accepted:,} accepted, {self.rejected:,} rejected{where}"]
        lines += [f"  rejected, {reason}: {count:,}" for reason, count in list(self.reasons.items())[:5]]
        if len(self.reasons) > 5:
            lines.append(f"  … and {len(self.reasons) - 5} further reasons")
        if self.boxes_by_class:
            crowds = f", {self.crowd_boxes:,} of them crowds" if self.crowd_boxes else ""
            empty = f"; {self.without_boxes:,} images have none" if self.without_boxes else ""
            lines.append(f"{self.boxes:,} boxes of {len(self.boxes_by_class)} classes{crowds}{empty}")
            lines += self._lines_of_classes()
        lines += self._lines_of_findings()
        done = "nothing to do, the table is complete: " if self.already_done else ""
        lines.append(f"{done}{', '.join(self.tables.values()) or self.out}")
        return lines

    def _lines_of_classes(self) -> list[str]:
        ranked = sorted(self.boxes_by_class.items(), key=lambda item: -item[1])
        if not self.splits:
            shown = ", ".join(f"{name} {count:,}" for name, count in ranked[:10])
            return [f"  {shown}{' …' if len(ranked) > 10 else ''}"]
        rows = [("", *self.splits)]
        rows += [(key, *(f"{split[key]:,}" for split in self.splits.values())) for key in ("images", "boxes")]
        rows += [
            (f"  {name}", *(f"{split['boxes_by_class'][name]:,}" for split in self.splits.values()))
            for name, _ in ranked[:_MOST_CLASSES_SHOWN]
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  " + "  ".join([row[0].ljust(widths[0])] + [row[i].rjust(widths[i]) for i in range(1, len(row))])
            for row in rows
        ]
        if len(ranked) > _MOST_CLASSES_SHOWN:
            lines.append(f"    … and {len(ranked) - _MOST_CLASSES_SHOWN} further classes")
        if self.not_in_val:
            shown = ", ".join(self.not_in_val[:10]) + (" …" if len(self.not_in_val) > 10 else "")
            lines.append(f"  in too few images to be in val: {shown}")
        return lines

    def _lines_of_findings(self) -> list[str]:
        notes = {
            "boxes cut to their image": self.clipped,
            "boxes without area left out": self.dropped - self.outside,
            "boxes outside their image left out": self.outside,
            "boxes that repeat another of their class in their image": self.duplicate_boxes,
            "images with the content of one before them": self.duplicate_images,
            "images of another size than the annotations say": self.size_mismatches,
            "images whose boxes were turned upright with them": self.rotated,
            **self.findings,
        }
        lines = [f"  {text}: {count:,}" for text, count in notes.items() if count]
        if lines:
            lines.insert(0, f"findings, listed in {storage.join(self.out, FINDINGS_FOLDER)}:")
        return lines


def make_report(
    target: Target,
    counts: Mapping[str, int],
    kinds: Mapping[str, int],
    reasons: Counter[str],
    *,
    class_names: Sequence[str],
    boxes_by_class: Mapping[str, Sequence[int]],
    images: Mapping[str, int],
) -> PrepareReport:
    """Makes the report of a run.

    Args:
        target: Where it wrote to.
        counts: found, accepted, without_boxes, boxes, crowd_boxes.
        kinds: Findings by kind.
        reasons: Rejected images by reason.
        class_names: In the order of the categories.
        boxes_by_class: For each table, by the name of its split, the boxes of each category.
        images: Rows of each table.
    """
    rest = Counter(kinds)
    outside = rest.pop(OUTSIDE, 0)
    totals = [sum(numbers) for numbers in zip(*boxes_by_class.values(), strict=True)]
    rest.pop(WITHOUT_BOXES, 0)
    by_name = {split: dict(zip(class_names, numbers, strict=True)) for split, numbers in boxes_by_class.items()}
    in_val = by_name.get("val", {})
    missing = [name for name, total in zip(class_names, totals, strict=True) if total and in_val.get(name) == 0]
    return PrepareReport(
        out=target.out,
        found=counts["found"],
        accepted=counts["accepted"],
        without_boxes=counts["without_boxes"],
        boxes=counts["boxes"],
        crowd_boxes=counts["crowd_boxes"],
        rejected=reasons.total(),
        outside=outside,
        dropped=rest.pop(NO_AREA, 0) + outside,
        clipped=rest.pop(CLIPPED, 0),
        duplicate_boxes=rest.pop(REPEATED_KEPT, 0) + rest.pop(REPEATED_DROPPED, 0),
        duplicate_images=rest.pop(REPEATED_IMAGES_KEPT, 0) + rest.pop(REPEATED_IMAGES_DROPPED, 0),
        size_mismatches=rest.pop(SIZE_MISMATCH, 0),
        rotated=rest.pop(ROTATED, 0),
        boxes_by_class=dict(zip(class_names, totals, strict=True)),
        reasons=dict(reasons.most_common()),
        findings=dict(rest),
        splits={
            split: {"images": images[split], "boxes": sum(own.values()), "boxes_by_class": own}
            for split, own in by_name.items()
            if split
        },
        not_in_val=missing,
        tables={split: uri for split, uri in target.tables.items() if split},
    )


def sum_reports(out: str, reports: Sequence[PrepareReport], tables: Mapping[Any, str]) -> PrepareReport:
    """Several tables as one report."""
    values: dict[str, Any] = {}
    for name, value in asdict(reports[0]).items():
        parts = [getattr(report, name) for report in reports]
        if isinstance(value, dict):
            values[name] = dict(sum((Counter(part) for part in parts), Counter()))
        elif isinstance(value, int) and not isinstance(value, bool):
            values[name] = sum(parts)
    already_done = all(report.already_done for report in reports)
    return PrepareReport(**{**values, "out": storage.absolute_uri(out), "already_done": already_done, "tables": tables})
