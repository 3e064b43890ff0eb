"""`fit`: truth and the detections of a checkpoint → its operating point, written into the checkpoint."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raydet.common.class_names import indices_in
from raydet.common.console import Console, aligned, shown
from raydet.common.errors import UserError
from raydet.common.notebook.showing import Shown
from raydet.config import FitConfig
from raydet.config.fields import with_options
from raydet.measuring.detections import Scored, read_detections
from raydet.measuring.diagnosis.scores import IOU, Outcomes, best_threshold, calibration_errors
from raydet.measuring.fitting.calibrating import Calibration, Method, calibrate
from raydet.measuring.fitting.operating_point import FittedPoint
from raydet.measuring.fitting.scores import map_scores, passing
from raydet.measuring.fitting.suppression import choose_nms, outcomes_of
from raydet.measuring.fitting.thresholds import point_values, threshold_with_precision
from raydet.measuring.numbers.values import Block
from raydet.measuring.truth import is_json, read_truth
from raydet.models.checkpoints import Checkpoint, fingerprint, read_checkpoint
from raydet.tables import storage
from raydet.tables.columns import Floats, keep_detections
from raydet.tables.output_folder import OutputFolder
from raydet.tables.schema import Category


@dataclass(frozen=True, kw_only=True)
class FittedClass:
    """Operating point of a class, or of all classes together.

    Attributes:
        name: Class name; None for all classes.
        threshold: Lowest score that passes, before calibration; None if nothing passes, or for all classes.
        calibrated_threshold: The same score after calibration.
        values: `precision`, `recall` and `F1` at the point, with 95 % intervals, at IoU 0.5.
        ece_before: Expected calibration error of the scores; None without detections.
        ece_after: The same of calibrated scores, on images that the calibration was not fitted on.
    """

    name: str | None
    threshold: float | None
    calibrated_threshold: float | None
    values: Block
    ece_before: float | None
    ece_after: float | None


@dataclass(frozen=True, kw_only=True)
class FitResult(Shown):
    """Result of `fit`.

    Attributes:
        out: File in the checkpoint that holds the operating point.
        num_images: Number of images.
        num_truth: Number of labelled boxes that count.
        target_precision: Precision that the thresholds were chosen for; None for the best F1.
        calibration: `isotonic` or `temperature`; None if neither predicts better than the scores themselves.
        class_agnostic_nms: IoU threshold of class-agnostic suppression; None if it does not raise F1.
        overall: All classes together.
        classes: The classes of the checkpoint, by index.
    """

    out: str
    num_images: int
    num_truth: int
    target_precision: float | None
    calibration: Method | None
    class_agnostic_nms: float | None
    overall: FittedClass
    classes: tuple[FittedClass, ...]

    def lines(self) -> list[str]:
        """Return the operating point as text: a row for each class, then what else was chosen."""
        names = [value.metric for value in self.overall.values]
        header = ("class", "threshold", *(cell for name in names for cell in (name, "95 %")), "ECE before", "after")
        rows: list[tuple[str, ...]] = [header]
        for item in (self.overall, *self.classes):
            numbers = [cell for value in item.values for cell in (shown(value.value), value.bounds_text)]
            errors = shown(item.ece_before), shown(item.ece_after)
            rows.append((item.name or "all classes", shown(item.threshold), *numbers, *errors))
        without = [str(item.name) for item in self.classes if item.threshold is None]
        aim = "best F1" if self.target_precision is None else f"precision of at least {self.target_precision:g}"
        nothing = f"no threshold, so nothing passes: {', '.join(without)}"
        method = f"scores calibrated: {self.calibration}" if self.calibration else "scores left as they are"
        nms = self.class_agnostic_nms
        suppression = "none" if nms is None else f"IoU {nms:g}"
        return [
            f"{self.num_images:,} images, {self.num_truth:,} boxes; thresholds for {aim}",
            "",
            *aligned(rows),
            "",
            *([nothing] if without else []),
            f"{method}; class-agnostic suppression: {suppression}",
            "precision, recall and F1 are those of the images that the thresholds were fitted on",
            f"operating point: {self.out}",
        ]


@with_options(FitConfig)
def fit(config: FitConfig, *, console: Console | None = None) -> FitResult:
    """Choose the operating point of a checkpoint and write it into its folder, in place of an earlier one.

    Detections are matched with the truth as `evaluate` matches them, at IoU 0.5. Thresholds have the best F1 of their
    class, or a target precision (see `thresholds.threshold_with_precision`).

    Raises:
        UserError: An input is missing or damaged, the checkpoint is not a folder, other detections than its own are
            given, or none of them is right. Nothing has been written in that case.
    """
    with (console or Console()).progress("reading the truth") as progress:
        checkpoint, own_fingerprint = _own_checkpoint(config)
        truth = read_truth(config.truth)
        progress.begin("reading the detections")
        scored = read_detections(config.detections, truth)
        progress.begin("fitting")
        fitted = _fit(config, scored, len(truth.categories))
        point, result = _of_checkpoint(fitted, checkpoint, truth.categories, config, own_fingerprint)
        return dataclasses.replace(result, out=point.write(checkpoint.name))


def _own_checkpoint(config: FitConfig) -> tuple[Checkpoint, str]:
    """Return the checkpoint and its fingerprint.

    Raises:
        UserError: It is no folder, or another model made the detections, or with an operating point.
    """
    if not storage.exists(config.checkpoint):
        raise UserError(
            f"no such checkpoint folder: {config.checkpoint}; the operating point is written into the checkpoint, so "
            "download a model of the Hub into a folder first (hf download NAME --local-dir FOLDER)"
        )
    checkpoint = read_checkpoint(config.checkpoint, takes_graph=True)
    uri = storage.absolute_uri(config.detections)
    is_file = is_json(uri, "detections", "a detections table that predict wrote")
    record = None if is_file else OutputFolder(uri, "predict").record()
    made_by = None if record is None or record.command != "predict" else record.identity
    if made_by is None:
        raise UserError(f"{uri} does not say which model made it: expected a detections table that predict wrote")
    own_fingerprint = fingerprint(config.checkpoint)
    if made_by.get("checkpoint_fingerprint") != own_fingerprint:
        other = made_by.get("checkpoint") or made_by.get("model")
        raise UserError(
            f"{uri} was made by another model ({other}), or {checkpoint.name} has changed since; run predict with this "
            "checkpoint first"
        )
    if made_by.get("operating_point"):
        raise UserError(f"{uri} was made with --operating-point: fit needs all detections; run predict without it")
    return checkpoint, own_fingerprint


@dataclass(frozen=True)
class _Fitted:
    """Operating point by the truth's category index, and what was measured."""

    thresholds: tuple[float | None, ...]
    calibration: Calibration
    class_agnostic_nms: float | None
    values: list[Block]
    ece: tuple[list[float | None], list[float | None]]
    outcomes: Outcomes


