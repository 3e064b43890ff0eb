"""Crops tables without a model: answers about the detections of a table, by rules that a test can repeat."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from raydet.tables.schema import build_schema
from raydet.tables.table import TableWriter, open_table

Rule = Callable[[int, int], Any]
"""Image id and place of a detection → its answer, or None."""
NUMBERS = ("label_score", "depth")


def write_crops(
    folder: Path, detections: str, rules: Mapping[str, Rule], *, ask: Sequence[str] = (), min_score: float = 0.0
) -> str:
    """Write a crops table with a column for each rule, for the detections with at least a score."""
    table = open_table(detections, "detections")
    names = [category.name for category in table.categories]
    fields = [pa.field(name, pa.float64() if name in NUMBERS else pa.string()) for name in rules]
    metadata = {"task": "image-text-to-text", "ask": list(ask) or None}
    schema = build_schema("crops", table.categories, extra_fields=fields, extra_metadata=metadata)
    with TableWriter(str(folder), schema, config_hash="x") as writer:
        for row in table.read().to_pylist():
            found = row["detections"]
            for place, (box, score, category) in enumerate(
                zip(found["bbox"], found["score"], found["category"], strict=True)
            ):
                if score >= min_score:
                    answers = {name: rule(row["image_id"], place) for name, rule in rules.items()}
                    own = {"image_id": row["image_id"], "path": row["path"], "detection": place, "bbox": box}
                    writer.write_rows([{**own, "score": score, "category": names[category], "error": None, **answers}])
    return str(folder)
