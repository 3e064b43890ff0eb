"""Detections of classes that an image is not labelled for do not count, unless they find a box."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydet.config import EvaluateConfig
from raydet.measuring.evaluate import evaluate
from raydet.measuring.numbers.accumulator import CocoAccumulator, ImageDetections, ImageTruth
from raydet.measuring.truth import read_truth
from raydet.tables.columns import DetectionColumns, in_unlabelled_class
from raydet.tables.schema import LABELLED_COLUMN, OPTIONAL_FIELDS, Category, build_schema
from raydet.tables.table import TableWriter
from tests.measuring.test_evaluate import Row, write_detections

CATEGORIES = (Category(1, "bus"), Category(2, "car"), Category(3, "cat"))
NUM_IMAGES = 40
KNOWN: dict[int, list[int] | None] = {0: None, 1: [0, 1], 2: [2], 3: []}
"""The labelled classes of an image, by its id modulo 4."""


def _boxes(rng: np.random.Generator, count: int) -> list[list[float]]:
    low, side = rng.uniform(0, 50, (count, 2)), rng.uniform(10, 40, (count, 2))
    boxes: list[list[float]] = np.concatenate([low, side], axis=1).tolist()
    return boxes


def _images(rng: np.random.Generator) -> list[Row]:
    rows = []
    for image_id in range(NUM_IMAGES):
        boxes = _boxes(rng, 4)
        objects = {
            "id": list(range(4 * image_id + 1, 4 * image_id + 5)),
            "bbox": boxes,
            "category": rng.integers(0, 3, 4).tolist(),
            "area": [box[2] * box[3] for box in boxes],
            "iscrowd": [False] * 4,
        }
        size = {"width": 100, "height": 100, LABELLED_COLUMN: KNOWN[image_id % 4]}
        rows.append(
            {"image_id": image_id, "image": {"bytes": b"", "path": f"{image_id}.png"}, **size, "objects": objects}
        )
    return rows


def _write(folder: Path, rows: list[Row], *, with_column: bool = True) -> str:
    fields = [pa.field(LABELLED_COLUMN, OPTIONAL_FIELDS["images"][LABELLED_COLUMN])] if with_column else []
    with TableWriter(str(folder), build_schema("images", CATEGORIES, extra_fields=fields), config_hash="x") as writer:
        writer.write_rows(
            [{name: value for name, value in row.items() if with_column or name != LABELLED_COLUMN} for row in rows]
        )
    return str(folder)


def _found(images: list[Row], rng: np.random.Generator) -> list[Row]:
    """Return detections near half of the boxes, and others, of random classes."""
    rows = []
    for row in images:
        near = [(np.array(box) + rng.normal(0, 2, 4)).tolist() for box in row["objects"]["bbox"][:2]]
        boxes = [*near, *_boxes(rng, 5)]
        classes = [*row["objects"]["category"][:2], *rng.integers(0, 3, 5).tolist()]
        order = np.argsort(-rng.random(7))
        found = {
            "bbox": [boxes[place] for place in order],
            "score": np.linspace(0.9, 0.1, 7).tolist(),
            "category": [int(classes[place]) for place in order],
        }
        size = {"width": 100, "height": 100, "path": row["image"]["path"], "error": None}
        rows.append({"image_id": row["image_id"], **size, "detections": found})
    return rows


@pytest.fixture
def tables(tmp_path: Path) -> tuple[list[Row], list[Row]]:
    rng = np.random.default_rng(3)
    images = _images(rng)
    detections = _found(images, rng)
    write_detections(tmp_path / "found", detections, list(CATEGORIES))
    _write(tmp_path / "truth", images)
    return images, detections


def _measure(truth: str, folder: Path, **options: Any) -> dict[str, float | None]:
    return dict(evaluate(EvaluateConfig(truth=truth, detections=str(folder / "found"), **options)).result.values)


def test_the_numbers_are_those_of_pycocotools_with_crowds(tables: Any, tmp_path: Path) -> None:
    """Check COCO's numbers by `--verify`, whole and in shards, with tables of results and of classes as one."""
    truth = str(tmp_path / "truth")
    config = EvaluateConfig(truth=truth, detections=str(tmp_path / "found"), verify=True)
    evaluation = evaluate(config)
    assert evaluation.verification is not None and evaluation.verification.differing == ()
    values = dict(evaluation.result.values)
    strict = _measure(_write(tmp_path / "all", tables[0], with_column=False), tmp_path)
    assert (values["AP"] or 0) > (strict["AP"] or 0) > 0
    assert _measure(truth, tmp_path) == _measure(truth, tmp_path, num_shards=7) == values
    assert _measure(truth, tmp_path, out=str(tmp_path / "metrics"), bootstrap=0) == values
    assert _measure(truth, tmp_path, class_agnostic=True)["AP"] is not None
    assert _measure(truth, tmp_path, protocol="voc12")["AP50"] is not None


def test_images_labelled_for_all_classes_are_judged_as_ever(tables: Any, tmp_path: Path) -> None:
    images, _ = tables
    whole = _write(tmp_path / "whole", [{**row, LABELLED_COLUMN: [2, 0, 1]} for row in images])
    plain = _write(tmp_path / "plain", images, with_column=False)
    assert _measure(whole, tmp_path) == _measure(plain, tmp_path)


def test_validation_counts_as_evaluation_does(tables: Any, tmp_path: Path) -> None:
    images, detections = tables
    accumulators = [CocoAccumulator(CATEGORIES) for _ in range(2)]
    for place, (row, found) in enumerate(zip(images, detections, strict=True)):
        own, known = row["objects"], row[LABELLED_COLUMN]
        truth = ImageTruth(
            np.array(own["bbox"]),
            np.array(own["category"]),
            np.array(own["area"]),
            np.array(own["iscrowd"]),
            None if known is None else np.array(known, np.int64),
        )
        boxes = ImageDetections(*(np.array(found["detections"][name]) for name in ("bbox", "score", "category")))
        accumulators[place % 2].add(row["image_id"], truth, boxes)
    accumulators[0].merge(accumulators[1].to_bytes())
    assert dict(accumulators[0].result().values) == _measure(str(tmp_path / "truth"), tmp_path)


def test_the_column_is_read_with_its_images(tables: Any, tmp_path: Path) -> None:
    images, _ = tables
    columns = read_truth(_write(tmp_path / "turned", images[::-1])).columns
    image, category = (one.ravel() for one in np.indices((NUM_IMAGES, 3)))
    boxes = DetectionColumns(
        starts=np.arange(NUM_IMAGES + 1) * 3,
        boxes_xywh=np.zeros((len(image), 4)),
        scores=category / 3,
        category=category,
    )
    found = in_unlabelled_class(columns, boxes)
    assert found is not None
    for place, label, is_unlabelled in zip(image.tolist(), category.tolist(), found.tolist(), strict=True):
        known = KNOWN[place % 4]
        assert is_unlabelled == (known is not None and label not in known)