def _fit(config: FitConfig, scored: Scored, num_classes: int) -> _Fitted:
    truth, found = scored.truth_columns, scored.columns
    outcomes = outcomes_of(truth, found, num_classes)
    if not outcomes.is_right.any():
        raise UserError(
            f"no detection of {scored.uri} finds a labelled box of {config.truth} at IoU {IOU:g}: there is nothing to "
            "fit thresholds to"
        )
    calibration = calibrate(outcomes, seed=config.seed)
    thresholds = _thresholds(outcomes, config.target_precision)
    kept = keep_detections(found, passing(thresholds, found.scores, found.category))
    calibrated = map_scores(calibration.maps, kept.scores, kept.category)
    nms, at_point = choose_nms(
        truth,
        kept,
        calibrated,
        num_classes,
        seed=config.seed,
        keeps_precision=config.target_precision is not None,
    )
    after = dataclasses.replace(outcomes, scores=calibration.held_out)
    ece = calibration_errors(outcomes), calibration_errors(after)
    return _Fitted(thresholds, calibration, nms, point_values(at_point), ece, outcomes)


def _thresholds(outcomes: Outcomes, target_precision: float | None) -> tuple[float | None, ...]:
    """Return the threshold of each class, None for a class without one."""
    thresholds: list[float | None] = []
    if target_precision is None:
        for scores, is_right, num_truth in outcomes.by_class():
            thresholds.append(best_threshold(scores, is_right, num_truth).threshold if is_right.any() else None)
        return tuple(thresholds)
    for index in range(outcomes.num_categories):
        own = outcomes.category == index
        parts = outcomes.scores[own], outcomes.is_right[own], outcomes.image[own].astype(np.int64)
        thresholds.append(threshold_with_precision(*parts, target_precision))
    return tuple(thresholds)


def _of_checkpoint(
    fitted: _Fitted, checkpoint: Checkpoint, categories: Sequence[Category], config: FitConfig, own_fingerprint: str
) -> tuple[FittedPoint, FitResult]:
    """Convert to the category indices of the checkpoint; nothing passes of classes that the truth lacks."""
    names = tuple(category.name for category in checkpoint.categories)
    places = indices_in(names, [category.name for category in categories]).tolist()
    point = FittedPoint(
        classes=names,
        thresholds=tuple(None if place < 0 else fitted.thresholds[place] for place in places),
        maps=tuple(None if place < 0 else fitted.calibration.maps[place] for place in places),
        class_agnostic_nms=fitted.class_agnostic_nms,
        target_precision=config.target_precision,
        model_fingerprint=own_fingerprint,
    )
    before, after = fitted.ece
    overall, *by_class = fitted.values
    known = [(index, place) for index, place in enumerate(places) if place >= 0]
    classes = tuple(
        FittedClass(
            name=names[index],
            threshold=point.thresholds[index],
            calibrated_threshold=_calibrated(point, index),
            values=by_class[place],
            ece_before=before[place + 1],
            ece_after=after[place + 1],
        )
        for index, place in known
    )
    everything = FittedClass(
        name=None,
        threshold=None,
        calibrated_threshold=None,
        values=overall,
        ece_before=before[0],
        ece_after=after[0],
    )
    return point, FitResult(
        out="",
        num_images=len(fitted.outcomes.image_ids),
        num_truth=len(fitted.outcomes.truth_row),
        target_precision=config.target_precision,
        calibration=fitted.calibration.method,
        class_agnostic_nms=fitted.class_agnostic_nms,
        overall=everything,
        classes=classes,
    )


def _calibrated(point: FittedPoint, index: int) -> float | None:
    threshold = point.thresholds[index]
    if threshold is None:
        return None
    calibrated: Floats = point.calibrated(np.array([threshold]), np.array([index]))
    return float(calibrated[0])
