"""Tables that `inspect` writes, each with its manifest."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from raydet.inspection.counting import GRID, QUANTITIES, Counts, distance
from raydet.inspection.findings import Findings
from raydet.tables.output_folder import OutputFolder
from raydet.tables.schema import Category, TableKind, build_schema
from raydet.tables.table import TableWriter

PAGE_FILE = "inspect.html"
FOLDERS: dict[str, TableKind] = {
    "summary": "data_summary",
    "per_class": "per_class",
    "histograms": "histograms",
    "co_occurrence": "co_occurrence",
    "box_centres": "box_centres",
    "findings": "data_findings",
}
"""Table kinds by folder name."""

_BATCH_ROWS = 2**16


def write_tables(
    output: OutputFolder,
    counts: Mapping[str, Counts],
    findings: Findings,
    categories: Mapping[str, Sequence[Category]],
    config_hash: str,
) -> None:
    """Write all tables, replacing earlier ones."""
    names = {split: [category.name for category in categories[split]] for split in counts}
    tables: dict[str, Iterator[dict[str, Any]]] = {
        "summary": _summary(counts, findings),
        "per_class": (row for split in counts for row in per_class(split, counts[split], names[split])),
        "histograms": (row for split in counts for row in _histograms(split, counts[split], names[split])),
        "co_occurrence": (row for split in counts for row in _co_occurrence(split, counts[split], names[split])),
        "box_centres": (row for split in counts for row in _centres(split, counts[split], names[split])),
        "findings": _findings(findings),
    }
    for folder, rows in tables.items():
        output.delete_table(folder)
        schema = build_schema(FOLDERS[folder], categories["data"])
        with TableWriter(output.uri_of(folder), schema, config_hash=config_hash) as writer:
            while some := list(islice(rows, _BATCH_ROWS)):
                writer.write_rows(some)


def _summary(counts: Mapping[str, Counts], findings: Findings) -> Iterator[dict[str, Any]]:
    for split, of_split in counts.items():
        numbers = {
            "images": of_split.num_images,
            "images_without_boxes": of_split.num_empty,
            "boxes": of_split.num_boxes,
            "crowd_boxes": of_split.crowds.sum(),
            "classes": of_split.num_classes,
            "classes_with_boxes": (of_split.boxes > 0).sum(),
            "boxes_per_image": of_split.num_boxes / max(of_split.num_images, 1),
            **dict(zip(("small_boxes", "medium_boxes", "large_boxes"), of_split.sizes.sum(axis=0), strict=True)),
            **dict(zip(("least_width_px", "least_height_px"), of_split.smallest_wh, strict=True)),
            **dict(zip(("most_width_px", "most_height_px"), of_split.largest_wh, strict=True)),
        }
        for name, value in numbers.items():
            yield {"split": split, "name": name, "value": float(value)}
    for (split, kind), count in findings.counts.items():
        yield {"split": split, "name": f"findings:{kind}", "value": float(count)}
    for name, drift in drifts(counts).items():
        yield {"split": None, "name": f"drift:{name}", "value": drift}


def drifts(counts: Mapping[str, Counts]) -> dict[str, float | None]:
    """Return the distance between the splits, 0 to 1: of their class shares and of each histogram."""
    if "val" not in counts:
        return {}
    data, val = counts["data"], counts["val"]
    return {
        "classes": distance(data.boxes, val.boxes) if data.num_classes == val.num_classes else None,
        **{
            quantity.name: distance(data.histograms[quantity.name][-1], val.histograms[quantity.name][-1])
            for quantity in QUANTITIES
        },
    }


def per_class(split: str, counts: Counts, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table `per_class`."""
    total = max(counts.num_boxes, 1)
    for index, name in enumerate(names):
        boxes, images = int(counts.boxes[index]), int(counts.images[index])
        small, medium, large = counts.sizes[index].tolist()
        yield {
            "split": split,
            "category": name,
            "boxes": boxes,
            "share": boxes / total,
            "images": images,
            "boxes_per_image": boxes / images if images else None,
            "crowd_boxes": int(counts.crowds[index]),
            "small_boxes": small,
            "medium_boxes": medium,
            "large_boxes": large,
        }


def _histograms(split: str, counts: Counts, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for quantity in QUANTITIES:
        histogram = counts.histograms[quantity.name]
        for index, name in ((len(names), None), *enumerate(names)):
            for number, count in enumerate(histogram[index].tolist()):
                # The row of all classes keeps empty bins, so that the table has all edges; single classes omit them.
                if count or name is None:
                    low, high = map(float, quantity.edges[number : number + 2])
                    about = {"split": split, "quantity": quantity.name, "category": name}
                    yield {**about, "low": low, "high": high, "count": count}


def _co_occurrence(split: str, counts: Counts, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for first, second, images in zip(*(column.tolist() for column in counts.together()), strict=True):
        yield {"split": split, "first": names[first], "second": names[second], "images": images}


def _centres(split: str, counts: Counts, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for index, row, column in np.argwhere(counts.centres).tolist():
        boxes = int(counts.centres[index, row, column])
        yield {"split": split, "category": names[index], "left": column / GRID, "top": row / GRID, "boxes": boxes}


def _findings(findings: Findings) -> Iterator[dict[str, Any]]:
    for key in findings.sorted_keys():
        yield from map(vars, findings.listed[key])
