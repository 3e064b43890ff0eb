"""The report of `prepare`, as numbers and as text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raydet.common.console import MOST_NAMED, aligned, counted
from raydet.common.notebook.showing import Shown
from raydet.preparation.examining import ROTATED, SIZE_MISMATCH, WITHOUT_BOXES
from raydet.preparation.sources.fitting import CLIPPED, NO_AREA, OUTSIDE, REPEATED_DROPPED, REPEATED_KEPT
from raydet.preparation.sources.source import UNLABELLED, UNLABELLED_KEPT
from raydet.preparation.target import Target
from raydet.tables import storage
from raydet.tables.table import FINDINGS_FOLDER, REJECTED_FOLDER

REPEATED_IMAGES_KEPT = "images with the same content as an earlier one, kept"
REPEATED_IMAGES_DROPPED = "images with the same content as an earlier one, dropped"

_MOST_CLASSES_SHOWN = 20
_KINDS_BY_FIELD = {
    "outside": (OUTSIDE,),
    "unlabelled_kept": (UNLABELLED_KEPT,),
    "dropped": (NO_AREA,),
    "clipped": (CLIPPED,),
    "duplicate_boxes": (REPEATED_KEPT, REPEATED_DROPPED),
    "duplicate_images": (REPEATED_IMAGES_KEPT, REPEATED_IMAGES_DROPPED),
    "size_mismatches": (SIZE_MISMATCH,),
    "rotated": (ROTATED,),
}
"""Fields of the report that count findings, and their kinds."""


@dataclass(frozen=True)
class PrepareReport(Shown):
    """Result of `prepare`.

    Attributes:
        out: Folder of the table or of the tables.
        already_done: True if the same configuration had already written everything, so that nothing was done.
        found: Images in the source; always accepted + rejected.
        accepted: Rows of the tables.
        rejected: Rows of OUT/__rejected.
        without_boxes: Accepted images that have no box.
        unlabelled_kept: Unlabelled images that were kept; those rejected are among the `reasons`.
        boxes: Boxes in the tables, crowds included.
        crowd_boxes: Boxes in the tables that mark a crowd.
        clipped: Boxes that extended beyond their image and were clipped to it.
        dropped: Boxes that were dropped because they have no area inside their image.
        outside: Dropped boxes that have an area, but outside their image.
        duplicate_boxes: Boxes that repeat another of their class in their image; kept by default.
        duplicate_images: Images with the content of an earlier one; kept by default.
        size_mismatches: Accepted images whose size differs from that in the annotations, excluding `rotated`.
        rotated: Accepted images whose boxes were rotated, because they were drawn before the EXIF rotation.
        boxes_by_class: Boxes by class name.
        reasons: Rejected images by reason.
        rejected_paths: Reason by path of each rejected image, if there are at most `MOST_NAMED`.
        findings: Other anomalies in the annotations and their counts. OUT/__findings lists these and all counted above.
        splits: By split: `images`, `boxes` and `boxes_by_class`.
        not_in_val: Names of classes that have boxes, but none in the split `val`.
        tables: The tables by split; empty if there is only one, in `out`.
        thresholds: Least score of a detection that became a label, by class name; None if none of a class did. Empty
            if the boxes are not a model's.
    """

    out: str
    already_done: bool = False
    found: int = 0
    accepted: int = 0
    rejected: int = 0
    without_boxes: int = 0
    unlabelled_kept: int = 0
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
    rejected_paths: Mapping[str, str] = field(default_factory=dict)
    findings: Mapping[str, int] = field(default_factory=dict)
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    not_in_val: Sequence[str] = ()
    tables: Mapping[str, str] = field(default_factory=dict)
    thresholds: Mapping[str, float | None] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        where = f" (listed in {storage.join(self.out, REJECTED_FOLDER)})" if self.rejected else ""
        lines = [f"{counted(self.found, 'image')} found, {self.accepted:,} accepted, {self.rejected:,} rejected{where}"]
        lines += self._lines_of_unlabelled()
        lines += [f"  rejected, {path}: {reason}" for path, reason in self.rejected_paths.items()]
        named = set(self.rejected_paths.values())
        reasons = {reason: count for reason, count in self.reasons.items() if reason not in (UNLABELLED, *named)}
        lines += [f"  rejected, {reason}: {count:,}" for reason, count in list(reasons.items())[:5]]
        if len(reasons) > 5:
            lines.append(f"  … and {len(reasons) - 5} further reasons")
        if self.boxes_by_class:
            crowds = f", {self.crowd_boxes:,} of them crowds" if self.crowd_boxes else ""
            empty = f"; {counted(self.without_boxes, 'image has', 'images have')} none" if self.without_boxes else ""
            classes = counted(len(self.boxes_by_class), "class", "classes")
            lines.append(f"{counted(self.boxes, 'box', 'boxes')} of {classes}{crowds}{empty}")
            lines += self._lines_of_classes()
        lines += self._lines_of_thresholds()
        lines += self._lines_of_findings()
        done = "already prepared with the same configuration: " if self.already_done else ""
        lines.append(f"{done}{', '.join(self.tables.values()) or self.out}")
        return lines

    def _lines_of_unlabelled(self) -> list[str]:
        rejected, kept = self.reasons.get(UNLABELLED, 0), self.unlabelled_kept
        if rejected:
            return [f"  {rejected:,} without labels were rejected; --unlabelled keep keeps them without objects"]
        if kept:
            return [f"  {kept:,} without labels were kept without objects; --unlabelled reject rejects them"]
        return []

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
        lines = [f"  {line}" for line in aligned(rows)]
        if len(ranked) > _MOST_CLASSES_SHOWN:
            lines.append(f"    … and {len(ranked) - _MOST_CLASSES_SHOWN} further classes")
        if self.not_in_val:
            shown = ", ".join(self.not_in_val[:10]) + (" …" if len(self.not_in_val) > 10 else "")
            lines.append(f"  in too few images to be in val: {shown}")
        return lines

    def _lines_of_thresholds(self) -> list[str]:
        known = {name: least for name, least in self.thresholds.items() if least is not None}
        shown = [f"{name} {least:.4g}" for name, least in list(known.items())[:_MOST_CLASSES_SHOWN]]
        if len(set(known.values())) == 1:
            shown = [f"{next(iter(known.values())):.4g}"]
        more = " …" if len(known) > len(shown) > 1 else ""
        lines = [f"labels are detections with scores of at least: {', '.join(shown)}{more}"] if shown else []
        without = [name for name, least in self.thresholds.items() if least is None]
        if without:
            named = ", ".join(without[:_MOST_CLASSES_SHOWN]) + (" …" if len(without) > _MOST_CLASSES_SHOWN else "")
            lines.append(f"  classes without a threshold, and so without labels: {named}")
        return lines

    def _lines_of_findings(self) -> list[str]:
        notes = {
            CLIPPED: self.clipped,
            NO_AREA: self.dropped - self.outside,
            OUTSIDE: self.outside,
            "boxes that repeat another of their class in the same image": self.duplicate_boxes,
            "images with the same content as an earlier one": self.duplicate_images,
            SIZE_MISMATCH: self.size_mismatches,
            ROTATED: self.rotated,
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
    rejected_paths: Mapping[str, str],
    class_names: Sequence[str],
    thresholds: Mapping[str, float | None],
    boxes_by_class: Mapping[str, Sequence[int]],
    images: Mapping[str, int],
) -> PrepareReport:
    """Make the report of a run from its counts, its findings by kind, and boxes and images by split."""
    rest = Counter(kinds)
    del rest[WITHOUT_BOXES]
    noted: dict[str, Any] = {field: sum(rest.pop(kind, 0) for kind in own) for field, own in _KINDS_BY_FIELD.items()}
    noted |= {name: counts[name] for name in ("found", "accepted", "without_boxes", "boxes", "crowd_boxes")}
    noted["dropped"] += noted["outside"]
    totals = [sum(numbers) for numbers in zip(*boxes_by_class.values(), strict=True)]
    by_name = {split: dict(zip(class_names, numbers, strict=True)) for split, numbers in boxes_by_class.items()}
    in_val = by_name.get("val", {})
    return PrepareReport(
        out=target.out,
        **noted,
        rejected=reasons.total(),
        boxes_by_class=dict(zip(class_names, totals, strict=True)),
        reasons=dict(reasons.most_common()),
        rejected_paths=dict(rejected_paths) if reasons.total() <= MOST_NAMED else {},
        findings=dict(rest),
        splits={
            split: {"images": images[split], "boxes": sum(own.values()), "boxes_by_class": own}
            for split, own in by_name.items()
            if split
        },
        not_in_val=[name for name, total in zip(class_names, totals, strict=True) if total and in_val.get(name) == 0],
        tables={split: uri for split, uri in target.tables.items() if split},
        thresholds=thresholds,
    )


def sum_reports(out: str, reports: Sequence[PrepareReport], tables: Mapping[Any, str]) -> PrepareReport:
    """Add up the reports of several tables."""
    values: dict[str, Any] = {}
    for name, value in asdict(reports[0]).items():
        parts = [getattr(report, name) for report in reports]
        if isinstance(value, dict):
            values[name] = dict(sum((Counter(part) for part in parts), Counter()))
        elif isinstance(value, int) and not isinstance(value, bool):
            values[name] = sum(parts)
    already_done = all(report.already_done for report in reports)
    return PrepareReport(**{**values, "out": storage.absolute_uri(out), "already_done": already_done, "tables": tables})
