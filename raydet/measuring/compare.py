"""Compare two runs on the same images: the difference in AP, its significance and the images that changed most."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydet.common.console import Console, aligned, shown
from raydet.common.notebook.showing import Shown
from raydet.config import CompareConfig, config_hash, identity
from raydet.config.fields import with_options
from raydet.config.measuring import JoinKey
from raydet.measuring.bootstrap import LEVEL, PairedDifferences, paired_differences
from raydet.measuring.detections import read_detections
from raydet.measuring.diagnosis.scores import Outcomes, best_threshold, outcomes_at, per_image
from raydet.measuring.numbers.matches import Matches
from raydet.measuring.numbers.matching import match, match_in_parts
from raydet.measuring.numbers.values import MetricValue
from raydet.measuring.truth import Truth, read_truth
from raydet.tables import storage
from raydet.tables.output_folder import OutputFolder, open_folder
from raydet.tables.schema import Category, TableKind, build_schema
from raydet.tables.table import TableWriter, is_table

_KINDS: tuple[TableKind, ...] = ("changed_images", "comparison")
_PART = "compare"


@dataclass(frozen=True, kw_only=True)
class ChangedImage:
    """Image on which one run detects better than the other.

    Attributes:
        num_truth: Number of labelled boxes that count.
        first_f1: F1 of the first run at its own best score threshold and IoU 0.5; None if the image has neither
            boxes nor detections.
        second_f1: F1 of the second run, defined the same way.
        difference: second - first; an undefined F1 counts as 1.
    """

    image_id: int
    num_truth: int
    first_f1: float | None
    second_f1: float | None
    difference: float


@dataclass(frozen=True, kw_only=True)
class Comparison(Shown):
    """Result of `compare`.

    Attributes:
        names: Names of the two runs: the last path component, or as many as distinguish them.
        num_images: Number of images on which both runs were measured.
        num_truth: Number of labelled boxes, crowds included.
        numbers: AP metrics of both runs and their differences, with intervals.
        thresholds: Score threshold of the best F1 of each run.
        changed_images: Images with the largest change in F1, largest first.
        out: Folder with the tables `comparison` and `changed_images`; None if not requested.
        notes: Lines about how the images were joined, if worth reporting.
    """

    names: tuple[str, str]
    categories: tuple[Category, ...]
    num_images: int
    num_truth: int
    numbers: PairedDifferences
    thresholds: tuple[float, float]
    changed_images: tuple[ChangedImage, ...]
    out: str | None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the comparison as text: overall, by class, significance and the images that changed most."""
        first, second = self.names
        lines = [f"{self.num_images:,} images, {self.num_truth:,} boxes", f"first: {first}", f"second: {second}"]
        lines += self.notes
        header = ("first", "second", "difference", f"{100 * LEVEL:g} % interval", "")
        rows: list[tuple[str, ...]] = [("", *header)]
        for name in self.numbers.difference.overall:
            rows.append((name, *self._cells(name, None)))
        lines += ["", *aligned(rows)]
        rows = [("AP by class", *header)]
        for index, category in enumerate(self.categories):
            rows.append((category.name, *self._cells("AP", index)))
        lines += ["", *aligned(rows), "", *self._verdict()]
        if self.changed_images:
            at_scores = " and ".join(f"{threshold:.2f}" for threshold in self.thresholds)
            rows = [("image", "boxes", "first", "second", "difference")]
            for image in self.changed_images:
                f1 = (shown(image.first_f1), shown(image.second_f1), _signed(image.difference))
                rows.append((str(image.image_id), str(image.num_truth), *f1))
            lines += ["", f"images with the largest change in F1, at score thresholds {at_scores}", *aligned(rows)]
        else:
            lines += ["", "the F1 of every image is unchanged"]
        if self.out is not None:
            lines += ["", f"comparison: {self.out}"]
        return lines

    def of(self, name: str, class_index: int | None) -> tuple[MetricValue, MetricValue, MetricValue]:
        """Return the first value, second value and difference of a metric, over all classes or for one."""
        sides = (self.numbers.first, self.numbers.second, self.numbers.difference)
        first, second, difference = (
            (side.overall if class_index is None else side.per_class[class_index])[name] for side in sides
        )
        return first, second, difference

    def _cells(self, name: str, class_index: int | None) -> tuple[str, str, str, str, str]:
        first, second, difference = self.of(name, class_index)
        bounds = "–" if difference.low is None else f"{_signed(difference.low)} … {_signed(difference.high)}"
        verdict = "significant" if difference.excludes_zero else ""
        return shown(first.value), shown(second.value), _signed(difference.value), bounds, verdict

    def _verdict(self) -> list[str]:
        """Return sentences that name the significant differences."""
        overall = self.numbers.difference.overall["AP"]
        if overall.value is None:
            return ["nothing to measure: no labelled box counts"]
        if overall.low is None:
            lines = ["AP: too few images to tell the difference from chance"]
        elif not overall.excludes_zero:
            lines = ["AP: no significant difference; the interval includes 0"]
        else:
            word = "better" if overall.value > 0 else "worse"
            lines = [f"AP: the second is significantly {word}; the interval excludes 0"]
        by_class = [numbers["AP"] for numbers in self.numbers.difference.per_class]
        num_measured = sum(interval.low is not None for interval in by_class)
        for word, sign in (("better", 1), ("worse", -1)):
            names = [
                category.name
                for category, interval in zip(self.categories, by_class, strict=True)
                if interval.excludes_zero and sign * (interval.value or 0) > 0
            ]
            lines.append(f"significantly {word} in {len(names)} of {num_measured} classes: {', '.join(names)}")
        lines[1:] = [line.removesuffix(": ") for line in lines[1:]]
        by_chance = (1 - LEVEL) * num_measured
        if by_chance >= 1:
            lines.append(f"about {by_chance:.0f} of {num_measured} classes would appear significant by chance")
        return lines


