"""Inspection result → HTML page."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raydet.common.version import __version__
from raydet.config import ResolvedTrainConfig
from raydet.inspection.counting import GRID, QUANTITIES, Counts, Quantity
from raydet.inspection.findings import MEANINGS, Findings
from raydet.inspection.galleries import ClassGallery, hex_colours
from raydet.inspection.tables import drifts, per_class
from raydet.reporting.page import fill
from raydet.tables.columns import Integers
from raydet.training.feeding.counts import EpochShare
from raydet.training.feeding.mixture import Mixture

_MOST_CHARTED = 100
"""Maximum number of classes with their own histograms and heat map on the page; the tables have all classes."""
_MOST_TOGETHER = 60
_MOST_EXAMPLES = 50
_DRIFTS = {"classes": "Shares of the classes", **{quantity.name: quantity.title for quantity in QUANTITIES}}


def render(
    tables: Mapping[str, Mixture],
    counts: Mapping[str, Counts],
    findings: Findings,
    galleries: Sequence[ClassGallery],
    training: ResolvedTrainConfig,
    shares: Sequence[EpochShare],
) -> str:
    """Render the page; tables and counts are by split, `shares` are those of several tables of training data."""
    data = tables["data"]
    names = _names(data)
    charted = np.argsort(-counts["data"].boxes, kind="stable")[:_MOST_CHARTED].tolist()
    charts = {
        "classes": names,
        "splits": list(counts),
        "histograms": _histograms(tables, counts, charted),
        "centres": _centres(counts["data"], charted),
        "together": _together(counts["data"], names),
    }
    return fill(
        "inspect.html",
        "inspect.js",
        charts,
        charts=charts,
        title=" + ".join(_short_name(source.table.uri) for source in data.sources),
        data_uri=data.uri,
        val_uri=tables["val"].uri if "val" in tables else None,
        counts=counts["data"],
        val_counts=counts.get("val"),
        classes=_class_rows(tables, counts),
        shares=[(_short_name(one.uri), one) for one in shares],
        classes_of_shares=_share_rows(shares, names),
        charted=[(index, names[index]) for index in sorted(charted)],
        quantities=QUANTITIES,
        findings=_finding_rows(findings),
        num_findings=sum(findings.counts.values()),
        drifts=[(title, drifts(counts).get(name)) for name, title in _DRIFTS.items()] if "val" in counts else [],
        galleries=galleries,
        colours=hex_colours(names),
        training=training,
        version=__version__,
        time=datetime.datetime.now(datetime.UTC),
    )


def _short_name(uri: str) -> str:
    return " / ".join(uri.rstrip("/").split("/")[-2:])


def _share_rows(shares: Sequence[EpochShare], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row per class, most boxes first, with its boxes in each table, and those that an epoch shows."""
    if not shares:
        return []
    boxes = np.stack([one.num_boxes for one in shares])
    shown = np.stack([one.boxes_per_epoch for one in shares])
    return [
        {"category": names[index], "boxes": boxes[:, index].tolist(), "shown": shown[:, index].tolist()}
        for index in np.argsort(-boxes.sum(axis=0), kind="stable").tolist()
    ]


def _class_rows(tables: Mapping[str, Mixture], counts: Mapping[str, Counts]) -> list[dict[str, Any]]:
    """Return a row per class, most boxes first; validation numbers are matched by class name."""
    val: dict[str, dict[str, Any]] = {}
    if "val" in counts:
        val = {row["category"]: row for row in per_class("val", counts["val"], _names(tables["val"]))}
    rows = sorted(per_class("data", counts["data"], _names(tables["data"])), key=lambda row: -int(row["boxes"]))
    most = max([1, *(row["boxes"] for row in rows)])
    for row in rows:
        in_val = val.get(row["category"], {"boxes": 0, "share": 0.0})
        row |= {"length": row["boxes"] / most, "val_boxes": in_val["boxes"], "val_share": in_val["share"]}
    return rows


def _names(table: Mixture) -> list[str]:
    return [category.name for category in table.categories]


def _finding_rows(findings: Findings) -> list[dict[str, Any]]:
    rows = []
    for split, kind in findings.sorted_keys():
        title, meaning = MEANINGS.get(kind, (kind, "reported by `prepare`"))
        listed, count = findings.listed[split, kind], findings.counts[split, kind]
        row = {"title": title, "meaning": meaning, "split": split, "count": count}
        rows.append({**row, "examples": listed[:_MOST_EXAMPLES], "num_listed": len(listed)})
    return rows


def _bin_label(quantity: Quantity, number: int) -> str:
    low, high = quantity.edges[number : number + 2]
    if quantity.name == "boxes_per_image" and high - low == 1:
        return f"{low:g}"
    if np.isinf(high):
        return f"≥ {_short(low)}"
    if low == 0 and quantity.name != "boxes_per_image":
        return f"< {_short(high)}"
    return f"{_short(low)}–{_short(high - 1 if quantity.name == 'boxes_per_image' else high)}"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 1 else f"{value:.10g}"


def _histograms(
    tables: Mapping[str, Mixture], counts: Mapping[str, Counts], charted: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return for each quantity its bin labels and, by split, the counts by class; -1 means all classes."""
    names = _names(tables["data"])
    content = {}
    for quantity in QUANTITIES:
        splits = []
        for split, of_split in counts.items():
            histogram = of_split.histograms[quantity.name]
            place = {name: index for index, name in enumerate(_names(tables[split]))}
            own = {str(index): histogram[place[names[index]]] for index in charted if names[index] in place}
            splits.append({key: row.tolist() for key, row in {"-1": histogram[-1], **own}.items()})
        content[quantity.name] = {
            "labels": [_bin_label(quantity, number) for number in range(len(quantity.edges) - 1)],
            "unit": quantity.unit,
            "what": "boxes" if quantity.of_boxes else "images",
            "splits": splits,
        }
    return content


def _centres(counts: Counts, charted: Sequence[int]) -> dict[str, Any]:
    """Return the box counts of the grid cells by class, in row-major order; -1 means all classes."""
    every: Integers = counts.centres.sum(axis=0)
    cells = {"-1": every.ravel().tolist(), **{str(index): counts.centres[index].ravel().tolist() for index in charted}}
    return {"grid": GRID, "cells": cells}


def _together(counts: Counts, names: Sequence[str]) -> dict[str, Any] | None:
    """Return the number of images that contain each pair of the most frequent classes; None below two classes."""
    shown = np.sort(np.argsort(-counts.images, kind="stable")[:_MOST_TOGETHER])
    shown = shown[counts.images[shown] > 0]
    if len(shown) < 2:
        return None
    place_of = np.full(len(names), -1)
    place_of[shown] = np.arange(len(shown))
    first, second, images = counts.together()
    kept = (place_of[first] >= 0) & (place_of[second] >= 0)
    cells = np.stack([place_of[first[kept]], place_of[second[kept]], images[kept]], axis=1)
    return {
        "names": [names[index] for index in shown.tolist()],
        "images": counts.images[shown].tolist(),
        "cells": cells.tolist(),
        "num_classes": int((counts.images > 0).sum()),
    }
