"""Truth and detections are read into the same columns from every format and row order."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydet.common.errors import UserError
from raydet.measuring.detections import read_detections
from raydet.measuring.truth import data_hash, read_extra_columns, read_truth
from raydet.tables.columns import DetectionColumns, TruthColumns
from raydet.tables.schema import Category
from tests.measuring.test_evaluate import (
    Row,
    coco_to_rows,
    made_up_results,
    results_to_rows,
    write_detections,
    write_images,
)


def boxes_of(columns: TruthColumns | DetectionColumns) -> list[Any]:
    values = (columns.scores,) if isinstance(columns, DetectionColumns) else (columns.area, columns.iscrowd)
    return [columns.starts.tolist(), columns.boxes_xywh.tolist(), columns.category.tolist()] + [
        value.tolist() for value in values
    ]


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    return [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]


def test_tables_and_json_give_the_same_columns(test_data: Path, tmp_path: Path) -> None:
    file = test_data / "coco_mini" / "instances_val.json"
    content = json.loads(file.read_bytes())
    rows, categories = coco_to_rows(content)
    results = made_up_results(content, seed=3)
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_images(tmp_path / "truth", shuffled(rows, 1), categories)
    write_detections(tmp_path / "found", shuffled(results_to_rows(results, rows, categories), 2), categories)
    truths = [read_truth(str(file)), read_truth(str(tmp_path / "truth"))]
    assert boxes_of(truths[0].columns) == boxes_of(truths[1].columns)
    assert (np.diff(truths[1].columns.image_ids) > 0).all()
    assert truths[0].images.sizes_hw.tolist() == truths[1].images.sizes_hw.tolist()
    scored = [read_detections(str(tmp_path / name), truth) for name in ("results.json", "found") for truth in truths]
    for other in scored[1:]:
        assert boxes_of(other.columns) == boxes_of(scored[0].columns)
        assert boxes_of(other.truth_columns) == boxes_of(truths[0].columns)
    assert scored[0].num_detections == len(results)


def test_json_that_is_read_entry_by_entry_gives_the_same_columns(test_data: Path, tmp_path: Path) -> None:
    content = json.loads((test_data / "coco_mini" / "instances_val.json").read_bytes())
    (tmp_path / "right.json").write_text(json.dumps(content))
    content["images"][0]["height"] = None  # valid, but not accepted by the fast reader
    (tmp_path / "slow.json").write_text(json.dumps(content))
    right, slow = (read_truth(str(tmp_path / name)) for name in ("right.json", "slow.json"))
    assert boxes_of(right.columns) == boxes_of(slow.columns)
    assert (right.images.sizes_hw != slow.images.sizes_hw).sum() == 1


def test_an_area_that_is_no_number_is_refused(tmp_path: Path) -> None:
    annotation = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "area": float("nan")}
    content = {"images": [{"id": 1}], "annotations": [annotation], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"\b1 boxes .*not finite.* image 1\b"):
        read_truth(str(tmp_path / "truth.json"))


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_table_is_a_mistake(tmp_path: Path, count: int) -> None:
    categories = [Category(1, "a")]
    objects: Row = {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
    write_images(tmp_path / "truth", [{"image_id": 1, "width": 9, "height": 9, "objects": objects}], categories)
    nothing: Row = {"bbox": [], "score": [], "category": []}
    rows = [{"image_id": 1, "path": "a.png", "width": 9, "height": 9, "detections": nothing, "error": None}]
    write_detections(tmp_path / "found", rows[:count], categories)
    truth = read_truth(str(tmp_path / "truth"))
    if count:
        assert read_detections(str(tmp_path / "found"), truth).num_detections == 0
        return
    with pytest.raises(UserError, match=r"found .*truth .*\b1$"):
        read_detections(str(tmp_path / "found"), truth)


def test_lvis_fields_become_indices(tmp_path: Path) -> None:
    content: Row = {
        "images": [
            {"id": 9, "neg_category_ids": [7], "not_exhaustive_category_ids": []},
            {"id": 4, "neg_category_ids": [], "not_exhaustive_category_ids": [2, 7]},
        ],
        "annotations": [],
        "categories": [{"id": 7, "name": "b", "frequency": "r"}, {"id": 2, "name": "a", "frequency": "f"}],
    }
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    federated = read_truth(str(path), lvis=True).federated
    assert federated is not None
    assert (federated.negatives, federated.not_exhaustive) == (((), (1,)), ((0, 1), ()))
    assert federated.frequency == ("f", "r")
    assert read_truth(str(path)).federated is None
    content["images"][0]["neg_category_ids"] = [3]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"neg_category_ids.*3|category 3\b"):
        read_truth(str(path), lvis=True)


def test_a_json_truth_has_no_further_columns(test_data: Path) -> None:
    assert read_extra_columns(read_truth(str(test_data / "coco_mini" / "instances_val.json"))) == {}


def test_the_hash_changes_with_the_data(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    path.write_text("[]")
    first = data_hash(str(path))
    path.write_text("[1]")
    assert (len(first), data_hash(str(path)) == first) == (16, False)


@pytest.mark.parametrize("is_table", [False, True])
def test_numbers_come_without_large_packages(test_data: Path, tmp_path: Path, is_table: bool) -> None:
    """Importing any of them takes as long as measuring a hundred thousand detections."""
    truth, found = test_data / "coco_mini" / "instances_val.json", tmp_path / "results.json"
    content = json.loads(truth.read_bytes())
    rows, categories = coco_to_rows(content)
    results = made_up_results(content, seed=3)
    found.write_text(json.dumps(results))
    if is_table:
        truth, found = tmp_path / "truth", tmp_path / "found"
        write_images(truth, rows, categories)
        write_detections(found, results_to_rows(results, rows, categories), categories)
    code = (
        "import sys, raydet\n"
        f"raydet.evaluate(raydet.EvaluateConfig(truth={str(truth)!r}, detections={str(found)!r}))\n"
        "print(sorted({'pandas', 'ray', 'torch', 'scipy', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert printed.stdout.strip() == "[]"


def test_ids_in_quotes_are_read_as_prepare_reads_them(tmp_path: Path) -> None:
    def content(quoted: bool) -> Row:
        def number(value: int) -> Any:
            return str(value) if quoted else value

        box = {"image_id": number(4), "category_id": number(7), "bbox": [1, 2, 3, 4], "iscrowd": number(1)}
        image = {"id": number(4), "file_name": "a.jpg", "width": number(9), "height": number(8)}
        return {"images": [image], "annotations": [box], "categories": [{"id": number(7), "name": "b"}]}

    truths = []
    for quoted in (False, True):
        path = tmp_path / f"{quoted}.json"
        path.write_text(json.dumps(content(quoted)))
        truths.append(read_truth(str(path)))
    assert boxes_of(truths[0].columns) == boxes_of(truths[1].columns)
    assert truths[0].images.sizes_hw.tolist() == truths[1].images.sizes_hw.tolist() == [[8, 9]]
    assert truths[0].categories == truths[1].categories
