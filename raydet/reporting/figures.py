"""Tables of a run → rows for the page template, and chart data as plain JSON."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.console import shown
from raydet.measuring.numbers.values import MetricValue
from raydet.measuring.slices import in_words
from raydet.reporting.run_tables import RunTables, indices_in
from raydet.training.history import EpochRecord

HEADLINE = {
    "AP": "IoU .50 to .95",
    "AP50": "IoU .50",
    "AP75": "IoU .75",
    "APs": "small, up to 32² px",
    "APm": "medium, up to 96² px",
    "APl": "large, over 96² px",
    "AR100": "100 detections per image",
}
"""Metrics at the top of the page, with their measuring conditions."""
ERRORS = {
    "class": ("Wrong class", "right location, wrong class"),
    "location": ("Poor box", "right class, poorly fitting box"),
    "both": ("Class and box", "wrong class and poorly fitting box"),
    "duplicate": ("Duplicate", "the object was already detected"),
    "background": ("Background", "no labelled object at this location"),
    "missed": ("Missed", "labelled object without a detection"),
}
OVERALL_ERRORS = {
    "false_positive": ("All false positives", "every wrong detection"),
    "false_negative": ("All false negatives", "every labelled object that was not found"),
}
_MOST_IN_CONFUSION = 120
_MOST_CLASSES_WITH_ALL_CURVES = 300
_METRICS = ("AP", "AP50", "AP75", "AR100")
"""Columns of the tables of classes and of slices."""

_Floats = npt.NDArray[np.float64]


def title_of(run: RunTables) -> str:
    """Return the run's name or, if that is only the usual name of a detections folder, the model's."""
    parts = [part for part in (run.model or "").split("/") if part not in ("", "checkpoint", "last")]
    named_after_folder = run.run in ("", "detections") and bool(parts)
    return parts[-1] if named_after_folder else run.run or "Detection report"


def headline(run: RunTables) -> list[dict[str, Any]]:
    """Return the headline metrics: name, measuring conditions, and value with interval."""
    return [
        {"name": name, "detail": detail, "number": run.value(name)}
        for name, detail in HEADLINE.items()
        if (None, name, None) in run.values
    ]


def class_rows(run: RunTables) -> list[dict[str, Any]]:
    """Return a row per class: its metrics, and precision and recall at the threshold of its best F1."""
    boxes = _boxes_by_class(run)
    rows = []
    for name in run.classes:
        numbers = {metric: run.value(metric, name) for metric in _METRICS}
        best = {key: run.value(f"best_f1_{key}", name).value for key in ("threshold", "precision", "recall")}
        rows.append({"name": name, **numbers, **best, "boxes": boxes.get(name)})
    return rows


def point_rows(run: RunTables) -> list[dict[str, Any]]:
    """Return precision, recall and F1 at the operating point, over all classes and by class; empty without one."""
    names: list[str | None] = [None, *run.classes]
    rows = [(name, {metric: run.value(metric, name) for metric in ("precision", "recall", "F1")}) for name in names]
    has_point = (None, "precision", None) in run.values
    return [{"name": name or "all classes", **numbers} for name, numbers in rows] if has_point else []


def slice_rows(run: RunTables) -> list[dict[str, Any]]:
    """Return a row for all images, then one per slice, with its name in words."""
    places: list[str | None] = [None, *run.slices]
    names = ["all images", *map(in_words, run.slices)]
    return [
        {"name": name, **{metric: run.value(metric, None, place) for metric in _METRICS}}
        for name, place in zip(names, places, strict=True)
    ]


def error_rows(run: RunTables) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the kinds of error over all classes, then the two sums: name, meaning, count, AP50 points, bar length."""
    table = run.tables.get("errors")
    found = {} if table is None else {row["error"]: row for row in table.to_pylist() if row["category"] is None}
    longest = max([row["ap_points"] or 0.0 for row in found.values()] + [1e-9])

    def rows(names: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
        return [
            {
                "key": key,
                "name": title,
                "detail": detail,
                "count": found[key]["count"],
                "points": None if found[key]["ap_points"] is None else 100 * found[key]["ap_points"],
                "share": max(0.0, (found[key]["ap_points"] or 0.0) / longest),
            }
            for key, (title, detail) in names.items()
            if key in found
        ]

    return rows(ERRORS), rows(OVERALL_ERRORS)


def charts(run: RunTables, history: Sequence[EpochRecord]) -> dict[str, Any]:
    """Return the data of all charts, None for a chart without data; `history` is empty without a training run."""
    return {
        "classes": list(run.classes),
        "curves": _curves(run),
        "calibration": _calibration(run),
        "confusion": _confusion(run),
        "errors": _errors_by_class(run),
        "images": _f1_histogram(run),
        "training": _training(history),
    }


def _numbers(values: _Floats, digits: int = 4) -> list[float | None]:
    """Return rounded numbers for JSON, with None for NaN and infinity."""
    return [round(value, digits) if math.isfinite(value) else None for value in values.tolist()]


def _boxes_by_class(run: RunTables) -> dict[str, int]:
    """Return the number of labelled boxes that count, by class."""
    table = run.tables.get("confusion")
    if table is None:
        return {}
    sums = table.filter(pc.is_valid(table["truth"])).group_by("truth").aggregate([("count", "sum")])
    boxes = dict.fromkeys(run.classes, 0)
    boxes.update(zip(sums["truth"].to_pylist(), sums["count_sum"].to_pylist(), strict=True))
    return boxes


def _groups(table: pa.Table, classes: Sequence[str]) -> list[tuple[int | None, pa.Table]]:
    """Return the rows of each class in a table by class index; None represents all classes and comes first."""
    place_of: dict[str | None, int] = {name: place for place, name in reversed(list(enumerate(classes)))}
    place_of[None] = -1
    places = np.array([place_of.get(name, -2) for name in table["category"].to_pylist()], np.int64)
    order = np.argsort(places, kind="stable")
    found, starts = np.unique(places[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    sorted_table = table.take(pa.array(order))
    return [
        (None if place == -1 else place, sorted_table.slice(start, end - start))
        for place, start, end in zip(found.tolist(), starts.tolist(), ends, strict=True)
        if place >= -1
    ]


def _curves(run: RunTables) -> list[dict[str, Any]] | None:
    """Return the precision-recall curves; recalls that equal those of the first curve are omitted."""
    table = run.tables.get("pr_curves")
    if table is None:
        return None
    if len(run.classes) > _MOST_CLASSES_WITH_ALL_CURVES:
        table = table.filter(pc.or_(pc.is_null(table["category"]), pc.equal(table["iou"], 0.5)))
    curves: list[dict[str, Any]] = []
    common: list[float | None] = []
    for place, rows in _groups(table, run.classes):
        ious = rows["iou"].to_numpy()
        for iou in (0.5, 0.75, None):
            chosen = np.isnan(ious) if iou is None else np.isclose(ious, iou)
            if not chosen.any():
                continue
            recall, precision, score = (
                _numbers(rows[name].to_numpy()[chosen]) for name in ("recall", "precision", "score")
            )
            curve: dict[str, Any] = {"class": place, "iou": iou, "precision": precision}
            if any(value is not None for value in score):
                curve["score"] = score
            if recall != common:
                curve["recall"] = recall
                common = common or recall
            curves.append(curve)
    return curves


def _calibration(run: RunTables) -> list[dict[str, Any]] | None:
    table = run.tables.get("calibration")
    if table is None:
        return None
    return [
        {
            "class": place,
            "error": run.value("ECE", None if place is None else run.classes[place]).value,
            "count": rows["count"].to_pylist(),
            **{name: _numbers(rows[name].to_numpy()) for name in ("low", "high", "mean_score", "precision")},
        }
        for place, rows in _groups(table, run.classes)
    ]


def _confusion(run: RunTables) -> dict[str, Any] | None:
    """Return the counts above 0 as [truth, detected, count]; the index after the last class means "none"."""
    table = run.tables.get("confusion")
    if table is None:
        return None
    nothing = len(run.classes)
    truth, detected = (
        np.array([nothing if place is None else place for place in indices_in(table[name], run.classes)])
        for name in ("truth", "detected")
    )
    count = table["count"].to_numpy()
    shown = np.arange(nothing)
    if nothing > _MOST_IN_CONFUSION:
        is_mistake = truth != detected
        mistakes = sum(np.bincount(side[is_mistake], count[is_mistake], nothing + 1) for side in (truth, detected))
        shown = np.sort(np.argsort(-np.asarray(mistakes)[:nothing], kind="stable")[:_MOST_IN_CONFUSION])
    place_of = np.full(nothing + 1, -1)
    place_of[shown], place_of[nothing] = np.arange(len(shown)), len(shown)
    rows, columns = place_of[truth], place_of[detected]
    kept = (rows >= 0) & (columns >= 0) & (count > 0)
    sums = np.bincount(truth, count, nothing + 1)[[*shown.tolist(), nothing]].astype(np.int64)
    return {
        "names": [run.classes[place] for place in shown.tolist()],
        "cells": np.stack([rows[kept], columns[kept], count[kept]], axis=1).tolist(),
        "sums": sums.tolist(),
        "num_classes": nothing,
    }


def _errors_by_class(run: RunTables) -> dict[str, Any] | None:
    """Return the AP50 points that each kind of error costs each class, costliest class first."""
    table = run.tables.get("errors")
    if table is None:
        return None
    points = np.zeros((len(ERRORS), len(run.classes)))
    counts = np.zeros((len(ERRORS), len(run.classes)), np.int64)
    kinds = list(ERRORS)
    for place, row in zip(indices_in(table["category"], run.classes), table.to_pylist(), strict=True):
        if place is not None and row["error"] in kinds:
            points[kinds.index(row["error"]), place] = 100 * (row["ap_points"] or 0.0)
            counts[kinds.index(row["error"]), place] = row["count"] or 0
    order = np.argsort(-points.sum(axis=0), kind="stable")
    order = order[(points.sum(axis=0) + counts.sum(axis=0))[order] > 0]
    return {
        "classes": order.tolist(),
        "kinds": [
            {"name": title, "points": _numbers(points[index, order], 2), "count": counts[index, order].tolist()}
            for index, (title, _) in enumerate(ERRORS.values())
        ],
    }


def _f1_histogram(run: RunTables) -> dict[str, Any] | None:
    """Return the number of images by F1, in twenty bins of equal width."""
    table = run.tables.get("per_image")
    if table is None:
        return None
    f1 = table["f1"].drop_null().to_numpy()
    counts, _ = np.histogram(f1, bins=20, range=(0.0, 1.0))
    return {"count": counts.tolist(), "without": table.num_rows - len(f1)}


def _training(history: Sequence[EpochRecord]) -> dict[str, Any] | None:
    """Return a list for each metric of the epochs, with None for epochs without it."""
    if not history:
        return None
    columns: dict[str, list[float | None]] = {"epoch": [record.epoch for record in history]}
    columns["loss"] = [_finite(record.loss) for record in history]
    columns |= {name: [_finite(record.value(name)) for record in history] for name in ("AP", "AP50", "AP75")}
    return {name: column for name, column in columns.items() if any(value is not None for value in column)}


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def number(value: MetricValue | float | None, digits: int = 3) -> str:
    """Return a number as text, "–" if undefined."""
    plain = value.value if isinstance(value, MetricValue) else value
    return shown(plain, f".{digits}f")
