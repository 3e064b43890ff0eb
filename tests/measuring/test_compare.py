"""Comparison of two runs: differences with intervals, console output, tables and input errors."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydet.common.errors import UserError
from raydet.config import CompareConfig
from raydet.measuring.compare import Comparison, compare
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table

Row = dict[str, Any]
CATEGORIES = [Category(3, "car"), Category(7, "person")]
NUM_IMAGES = 40


def truth_rows() -> list[Row]:
    """Return two boxes per image, one of each class; the first image is empty."""
    generator = np.random.default_rng(0)
    rows = []
    for image_id in range(NUM_IMAGES):
        boxes = [[*generator.uniform(0, 200, 2).tolist(), 40.0 + image_id, 50.0] for _ in range(2 if image_id else 0)]
        objects = {
            "id": list(range(len(boxes))),
            "bbox": boxes,
            "category": [0, 1][: len(boxes)],
            "area": [box[2] * box[3] for box in boxes],
            "iscrowd": [False] * len(boxes),
        }
        rows.append({"image_id": image_id, "width": 300, "height": 300, "objects": objects})
    return rows


def detection_rows(truth: list[Row], *, missed: tuple[int, ...] = (), noise: float = 2.0) -> list[Row]:
    """Return every box with a small offset and one false positive per image; no persons in the `missed` images."""
    generator = np.random.default_rng(1)
    rows = []
    for row in truth:
        objects = row["objects"]
        found: list[tuple[list[float], float, int]] = []
        for box, category in zip(objects["bbox"], objects["category"], strict=True):
            moved = (np.array(box) + generator.normal(0, noise, 4)).tolist()
            score = float(generator.uniform(0.5, 1.0))
            if not (category == 1 and row["image_id"] in missed):
                found.append((moved, score, category))
        found.append(([250.0, 250.0, 20.0, 20.0], float(generator.uniform(0, 0.6)), int(generator.integers(0, 2))))
        boxes, scores, categories = (list(column) for column in zip(*found, strict=True))
        detections = {"bbox": boxes, "score": scores, "category": categories}
        rows.append({**{key: row[key] for key in ("image_id", "width", "height")}, "detections": detections})
    return rows


def write(folder: Path, kind: Any, rows: list[Row]) -> str:
    with TableWriter(str(folder), build_schema(kind, CATEGORIES), config_hash="x") as writer:
        writer.write_rows(rows)
    return str(folder)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Any]:
    """Write a truth and two runs, the second of which misses the persons in twelve images."""
    rows = truth_rows()
    return {
        "truth": write(tmp_path / "val", "images", [{**row, "image": {"bytes": b"-", "path": "a"}} for row in rows]),
        "first": write(tmp_path / "first", "detections", detection_rows(rows)),
        "second": write(tmp_path / "second", "detections", detection_rows(rows, missed=tuple(range(20, 32)))),
    }


def test_a_worse_run_is_said_to_be_worse_and_where(runs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = compare(CompareConfig(**runs, bootstrap=200, num_images=15, out=str(out)))
    person = found.numbers.difference.per_class[1]["AP"]
    assert person.excludes_zero and person.value is not None and person.value < -0.2
    assert found.numbers.difference.per_class[0]["AP"].value == 0
    assert {image.image_id for image in found.changed_images[:12]} == set(range(20, 32))
    assert all(image.difference < 0 and image.num_truth == 2 for image in found.changed_images[:12])

    text = "\n".join(found.lines())
    assert "40 images, 78 boxes" in text
    assert re.search("AP: .*worse", text)
    assert "better in 0 of 2" in text
    assert re.search("worse in 1 of 2.*person", text)
    assert str(out) in text

    table = open_table(str(out / "comparison"), "comparison").read().to_pylist()
    assert len(table) == 3 * 6
    row = next(row for row in table if (row["metric"], row["category"]) == ("AP", "person"))
    assert (row["first"], row["second"]) == ("first", "second")
    assert row["difference"] == pytest.approx(row["second_value"] - row["first_value"], abs=1e-15)
    assert (row["low"], row["high"]) == (person.low, person.high)
    small = next(row for row in table if (row["metric"], row["category"]) == ("APs", None))
    assert small["difference"] is None and small["low"] is None
    changed = open_table(str(out / "changed_images"), "changed_images").read().to_pylist()
    assert [row["image_id"] for row in changed] == [image.image_id for image in found.changed_images]
    assert changed[0]["first_f1"] > changed[0]["second_f1"]


def test_values_are_those_of_evaluate(runs: dict[str, Any]) -> None:
    from raydet.config import EvaluateConfig
    from raydet.measuring.evaluate import evaluate

    found = compare(CompareConfig(**runs, bootstrap=5))
    for side, name in ((found.numbers.first, "first"), (found.numbers.second, "second")):
        result = evaluate(EvaluateConfig(truth=runs["truth"], detections=runs[name], bootstrap=0)).result
        for metric, interval in side.overall.items():
            expected = getattr(result, metric)
            assert interval.value == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_a_run_against_itself_differs_nowhere(runs: dict[str, Any]) -> None:
    found = compare(CompareConfig(truth=runs["truth"], first=runs["first"], second=runs["first"], bootstrap=50))
    overall = found.numbers.difference.overall["AP"]
    assert (overall.value, overall.low, overall.high) == (0, 0, 0)
    assert found.changed_images == ()
    text = "\n".join(found.lines())
    assert re.search("AP: no significant difference", text)
    assert "unchanged" in text
    assert "+0.000 … +0.000" in text


def test_an_empty_image_that_gets_a_false_alarm_has_changed(runs: dict[str, Any], tmp_path: Path) -> None:
    rows = detection_rows(truth_rows())
    quiet = [dict(row) for row in rows]
    quiet[0]["detections"] = {"bbox": [], "score": [], "category": []}
    loud = [dict(row) for row in quiet]
    loud[0]["detections"] = {"bbox": [[0.0, 0.0, 9.0, 9.0]], "score": [0.99], "category": [0]}
    first = write(tmp_path / "quiet", "detections", quiet)
    second = write(tmp_path / "loud", "detections", loud)
    found = compare(CompareConfig(truth=runs["truth"], first=first, second=second, bootstrap=5))
    image = found.changed_images[0]
    assert (image.image_id, image.num_truth, image.first_f1, image.second_f1) == (0, 0, None, 0.0)
    assert image.difference == -1


def test_runs_of_one_name_are_told_apart_by_their_folders(runs: dict[str, Any], tmp_path: Path) -> None:
    rows = truth_rows()
    first, second = (
        write(tmp_path / run / "detections", "detections", detection_rows(rows, noise=noise))
        for run, noise in (("a", 2.0), ("b", 4.0))
    )
    found = compare(CompareConfig(truth=runs["truth"], first=first, second=second, bootstrap=5))
    assert found.names == ("a/detections", "b/detections")


def test_the_same_seed_gives_the_same_comparison(runs: dict[str, Any]) -> None:
    once, again, other = (compare(CompareConfig(**runs, bootstrap=30, seed=seed)) for seed in (1, 1, 2))
    assert once == again
    assert isinstance(once, Comparison) and once.numbers != other.numbers


def test_a_table_may_be_compared_with_json(runs: dict[str, Any], tmp_path: Path) -> None:
    results = [
        {"image_id": row["image_id"], "category_id": CATEGORIES[category].id, "bbox": box, "score": score}
        for row in detection_rows(truth_rows())
        for box, score, category in zip(*(row["detections"][key] for key in ("bbox", "score", "category")), strict=True)
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    config = CompareConfig(**runs | {"second": str(tmp_path / "results.json")}, bootstrap=5)
    assert compare(config).numbers.difference.overall["AP"].value == 0
    assert compare(config).names == ("first", "results")


def test_detections_of_other_images_are_refused(runs: dict[str, Any], tmp_path: Path) -> None:
    rows = detection_rows(truth_rows())
    fewer = write(tmp_path / "fewer", "detections", rows[:-1])
    more = write(tmp_path / "more", "detections", [*rows, {**rows[-1], "image_id": 99}])
    for uri, what in ((fewer, r"fewer .*\b1 of the 40 images"), (more, r"more .*\b1 images .*image 99\b")):
        with pytest.raises(UserError, match=what):
            compare(CompareConfig(**runs | {"second": uri}, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_out_that_holds_something_else_is_refused(runs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = CompareConfig(**runs, bootstrap=5, out=str(out))
    compare(config)
    compare(config)  # an identical comparison may be written again
    with pytest.raises(UserError, match=r"bootstrap: 5 → 6"):
        compare(CompareConfig(**runs, bootstrap=6, out=str(out)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        compare(CompareConfig(**runs, bootstrap=5, out=str(tmp_path / "file")))
    mine = tmp_path / "mine" / "comparison"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"did not write.*notes\.txt"):
        compare(CompareConfig(**runs, bootstrap=5, out=str(tmp_path / "mine")))
    assert (mine / "notes.txt").exists()