def _signed(value: float | None) -> str:
    return shown(value, "+.3f")


@with_options(CompareConfig)
def compare(config: CompareConfig, *, console: Console | None = None) -> Comparison:
    """Measure two runs on the same images and report their differences, with significance.

    With `config.out`, the tables OUT/comparison and OUT/changed_images are written after all computation.

    Raises:
        UserError: An input is missing, damaged or of the wrong kind, its images or classes differ from those of the
            truth, or `config.out` holds something else. Nothing has been written in that case.
    """
    config = dataclasses.replace(
        config,
        truth=storage.absolute_uri(config.truth),
        first=storage.absolute_uri(config.first),
        second=storage.absolute_uri(config.second),
        out=None if config.out is None else storage.absolute_uri(config.out),
    )
    console = console or Console()
    if config.out is None:
        return _compare(config, console)
    with open_folder(config.out, command="compare") as folder:
        is_disposable = not is_table(folder.uri_of("comparison"))
        folder.admit(identity(config), folders=_KINDS, part=_PART, is_disposable=is_disposable)
        comparison = _compare(config, console)
        _write(folder, config, comparison)
    return comparison


def _compare(config: CompareConfig, console: Console) -> Comparison:
    with console.progress("reading and matching") as progress:
        truth = read_truth(config.truth)
        first, second = (_match_run(truth, uri, config.join) for uri in (config.first, config.second))
        numbers = paired_differences(
            first.matches, second.matches, num_resamples=config.bootstrap, seed=config.seed, progress=progress
        )
    return Comparison(
        names=_names(config.first, config.second),
        categories=truth.categories,
        num_images=len(first.matches.image_ids),
        num_truth=len(first.matches.truth_category),
        numbers=numbers,
        thresholds=(first.threshold, second.threshold),
        changed_images=_changed_images(first, second, config.num_images),
        out=config.out,
        notes=tuple(dict.fromkeys(run.note for run in (first, second) if run.note is not None)),
    )


@dataclass(frozen=True)
class _ComparedRun:
    """A matched run; `threshold` is the score threshold of its best F1."""

    matches: Matches
    outcomes: Outcomes
    threshold: float
    note: str | None


def _match_run(truth: Truth, uri: str, join: JoinKey) -> _ComparedRun:
    scored, num_categories = read_detections(uri, truth, join=join), len(truth.categories)
    matches = match_in_parts(
        scored.truth_columns, scored.columns, lambda labelled, found, _: match(labelled, found, num_categories)
    )
    outcomes = outcomes_at(matches)
    best = best_threshold(outcomes.scores, outcomes.is_right, len(outcomes.truth_row))
    return _ComparedRun(matches, outcomes, best.threshold, scored.note)


def _names(first: str, second: str) -> tuple[str, str]:
    """Return the shortest trailing path components that distinguish two URIs."""
    parts = [uri.rstrip("/").removesuffix(".json").split("/") for uri in (first, second)]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if names[0] != names[1]:
            break
    else:
        names = [own[-1] for own in parts]
    return names[0], names[1]


def _changed_images(first: _ComparedRun, second: _ComparedRun, num_images: int) -> tuple[ChangedImage, ...]:
    """Return the images with the largest change in F1; ties are ordered by number of boxes (descending), then by id."""
    tables = [per_image(run.matches, run.outcomes, threshold=run.threshold) for run in (first, second)]
    f1 = [table.column("f1").to_pylist() for table in tables]
    image_ids, num_truth = first.matches.image_ids, tables[0].column("num_truth").to_numpy()
    before, after = (np.array([1.0 if value is None else value for value in values]) for values in f1)
    difference = after - before
    order = np.lexsort((image_ids, -num_truth, -np.abs(difference)))
    order = order[difference[order] != 0][:num_images]
    return tuple(
        ChangedImage(
            image_id=int(image_ids[row]),
            num_truth=int(num_truth[row]),
            first_f1=f1[0][row],
            second_f1=f1[1][row],
            difference=float(difference[row]),
        )
        for row in order.tolist()
    )


def _write(folder: OutputFolder, config: CompareConfig, comparison: Comparison) -> None:
    """Write both tables; `comparison` is deleted first and written last, so its presence means both are complete."""
    tables = {"comparison": _comparison_table(comparison), "changed_images": _changed_images_table(comparison)}
    for kind in reversed(_KINDS):
        folder.delete_table(kind)
    folder.begin(identity(config), folders=_KINDS, part=_PART)
    for kind in _KINDS:
        with TableWriter(folder.uri_of(kind), tables[kind].schema, config_hash=config_hash(config)) as writer:
            for batch in tables[kind].to_batches():
                writer.write(batch)


def _comparison_table(comparison: Comparison) -> pa.Table:
    over = [(None, None), *((category.name, index) for index, category in enumerate(comparison.categories))]
    rows = []
    for category, index in over:
        for metric in comparison.numbers.difference.overall:
            first, second, difference = comparison.of(metric, index)
            about: dict[str, Any] = dict(zip(("first", "second"), comparison.names, strict=True))
            about |= {"metric": metric, "category": category}
            values = {"first_value": first.value, "second_value": second.value, "difference": difference.value}
            rows.append({**about, **values, "low": difference.low, "high": difference.high})
    return pa.Table.from_pylist(rows, schema=build_schema("comparison", comparison.categories))


def _changed_images_table(comparison: Comparison) -> pa.Table:
    first, second = comparison.names
    rows = [{"first": first, "second": second, **dataclasses.asdict(image)} for image in comparison.changed_images]
    return pa.Table.from_pylist(rows, schema=build_schema("changed_images", comparison.categories))
