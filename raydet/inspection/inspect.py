"""Images table → HTML page with statistics, findings, and the model's view of the images in training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raydet.common.console import Console, aligned, counted
from raydet.common.display.progress import Progress
from raydet.common.errors import UserError
from raydet.common.notebook.showing import Shown
from raydet.common.redaction import without_secrets
from raydet.config import InspectConfig, TrainConfig, config_hash, identity
from raydet.config.fields import with_options
from raydet.config.options import load_file
from raydet.inspection.counting import Counts
from raydet.inspection.findings import MEANINGS, DataFinding, Findings, add_class_findings, add_row_findings
from raydet.inspection.identical import identical_images
from raydet.inspection.picks import Picker
from raydet.inspection.prepared import add_prepared_findings, preparation_of
from raydet.inspection.rows import stream_mixture
from raydet.inspection.tables import FOLDERS, PAGE_FILE, drifts, write_tables
from raydet.models.recipes.resolve import resolve
from raydet.tables.output_folder import OutputFolder, open_folder
from raydet.tables.table import open_table
from raydet.training.feeding.counts import EpochShare, lines_of, shown_of
from raydet.training.feeding.mixture import Mixture
from raydet.training.feeding.ordering import RunPlan
from raydet.training.feeding.sources import merged, weighted, with_absolute_sources, with_repeats
from raydet.training.recovery.overrides import given_settings

_MOST_CLASSES_IN_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Inspection(Shown):
    """Result of `inspect`.

    Attributes:
        out: Folder with inspect.html and the tables.
        num_bytes: Size of that file.
        names: Class names by index.
        counts: Counts by split: `data`, and `val` if given.
        num_images_shown: Number of images shown on the page.
        sources: What an epoch of training shows of each table of `data`, if there are several or images are repeated.
    """

    out: str
    page: str
    num_bytes: int
    names: tuple[str, ...]
    counts: dict[str, Counts]
    findings: Findings
    num_images_shown: int
    sources: tuple[EpochShare, ...] = ()

    def lines(self) -> list[str]:
        """Return the summary as text."""
        lines = []
        for split, counts in self.counts.items():
            parts = ((counts.num_images, "image", "images"), (counts.num_boxes, "box", "boxes"))
            about = ", ".join(counted(*part) for part in (*parts, (counts.num_classes, "class", "classes")))
            lines.append(about if split == "data" else f"validation: {about}")
        counts = self.counts["data"]
        rows: list[tuple[str, ...]] = [("class", "boxes", "images", "small", "medium", "large")]
        order = np.argsort(-counts.boxes, kind="stable").tolist()
        for index in order[:_MOST_CLASSES_IN_LINES]:
            numbers = (counts.boxes[index], counts.images[index], *counts.sizes[index])
            rows.append((self.names[index], *(f"{number:,}" for number in numbers)))
        lines += ["", *aligned(rows)] if order else []
        if len(order) > _MOST_CLASSES_IN_LINES:
            lines.append(f"… and {len(order) - _MOST_CLASSES_IN_LINES:,} classes with fewer boxes")
        lines += ["", *lines_of(self.sources, self.names)] if self.sources else []
        lines += ["", *self._finding_lines(), f"page ({self.num_bytes / 1e6:.1f} MB): {self.page}"]
        return lines

    def _finding_lines(self) -> list[str]:
        rows = []
        for split, kind in self.findings.sorted_keys():
            title = MEANINGS[kind][0] if kind in MEANINGS else kind
            where = " (validation)" if split == "val" else ""
            rows.append((f"{title}{where}", f"{self.findings.counts[split, kind]:,}"))
        for name, value in drifts(self.counts).items():
            if name in ("classes", "box_side_px") and value is not None:
                what = "classes" if name == "classes" else "box sizes"
                rows.append((f"difference in {what} from the validation data, 0 to 1", f"{value:.2f}"))
        return [*aligned(rows), ""] if rows else ["no findings", ""]


@with_options(InspectConfig)
def inspect(config: InspectConfig, *, console: Console | None = None) -> Inspection:
    """Write OUT/inspect.html and the tables next to it.

    Several tables are mixed as in training. Each is streamed without its image bytes, and memory does not grow with its
    rows, except for a few numbers per image that plan the epoch. Image bytes are read only for the images that are
    drawn, and for all images to compare them with `val_data`.

    Raises:
        UserError: The images table is missing or empty, an augmentation, model or training config is invalid, or OUT
            holds other files. Nothing has been written in that case.
    """
    sources = weighted(config.data, "data")
    training = with_absolute_sources(_training(config, sources[0][0]))
    tables = {"data": _open(sources, training)}
    if config.val_data is not None:
        tables["val"] = _open([(config.val_data, 1.0)], training)
    with open_folder(config.out, command="inspect") as folder:
        own_identity = identity(config) | {
            "data": training.train_data,
            "val_data": tables["val"].uri if "val" in tables else None,
        }
        folder.admit(own_identity, folders=tuple(FOLDERS), is_disposable=not folder.exists(PAGE_FILE))
        with (console or Console()).progress("loading the view of the model") as progress:
            return _inspect_into(folder, own_identity, config, training, tables, progress)


def _inspect_into(
    folder: OutputFolder,
    own_identity: dict[str, Any],
    config: InspectConfig,
    given: TrainConfig,
    tables: dict[str, Mixture],
    progress: Progress,
) -> Inspection:
    data = tables["data"] = with_repeats(tables["data"], given.repeat_rare)
    training = resolve(given, num_images=data.num_shown, gpus=lambda: 0).config
    # Imported only now: they import torch, which takes seconds that an invalid option should not cost.
    from raydet.augmentation.transforms import check_augmentation
    from raydet.augmentation.view import View
    from raydet.inspection.galleries import FirstEpoch, draw_galleries
    from raydet.inspection.page import render
    from raydet.models.loading import resize_rules_for

    check_augmentation(training.augmentation)
    rule, step_rules = resize_rules_for(training.model, training.image_size, training.multi_scale)
    findings, counts, picker = Findings(), {}, Picker(config.seed)
    for split, table in tables.items():
        chooser = picker if split == "data" and config.num_images else None
        progress.begin("counting" if split == "data" else "counting the validation data", total=table.num_rows)
        counts[split] = _count(table, split, findings, max(rule.target_size_hw((1000, 1000))), chooser, progress)
    _add_prepared(findings, tables)
    if "val" in tables:
        progress.begin("comparing with the validation data")
        _compare(data, tables["val"], counts, findings)
    sources = tuple(shown_of(data)) if len(data.sources) > 1 or data.repeats is not None else ()
    first_epoch = FirstEpoch(
        table=data,
        plan=RunPlan.of_training(training, data, num_val=0),
        view=View.of_training(training, rule, step_rules),
    )
    progress.begin("drawing")
    galleries = draw_galleries(first_epoch, picker.picks(config.num_images), counts["data"].boxes)
    categories = {split: table.categories for split, table in tables.items()}
    page = render(tables, counts, findings, galleries, training, sources).encode()

    folder.delete_file(PAGE_FILE)
    folder.begin(own_identity, folders=tuple(FOLDERS))
    write_tables(folder, counts, findings, categories, config_hash(config))
    folder.write_bytes(page, PAGE_FILE)
    return Inspection(
        out=folder.uri,
        page=folder.uri_of(PAGE_FILE),
        num_bytes=len(page),
        names=tuple(category.name for category in data.categories),
        counts=counts,
        findings=findings,
        num_images_shown=sum(len(gallery.pairs) for gallery in galleries),
        sources=sources,
    )


def _open(sources: Sequence[tuple[str, float]], training: TrainConfig) -> Mixture:
    """Open tables, given by URI and weight, with the new names of their classes."""
    assert not isinstance(training.rename_classes, str), "`with_absolute_sources` reads the file"
    opened = [open_table(uri, "images") for uri, _ in sources]
    for table in opened:
        if not table.num_rows:
            raise UserError(f"the images table {table.uri} has no rows to inspect")
    return merged(opened, [weight for _, weight in sources], training.rename_classes or {})


def _training(config: InspectConfig, first: str) -> TrainConfig:
    """Return the training config whose view is shown: the recipe, or train's defaults, with the overriding options.

    A training needs validation data: the first table if the config has none.
    """
    given = {name: getattr(config, name) for name in ("augmentation", "model", "image_size")}
    given = {name: value for name, value in given.items() if value is not None}
    paths: dict[str, Any] = {"train_data": config.data, "val_data": config.val_data or first, "out": config.out}
    if config.train_config is None:
        return TrainConfig(**paths, **given)
    training = load_file(TrainConfig, config.train_config, **paths, **given)
    return replace(training, **(given_settings(training.override) | given))


def _count(
    table: Mixture, split: str, findings: Findings, model_side_px: int, picker: Picker | None, progress: Progress
) -> Counts:
    names = [category.name for category in table.categories]
    counts = Counts(len(names))
    for rows in progress.over(stream_mixture(table), count=lambda rows: len(rows.image_ids)):
        counts.add(rows)
        add_row_findings(findings, rows, split, names, model_side_px)
        if picker is not None:
            picker.add(rows)
    add_class_findings(findings, counts, split, names)
    return counts


def _add_prepared(findings: Findings, tables: dict[str, Mixture]) -> None:
    """Add the findings of `prepare`, only once if several tables come from one preparation."""
    seen: set[str] = set()
    for split, table in ((split, source.table) for split, mixture in tables.items() for source in mixture.sources):
        preparation = preparation_of(table)
        if preparation is not None:
            is_first = preparation.uri not in seen
            add_prepared_findings(findings, table, split, preparation, with_left_out=is_first)
            seen.add(preparation.uri)


def _compare(data: Mixture, val: Mixture, counts: dict[str, Counts], findings: Findings) -> None:
    """Add findings for images that both splits have, and for classes with boxes in only one of them."""
    (validated,) = (source.table for source in val.sources)
    for twin in identical_images([source.table for source in data.sources], validated):
        about = {"table": without_secrets(twin.table), "image_id": twin.image_id, "path": twin.path}
        detail = f"image {twin.val_image_id} of the validation data"
        findings.add(DataFinding(split="data", kind="identical_images", detail=detail, **about))
    labelled = {
        split: {table.categories[index].name: None for index in np.flatnonzero(counts[split].boxes).tolist()}
        for split, table in (("data", data), ("val", val))
    }
    for kind, split, other in (("class_only_in_data", "data", "val"), ("class_only_in_val", "val", "data")):
        for name in labelled[split]:
            if name not in labelled[other]:
                findings.add(DataFinding(split="val", kind=kind, category=name))
