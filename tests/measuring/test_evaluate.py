"""COCO's metrics from tables and JSON, and one-line errors for every mistake in the input."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydet.common.errors import RunError, UserError
from raydet.config import EvaluateConfig
from raydet.measuring.evaluate import evaluate
from raydet.measuring.result import Evaluation
from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.schema import Category, TableKind, build_schema
from raydet.tables.table import TableWriter, open_table

Row = dict[str, Any]


def write_images(folder: Path, rows: list[Row], categories: list[Category]) -> None:
    """Write an images table without image data, which evaluation must not read."""
    with TableWriter(str(folder), build_schema("images", categories), config_hash="x") as writer:
        for row in rows:
            writer.write_rows([{"image": {"bytes": b"not a picture", "path": "a.png"}, **row}])


def write_detections(folder: Path, rows: list[Row], categories: list[Category], **metadata: str) -> None:
    schema = build_schema("detections", categories, extra_metadata=metadata)
    with TableWriter(str(folder), schema, config_hash="x") as writer:
        writer.write_rows(rows)


def coco_to_rows(content: Row) -> tuple[list[Row], list[Category]]:
    """Return the boxes of a COCO file as rows of an images table."""
    categories = [Category(item["id"], item["name"]) for item in content["categories"]]
    index_of = {category.id: index for index, category in enumerate(categories)}
    rows = []
    for image in content["images"]:
        own = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        objects = {
            "id": [item["id"] for item in own],
            "bbox": [item["bbox"] for item in own],
            "category": [index_of[item["category_id"]] for item in own],
            "area": [item["area"] for item in own],
            "iscrowd": [bool(item["iscrowd"]) for item in own],
        }
        size = {"width": image["width"], "height": image["height"]}
        picture = {"bytes": b"not a picture", "path": image["file_name"]}
        rows.append({"image_id": image["id"], "image": picture, **size, "objects": objects})
    return rows, categories


def made_up_results(content: Row, seed: int) -> list[Row]:
    """Return COCO results near the truth, with false positives and many ties; some images get none."""
    generator = np.random.default_rng(seed)
    category_ids = [item["id"] for item in content["categories"]]
    results = []
    for item in content["annotations"]:
        if item["image_id"] % 9 == 0:
            continue
        for _ in range(generator.integers(0, 4)):
            box = np.array(item["bbox"]) + generator.normal(0, 4, 4)
            box[2:] = np.maximum(box[2:], 1)
            category = item["category_id"] if generator.random() < 0.9 else int(generator.choice(category_ids))
            score = float(generator.integers(0, 11)) / 10
            results.append(
                {"image_id": item["image_id"], "category_id": category, "bbox": box.tolist(), "score": score}
            )
    return [results[i] for i in generator.permutation(len(results))]


def results_to_rows(results: list[Row], images: list[Row], categories: list[Category]) -> list[Row]:
    """Return the same detections as rows of a detections table, in the same order within each image."""
    index_of = {category.id: index for index, category in enumerate(categories)}
    rows = []
    for image in images:
        own = [item for item in results if item["image_id"] == image["image_id"]]
        detections = {
            "bbox": [item["bbox"] for item in own],
            "score": [item["score"] for item in own],
            "category": [index_of[item["category_id"]] for item in own],
        }
        size = {"width": image["width"], "height": image["height"]}
        path = image["image"]["path"] if "image" in image else "a.png"
        rows.append({"image_id": image["image_id"], "path": path, **size, "detections": detections, "error": None})
    return rows


def pycocotools_stats(truth: Path, results: Path) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth_coco = COCO(str(truth))
        evaluator = COCOeval(truth_coco, truth_coco.loadRes(str(results)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats: list[float] = evaluator.stats.tolist()
    return stats


def numbers(evaluation: Evaluation) -> list[float]:
    """Return the metrics as pycocotools does, with -1 for undefined ones."""
    return [-1.0 if value is None else value for value in evaluation.result.values.values()]


@pytest.mark.parametrize("file", ["bccd/instances_val.json", "coco_mini/instances_val.json"])
def test_tables_and_json_give_the_numbers_of_pycocotools(test_data: Path, tmp_path: Path, file: str) -> None:
    content = json.loads((test_data / file).read_bytes())
    results = made_up_results(content, seed=1)
    rows, categories = coco_to_rows(content)
    detection_rows = results_to_rows(results, rows, categories)
    # Rows and categories in another order, as another worker or source might write them.
    reordered = categories[::-1]
    for row in detection_rows:
        row["detections"]["category"] = [len(categories) - 1 - index for index in row["detections"]["category"]]
    write_images(tmp_path / "truth", rows, categories)
    write_detections(tmp_path / "detections", detection_rows[::-1], reordered)
    (tmp_path / "results.json").write_text(json.dumps(results))
    expected = pycocotools_stats(test_data / file, tmp_path / "results.json")
    assert expected[0] > 0.1
    for truth in (tmp_path / "truth", test_data / file):
        for detections in (tmp_path / "detections", tmp_path / "results.json"):
            for num_shards in (None, 3, 1000):
                config = EvaluateConfig(truth=str(truth), detections=str(detections), num_shards=num_shards)
                evaluation = evaluate(config)
                assert numbers(evaluation) == expected
                assert evaluation.result.num_detections == len(results)
                assert evaluation.result.num_truth == len(content["annotations"])


def test_classes_of_the_model_that_the_truth_lacks_are_left_out_and_counted(test_data: Path, tmp_path: Path) -> None:
    """Check a model for COCO's 91 ids, which names the unused ones N/A and writes some names in another way."""
    content = json.loads((test_data / "coco_mini/instances_val.json").read_bytes())
    results = made_up_results(content, seed=1)
    rows, categories = coco_to_rows(content)
    detection_rows = results_to_rows(results, rows, categories)
    (tmp_path / "results.json").write_text(json.dumps(results))
    name_of = {category.id: category.name.upper().replace(" ", "_") for category in categories}
    labels = [Category(index, name_of.get(index, "N/A")) for index in range(91)]
    labels[0] = Category(0, "a class of its own")
    assert labels[63].name == "COUCH"
    labels[63] = Category(63, "sofa")
    assert 91 - len(categories) > 1
    for row in detection_rows:
        found = row["detections"]
        found["category"] = [categories[index].id for index in found["category"]]
        for other in (0, 12) if found["category"] else ():
            assert other not in name_of
            found |= {"bbox": [*found["bbox"], [1.0, 1, 9, 9]], "score": [*found["score"], 1e-6]}
            found["category"] = [*found["category"], other]
    write_images(tmp_path / "truth", rows, categories)
    write_detections(tmp_path / "detections", detection_rows, labels)
    expected = pycocotools_stats(test_data / "coco_mini/instances_val.json", tmp_path / "results.json")
    num_other = 2 * sum(bool(row["detections"]["category"]) for row in detection_rows)
    for out in (None, str(tmp_path / "metrics")):
        config = EvaluateConfig(
            truth=str(tmp_path / "truth"),
            detections=str(tmp_path / "detections"),
            out=out,
            bootstrap=0,
            class_mapping={"Sofa": "couch"},
        )
        evaluation = evaluate(config)
        assert numbers(evaluation) == expected
        assert evaluation.result.num_detections == len(results)
        assert evaluation.num_other_class == num_other > 0
        assert f"left out {num_other:,} detections of classes that the truth lacks" in evaluation.lines()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"class_mapping": None}, r"only in detections .*'sofa'; only in truth .*'couch'; .*--class-mapping"),
        ({"class_mapping": {"sofa": "settee"}}, r"--class-mapping: .*truth has no class settee"),
        ({"class_mapping": {"settee": "couch"}}, r"--class-mapping: .*detections has no class settee"),
        ({"detections": str(tmp_path / "results.json")}, "COCO results have no names"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            evaluate(dataclasses.replace(config, out=None, **changes))


CATEGORIES = [Category(3, "cat"), Category(8, "dog")]
OBJECTS = {"id": [1, 2], "bbox": [[10.0, 10, 20, 20], [50.0, 50, 30, 40]], "category": [0, 1]}
OBJECTS |= {"area": [400.0, 1200.0], "iscrowd": [False, False]}
NOTHING: Row = {"bbox": [], "score": [], "category": []}


@dataclass
class Inputs:
    """Small valid truth and detections, for tests to break; `config` writes them."""

    folder: Path
    truth: list[Row]
    detections: list[Row]
    truth_categories: list[Category]
    detection_categories: list[Category]

    def config(self, **options: Any) -> EvaluateConfig:
        write_images(self.folder / "val", self.truth, self.truth_categories)
        write_detections(self.folder / "found", self.detections, self.detection_categories, checkpoint="tiny")
        values: dict[str, Any] = {
            "truth": str(self.folder / "val"),
            "detections": str(self.folder / "found"),
            "bootstrap": 20,
        }
        values |= options
        return EvaluateConfig(**values)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    truth = [{"image_id": i, "width": 100, "height": 100, "objects": OBJECTS} for i in (5, 2, 9)]
    truth.append({"image_id": 11, "width": 100, "height": 100, "objects": {key: [] for key in OBJECTS}})
    found = {
        "bbox": [[10.0, 10, 20, 20], [50.0, 50, 30, 39], [0.0, 0, 5, 5]],
        "score": [0.9, 0.8, 0.3],
        "category": [0, 1, 1],
    }
    common = {"path": "a.png", "width": 100, "height": 100}
    detections = [{"image_id": i, **common, "detections": found, "error": None} for i in (2, 9)]
    detections.append({"image_id": 5, **common, "detections": NOTHING, "error": "truncated file"})
    detections.append({"image_id": 11, **common, "detections": NOTHING, "error": None})
    return Inputs(tmp_path, truth, detections, list(CATEGORIES), list(CATEGORIES))


def test_unreadable_images_count_as_missed_and_are_reported(inputs: Inputs) -> None:
    evaluation = evaluate(inputs.config())
    result = evaluation.result
    assert (result.num_images, result.num_truth, result.num_detections, result.num_unreadable) == (4, 6, 6, 1)
    assert result.values["AR1"] == pytest.approx(2 / 3)
    assert any("1 images could not be read" in line for line in evaluation.lines())
    assert evaluation.out is None


def test_the_text_holds_the_numbers_aligned(inputs: Inputs) -> None:
    evaluation = evaluate(inputs.config(out=str(inputs.folder / "out")))
    lines = evaluation.lines()
    by_name = {line.split()[0]: line.split()[1] for line in lines if line}
    for name, value in evaluation.result.values.items():
        assert by_name[name] == ("–" if value is None else f"{value:.3f}")
    assert by_name["APl"] == "–"
    start = next(number for number, line in enumerate(lines) if line.startswith("class"))
    table = lines[start : start + 3]
    assert [line.split()[0] for line in table] == ["class", "cat", "dog"]
    assert len({len(line) for line in table}) == 1
    assert table[0].split()[1:4] == ["AP", "AP50", "AP75"]
    assert table[2].split()[1] == f"{evaluation.result.per_class[1].AP:.3f}"
    assert lines[-1] == f"metrics: {inputs.folder / 'out'}"


def test_the_numbers_are_at_hand_in_python(inputs: Inputs) -> None:
    evaluation = evaluate(truth=inputs.config().truth, detections=inputs.config().detections)
    assert evaluation.numbers == evaluation.result.values and len(evaluation.numbers) == 12
    rows = evaluation.per_class.to_pylist()
    assert [row.pop("class_name") for row in rows] == ["cat", "dog"]
    assert rows == [numbers.values for numbers in evaluation.result.per_class]
    assert "<pre>4 images" in evaluation._repr_html_()
    as_one = evaluate(inputs.config(class_agnostic=True))
    assert as_one.per_class.num_rows == 0 and as_one.numbers["AP"] is not None


def test_metrics_table_holds_the_numbers_and_where_they_come_from(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    evaluation = evaluate(inputs.config(out=str(out)))
    table = open_table(str(out / "metrics"), "metrics")
    assert list(table.categories) == CATEGORIES
    assert table.manifest["num_unreadable"] == 1
    rows = table.read().to_pylist()
    assert {(row["run"], row["model"], row["split"]) for row in rows} == {("found", "tiny", "val")}
    values = {row["metric"]: row["value"] for row in rows if row["category"] is None}
    expected = evaluation.result.values
    assert {name: values[name] for name in expected} == expected
    assert values["best_f1_threshold"] == 0.8
    assert [row["value"] for row in rows if row["metric"] == "AP" and row["category"] == "dog"] == [
        evaluation.result.per_class[1].AP
    ]


def test_names_in_the_table_can_be_given(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    evaluate(inputs.config(out=str(out), run="r1", model="m1", split="test"))
    row = open_table(str(out / "metrics"), "metrics").read().to_pylist()[0]
    assert (row["run"], row["model"], row["split"]) == ("r1", "m1", "test")
    assert set(open_table(str(out / "per_image"), "per_image").read()["run"].to_pylist()) == {"r1"}


def test_per_image_table_counts_at_the_threshold_of_the_best_f1(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    evaluate(inputs.config(out=str(out)))
    table = open_table(str(out / "per_image"), "per_image")
    # At 0.8 and above all four detections are right; the two below are wrong.
    # At 0.8 and above, all four detections are correct; the two below are wrong.
    found = [
        tuple(row[name] for name in ("image_id", "num_truth", "num_detections", "true_positives", "false_positives"))
        for row in table.read().to_pylist()
    ]
    assert found == [(2, 2, 2, 2, 0), (5, 2, 0, 0, 0), (9, 2, 2, 2, 0), (11, 0, 0, 0, 0)]
    columns = table.read().to_pydict()
    assert columns["false_negatives"] == [0, 2, 0, 0]
    assert columns["f1"] == [1.0, 0.0, 1.0, None]
    assert columns["error"] == [None, "truncated file", None, None]


def test_without_any_detection_everything_is_missed(inputs: Inputs) -> None:
    for row in inputs.detections:
        row["detections"] = NOTHING
    out = inputs.folder / "out"
    evaluation = evaluate(inputs.config(out=str(out)))
    assert evaluation.result.values["AR100"] == 0.0
    # No image differs from another, so there is no spread that an interval could show.
    (line,) = (line for line in evaluation.lines() if line.startswith("AP "))
    assert re.search(r"100  ≤ 0\.\d{3}$", line)
    assert any(line.startswith("≤, ≥: all images agree") for line in evaluation.lines())
    assert not any(line.startswith("95 %:") for line in evaluation.lines())
    columns = open_table(str(out / "per_image"), "per_image").read().to_pydict()
    assert columns["false_negatives"] == [2, 2, 2, 0]


def test_the_same_evaluation_may_be_written_again(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    config = inputs.config(out=str(out), num_shards=1)
    evaluate(config)
    first = open_table(str(out / "metrics"), "metrics").read()
    evaluate(dataclasses.replace(config, num_shards=2))
    assert open_table(str(out / "metrics"), "metrics").read().equals(first)
    assert len(list((out / "metrics").glob("*.parquet"))) == 1


def test_numbers_of_another_evaluation_are_not_overwritten(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    evaluate(inputs.config(out=str(out)))
    before = (out / "metrics" / MANIFEST_NAME).read_bytes()
    with pytest.raises(UserError, match=r"detections: .* → .*elsewhere") as caught:
        evaluate(EvaluateConfig(truth=str(inputs.folder / "val"), detections="elsewhere", run="found", out=str(out)))
    assert str(out) in str(caught.value)
    assert (out / "metrics" / MANIFEST_NAME).read_bytes() == before


def test_other_files_are_not_deleted(inputs: Inputs) -> None:
    diary = inputs.folder / "out" / "metrics" / "notes" / "diary.txt"
    diary.parent.mkdir(parents=True)
    diary.write_text("mine")
    with pytest.raises(UserError, match=r"did not write.*metrics/notes/diary\.txt"):
        evaluate(inputs.config(out=str(inputs.folder / "out")))
    assert diary.read_text() == "mine"


def test_out_must_not_be_a_file(inputs: Inputs) -> None:
    (inputs.folder / "out").write_text("")
    with pytest.raises(UserError, match="--out"):
        evaluate(inputs.config(out=str(inputs.folder / "out")))


def test_half_written_tables_are_written_anew(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    evaluate(inputs.config(out=str(out)))
    (out / "metrics" / MANIFEST_NAME).unlink()
    (out / "metrics" / "part-00001.parquet").write_bytes(b"half")
    evaluate(inputs.config(out=str(out)))
    metrics = open_table(str(out / "metrics"), "metrics").read()["metric"].to_pylist()
    assert (metrics.count("AP"), metrics.count("ARl")) == (3, 3)
    assert not (out / "metrics" / "part-00001.parquet").exists()


KINDS: tuple[TableKind, ...] = (
    "metrics",
    "per_image",
    "pr_curves",
    "errors",
    "confusion",
    "calibration",
    "suspects",
    "runs",
)


def two_runs(inputs: Inputs) -> tuple[Path, float, float]:
    """Write two runs into one folder, the second of which found less; return the folder and their AP."""
    out = inputs.folder / "out"
    config = inputs.config(out=str(out), run="good")
    good = evaluate(config).result.AP
    for row in inputs.detections[:1]:
        row["detections"] = NOTHING
    write_detections(inputs.folder / "worse", inputs.detections, inputs.detection_categories)
    bad = evaluate(dataclasses.replace(config, detections=str(inputs.folder / "worse"), run="bad/1")).result.AP
    assert good is not None and bad is not None and bad < good
    return out, good, bad


def test_runs_stand_beside_each_other_and_can_be_queried(inputs: Inputs) -> None:
    out, good, bad = two_runs(inputs)
    for kind in KINDS:
        table = open_table(str(out / kind), kind)
        assert len(table.files) == 2
    query = (
        f"SELECT run, value FROM '{out}/metrics/*.parquet' "
        "WHERE metric = 'AP' AND category IS NULL AND slice IS NULL ORDER BY value"
    )
    assert pytest.importorskip("duckdb").sql(query).fetchall() == [("bad/1", bad), ("good", good)]
    frame = pandas.read_parquet(out / "metrics")
    chosen = frame[(frame["metric"] == "AP") & frame["category"].isna() & frame["slice"].isna()]
    assert dict(zip(chosen["run"], chosen["value"], strict=True)) == {"good": good, "bad/1": bad}


def test_the_runs_table_says_where_the_numbers_come_from(inputs: Inputs) -> None:
    out, _, _ = two_runs(inputs)
    good = next(row for row in open_table(str(out / "runs"), "runs").read().to_pylist() if row["run"] == "good")
    assert (good["model"], good["split"], good["checkpoint_hash"]) == ("tiny", "val", None)
    assert (good["truth"], good["detections"]) == (str(inputs.folder / "val"), str(inputs.folder / "found"))
    counts = ("num_images", "num_truth", "num_detections", "num_unreadable", "num_left_out")
    assert [good[name] for name in counts] == [4, 6, 6, 1, 0]
    assert json.loads(good["config"])["bootstrap"] == 20
    manifest = (inputs.folder / "val" / MANIFEST_NAME).read_bytes()
    assert good["data_hash"] == hashlib.sha256(manifest).hexdigest()[:16]


def test_measuring_a_run_again_replaces_its_rows_alone(inputs: Inputs) -> None:
    out, _, _ = two_runs(inputs)
    before = {kind: open_table(str(out / kind), kind).read() for kind in KINDS}
    evaluate(EvaluateConfig(**json.loads(before["runs"].to_pylist()[1]["config"])))
    for kind in set(KINDS) - {"runs"}:
        assert open_table(str(out / kind), kind).read().equals(before[kind])
    assert open_table(str(out / "runs"), "runs").num_rows == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_dies_while_writing_leaves_no_metrics_of_it(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, kind: TableKind
) -> None:
    out, _, bad = two_runs(inputs)
    write = storage.write_bytes

    def dying(uri: str, data: bytes) -> None:
        if f"/{kind}/good" in uri:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", dying)
    config = EvaluateConfig(**json.loads(open_table(str(out / "runs"), "runs").read().to_pylist()[1]["config"]))
    assert config.run == "good"
    with pytest.raises(RunError, match=r"No space left"):
        evaluate(config)
    rows = open_table(str(out / "metrics"), "metrics").read().to_pylist()
    assert {row["run"] for row in rows} == {"bad/1"}
    assert [row["value"] for row in rows if row["metric"] == "AP" and row["category"] is None] == [bad]
    assert len(list((out / "metrics").glob("*.parquet"))) == 1
    monkeypatch.undo()
    evaluate(config)
    assert len(open_table(str(out / "metrics"), "metrics").files) == 2


def test_other_options_under_the_same_name_are_refused(inputs: Inputs) -> None:
    config = inputs.config(out=str(inputs.folder / "out"), run="r1")
    evaluate(config)
    with pytest.raises(UserError, match=r"--max-detections: None → \[5\].*r1.*--run"):
        evaluate(dataclasses.replace(config, max_detections=[5]))
    evaluate(dataclasses.replace(config, max_detections=[5], run="r2"))


def test_numbers_have_intervals(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    evaluation = evaluate(inputs.config(out=str(out)))
    rows = [row for row in open_table(str(out / "metrics"), "metrics").read().to_pylist() if row["metric"] == "AP"]
    assert len(rows) == 3
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    interval = f"{rows[0]['low']:.3f}–{rows[0]['high']:.3f}"
    assert any(line.startswith("AP ") and line.endswith(interval) for line in evaluation.lines())
    assert any(line.startswith("95 %: from resampling the images") for line in evaluation.lines())
    without = evaluate(inputs.config(out=str(inputs.folder / "quick"), bootstrap=0))
    assert {value.low for block in without.whole.blocks for value in block} == {None}
    assert open_table(str(inputs.folder / "quick" / "metrics"), "metrics").read()["low"].null_count > 0


def test_what_both_sides_have_can_be_measured(inputs: Inputs) -> None:
    drop_rows(inputs)
    add = {**inputs.detections[0], "image_id": 77, "error": "gone"}
    inputs.detections.append(add)
    out = inputs.folder / "out"
    evaluation = evaluate(inputs.config(allow_partial=True, out=str(out)))
    result = evaluation.result
    assert (result.num_images, result.num_truth, result.num_unreadable, evaluation.num_left_out) == (2, 2, 1, 3)
    assert re.match(r"PARTIAL: .*\b3 images", evaluation.lines()[0])
    assert open_table(str(out / "runs"), "runs").read()["num_left_out"].to_pylist() == [3]
    assert open_table(str(out / "per_image"), "per_image").read()["image_id"].to_pylist() == [5, 11]


def test_nothing_in_common_is_a_mistake_even_so(inputs: Inputs) -> None:
    inputs.detections[:] = [{**row, "image_id": row["image_id"] + 1000} for row in inputs.detections]
    for allow_partial in (False, True):
        with pytest.raises(UserError, match=r"\b4 images .*image 1002"):
            evaluate(inputs.config(allow_partial=allow_partial))


def test_slices_are_measured_apart(inputs: Inputs) -> None:
    fields = [pa.field("camera", pa.string())]
    config = inputs.config()
    with TableWriter(
        str(inputs.folder / "val"), build_schema("images", CATEGORIES, extra_fields=fields), config_hash="x"
    ) as writer:
        for row, camera in zip(inputs.truth, ("front", "front", "rear", None), strict=True):
            image = {"bytes": b"not a picture", "path": "a.png"}
            writer.write_rows([{"image": image, **row, "camera": camera}])
    out = inputs.folder / "out"
    config = dataclasses.replace(config, out=str(out), slice_by=["camera", "box_size"])
    evaluation = evaluate(config)
    rows = open_table(str(out / "metrics"), "metrics").read().to_pylist()
    ap = {row["slice"]: row for row in rows if row["metric"] == "AP" and row["category"] is None}
    # Images 5 (unreadable) and 2 are from the front camera, 9 from the rear one; 11 has neither box nor camera.
    assert ap["camera=front"]["value"] < ap["camera=rear"]["value"]
    assert ap["camera=unknown"]["value"] is None
    assert ap[None]["low"] is not None and ap["camera=front"]["low"] is None  # two images are too few
    assert ap["box_size=small"]["value"] == evaluation.result.APs
    assert (ap["box_size=medium"]["value"], ap["box_size=medium"]["area"]) == (evaluation.result.APm, "medium")
    assert ap["box_size=large"]["value"] is None
    assert any(line.startswith("camera=rear") for line in evaluation.lines())
    with pytest.raises(UserError, match=r"weather.*camera"):
        evaluate(dataclasses.replace(config, slice_by=["weather"], run="other"))


def test_classes_can_count_as_one(test_data: Path, tmp_path: Path) -> None:
    file = test_data / "coco_mini" / "instances_val.json"
    results = made_up_results(json.loads(file.read_bytes()), seed=2)
    (tmp_path / "results.json").write_text(json.dumps(results))
    config = EvaluateConfig(
        truth=str(file), detections=str(tmp_path / "results.json"), class_agnostic=True, out=str(tmp_path / "out")
    )
    evaluation = evaluate(config)
    with contextlib.redirect_stdout(io.StringIO()):
        truth_coco = COCO(str(file))
        evaluator = COCOeval(truth_coco, truth_coco.loadRes(config.detections), "bbox")
        evaluator.params.useCats = 0
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    assert numbers(evaluation) == evaluator.stats.tolist()
    assert evaluation.whole.blocks[1:] == ()
    assert open_table(str(tmp_path / "out" / "confusion"), "confusion").num_rows > 0


def test_other_thresholds_and_limits(inputs: Inputs) -> None:
    evaluation = evaluate(inputs.config(iou_thresholds=[0.3, 0.75], max_detections=[2], out=str(inputs.folder / "out")))
    assert [value.metric for value in evaluation.whole.blocks[0]] == [
        "AP",
        "AP75",
        "APs",
        "APm",
        "APl",
        "AR2",
        "ARs",
        "ARm",
        "ARl",
    ]
    assert any(line.split()[2:3] == [".30:.75"] for line in evaluation.lines())


@pytest.mark.parametrize("protocol", ["voc", "voc07"])
def test_pascal_voc(inputs: Inputs, protocol: str) -> None:
    out = inputs.folder / "out"
    evaluation = evaluate(inputs.config(protocol=protocol, out=str(out)))
    # Two of three boxes of each class are found, and no wrong detection has a higher score.
    expected = {"voc": 2 / 3, "voc07": 7 / 11}[protocol]
    assert pytest.approx(expected) == evaluation.result.AP50
    assert evaluation.result.AP is None
    rows = open_table(str(out / "metrics"), "metrics").read().to_pylist()
    values = [row["value"] for row in rows if row["metric"] == "AP50"]
    assert values == pytest.approx([expected] * 3)


def test_lvis_judges_only_what_is_known(tmp_path: Path) -> None:
    images = [
        {"id": 5, "width": 99, "height": 99, "neg_category_ids": [3], "not_exhaustive_category_ids": []},
        {"id": 2, "width": 99, "height": 99, "neg_category_ids": [], "not_exhaustive_category_ids": [8]},
    ]
    false_alarms = [{**RESULT, "image_id": 2, "category_id": 3, "score": 0.9}]
    truth = {**TRUTH_JSON, "images": images}
    for name, content in {"instances.json": truth, "results.json": [{**RESULT, "score": 0.5}, *false_alarms]}.items():
        (tmp_path / name).write_text(json.dumps(content))
    config = EvaluateConfig(
        truth=str(tmp_path / "instances.json"),
        detections=str(tmp_path / "results.json"),
        protocol="lvis",
        out=str(tmp_path / "out"),
    )
    assert pytest.approx(1) == evaluate(config).result.AP
    assert open_table(str(tmp_path / "out" / "runs"), "runs").num_rows == 1
    (tmp_path / "instances.json").write_text(json.dumps(TRUTH_JSON))
    with pytest.raises(UserError, match="LVIS"):
        evaluate(config)


def test_small_inputs_start_no_ray(inputs: Inputs) -> None:
    config = inputs.config(out=str(inputs.folder / "out"))
    code = (
        "import sys, raydet; "
        f"raydet.evaluate(raydet.EvaluateConfig(truth={config.truth!r}, detections={config.detections!r}, "
        f"out={config.out!r})); "
        "print(sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def change_detections(**values: Any) -> Callable[[Inputs], None]:
    """Return a function that replaces values in the detections of the first row."""

    def change(inputs: Inputs) -> None:
        row = inputs.detections[0]
        inputs.detections[0] = {**row, "detections": {**row["detections"], **values}}

    return change


def boxes_with(*box: float) -> list[list[float]]:
    return [[10.0, 10, 20, 20], [50.0, 50, 30, 39], list(box)]


def rename_a_category(inputs: Inputs) -> None:
    inputs.detection_categories[1] = Category(8, "wolf")


def share_a_name(inputs: Inputs) -> None:
    inputs.truth_categories[:] = [Category(3, "cat"), Category(8, "dog"), Category(9, "cat")]
    inputs.detection_categories[:] = [Category(3, "cat"), Category(9, "cat"), Category(8, "dog")]


def drop_rows(inputs: Inputs) -> None:
    del inputs.detections[:2]


def repeat_a_row(inputs: Inputs) -> None:
    inputs.detections.append(inputs.detections[0])


def add_an_unknown_image(inputs: Inputs) -> None:
    inputs.detections.append({**inputs.detections[0], "image_id": 77})


def repeat_an_image_of_the_truth(inputs: Inputs) -> None:
    inputs.truth.append(inputs.truth[0])


def forget_the_categories(inputs: Inputs) -> None:
    inputs.truth_categories.clear()


def empty_the_truth(inputs: Inputs) -> None:
    inputs.truth.clear()


def error_with_detections(inputs: Inputs) -> None:
    inputs.detections[0] = {**inputs.detections[0], "error": "truncated file"}


def negative_truth(inputs: Inputs) -> None:
    inputs.truth[0] = {**inputs.truth[0], "objects": {**OBJECTS, "bbox": [[1.0, 1, -2, 2], [1.0, 1, 2, 2]]}}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (add_an_unknown_image, r"found .*\b1 images .*val .*image 77"),
        (repeat_a_row, r"found .*image 2\b"),
        (drop_rows, r"\b2 of the 4 images of .*val.* image 2\b.*--allow-partial"),
        (rename_a_category, r"only in .*found: 'wolf'; only in .*val: 'dog'"),
        (share_a_name, r"share a name"),
        (change_detections(category=[0, 1, 2]), r"found: .*category .*\b2 categories"),
        (change_detections(category=[0, 1, -1]), r"found: .*category .*\b2 categories"),
        (change_detections(score=[0.9, 0.8, math.nan]), r"found: 1 .*score .*finite.*image 2"),
        (change_detections(score=[0.9, 0.8, math.inf]), r"score .*finite"),
        (change_detections(score=[0.9, 0.8, 1.5]), r"\b1 detections .*score .*0 … 1.*image 2"),
        (change_detections(score=[0.9, -0.1, -0.5]), r"\b2 detections .*score .*0 … 1"),
        (change_detections(score=[0.9, 0.8]), r"`detections`"),
        (change_detections(score=[0.9, 0.8, None]), r"`detections`"),
        (change_detections(bbox=boxes_with(0, 0, math.nan, 5)), r"\b1 detections .*box .*finite.*image 2"),
        (change_detections(bbox=boxes_with(-math.inf, 0, 5, 5)), r"box .*finite"),
        (change_detections(bbox=boxes_with(0, 0, -5, 5)), r"negative width or height"),
        (change_detections(bbox=boxes_with(0, 0, 5, -5)), r"negative width or height"),
        (error_with_detections, r"`error`"),
        (repeat_an_image_of_the_truth, r"val .*ids.*\b5\b"),
        (forget_the_categories, r"val .*no categories"),
        (empty_the_truth, r"val .*no images"),
        (negative_truth, r"val: 1 boxes .*negative width.*image 5"),
    ],
)
def test_a_mistake_in_the_tables_gets_one_line(inputs: Inputs, spoil: Callable[[Inputs], None], message: str) -> None:
    spoil(inputs)
    out = inputs.folder / "out"
    with pytest.raises(UserError, match=message) as caught:
        evaluate(inputs.config(out=str(out)))
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_missing_and_unfinished_inputs_get_one_line(inputs: Inputs) -> None:
    config = inputs.config()
    with pytest.raises(UserError, match=r"no such truth: .*nowhere.*images table or COCO instances JSON"):
        evaluate(EvaluateConfig(truth=str(inputs.folder / "nowhere"), detections=config.detections))
    with pytest.raises(UserError, match=r"no such detections: .*nowhere\.json.*detections table"):
        evaluate(EvaluateConfig(truth=config.truth, detections=str(inputs.folder / "nowhere.json")))
    with pytest.raises(UserError, match=r"table of images.*table of detections"):
        evaluate(EvaluateConfig(truth=config.truth, detections=config.truth))
    (inputs.folder / "boxes.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"\.json"):
        evaluate(EvaluateConfig(truth=str(inputs.folder / "boxes.csv"), detections=config.detections))
    (inputs.folder / "found" / MANIFEST_NAME).unlink()
    with pytest.raises(UserError, match="found"):
        evaluate(config)


def test_a_table_that_lost_rows_or_bytes_gets_one_line(inputs: Inputs) -> None:
    config = inputs.config()
    manifest_path = inputs.folder / "found" / MANIFEST_NAME
    manifest = json.loads(manifest_path.read_bytes())
    manifest_path.write_text(json.dumps({**manifest, "num_rows": 5, "files": {"part-00000.parquet": [[5, 99]]}}))
    with pytest.raises(UserError, match=r"found is damaged.*part-00000.*\b4 .*\b5\b"):
        evaluate(config)
    manifest["num_rows"], manifest["files"]["part-00001.parquet"] = 5, [[1, 99]]
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"found lacks the file part-00001") as caught:
        evaluate(config)
    assert "\n" not in str(caught.value)


TRUTH_JSON: Row = {
    "images": [{"id": 5, "width": 100, "height": 100}, {"id": 2}],
    "annotations": [{"id": 1, "image_id": 5, "category_id": 8, "bbox": [10, 10, 20, 20], "iscrowd": 0}],
    "categories": [{"id": 8, "name": "dog"}, {"id": 3, "name": "cat"}],
}
RESULT: Row = {"image_id": 5, "category_id": 8, "bbox": [10, 10, 20, 20], "score": 1}


def evaluate_json(folder: Path, truth: Any, results: Any) -> Evaluation:
    paths = {"truth": folder / "instances.json", "detections": folder / "results.json"}
    for path, content in zip(paths.values(), (truth, results), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return evaluate(EvaluateConfig(truth=str(paths["truth"]), detections=str(paths["detections"])))


def test_json_may_leave_out_area_and_crowd_and_images_without_detections(tmp_path: Path) -> None:
    annotation = {"id": 1, "image_id": 5, "category_id": 8, "bbox": [10, 10, 20, 20]}
    result = evaluate_json(tmp_path, {**TRUTH_JSON, "annotations": [annotation]}, [RESULT]).result
    assert [category.name for category in result.categories] == ["cat", "dog"]
    assert [result.values[name] for name in ("AP50", "APs", "APm")] == [pytest.approx(1), pytest.approx(1), None]
    assert result.num_images == 2
    assert evaluate_json(tmp_path, TRUTH_JSON, []).result.values["AP"] == 0.0


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ("[{", r"results\.json .*JSON"),
        ({"annotations": []}, r"results\.json .*list"),
        ([RESULT, "text"], r"results\[1\] .*'text'"),
        ([{**RESULT, "image_id": "5"}], r"results\[0\]: image_id .*'5'"),
        ([{**RESULT, "image_id": -5}], r"results\[0\]: image_id .*-5"),
        ([{**RESULT, "category_id": None}], r"results\[0\]: category_id .*None"),
        ([{**RESULT, "bbox": [1, 2, 3]}], r"results\[0\]: bbox .*four numbers"),
        ([{**RESULT, "bbox": [1, 2, 3, "4"]}], r"results\[0\]: bbox .*'4'"),
        ([{**RESULT, "score": True}], r"results\[0\]: score .*True"),
        ([{**RESULT, "image_id": 6}], r"\b1 images .*image 6"),
        ([{**RESULT, "category_id": 4}], r"category ids .*\b4\b"),
        ([{**RESULT, "score": math.nan}], r"\b1 detections .*score .*finite.*image 5"),
        ([{**RESULT, "score": 2}], r"score .*0 … 1"),
        ([{**RESULT, "bbox": [0, 0, math.inf, 1]}], r"box .*finite"),
        ([{**RESULT, "bbox": [0, 0, -1, 1]}], r"negative width or height"),
    ],
)
def test_a_mistake_in_results_json_gets_one_line(tmp_path: Path, results: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        evaluate_json(tmp_path, TRUTH_JSON, results)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", r"instances\.json .*JSON"),
        ([], r"instances\.json .*list.*COCO instances"),
        ({"annotations": {}}, r'"annotations" .*list.*dict'),
        ({"images": []}, r"annotations .*\b1 images"),
        ({"images": [], "annotations": []}, r"no images"),
        ({"images": [{"id": 5}, {"id": 5}]}, r"ids.*\b5\b"),
        ({"images": [{"id": 2**53}]}, r"images\[0\]: id .*2\*\*53"),
        ({"categories": [{"id": 8, "name": "a"}, {"id": 8, "name": "b"}]}, r"category ids"),
        ({"categories": [{"id": 8}]}, r"categories\[0\]: name .*string"),
        ({"categories": [], "annotations": []}, r"no categories"),
        ({"annotations": [{"image_id": 6, "category_id": 8, "bbox": [0, 0, 1, 1]}]}, r"\b1 images .*image 6"),
        ({"annotations": [{"image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, r"category ids .*\b1\b"),
        ({"annotations": [{"image_id": 5, "category_id": 8, "bbox": [0, 0, -1, 1]}]}, r"\b1 boxes .*image 5"),
        ({"annotations": [{"image_id": 5, "category_id": 8, "bbox": [0, 0, math.nan, 1]}]}, r"\b1 boxes .*image 5"),
    ],
)
def test_a_mistake_in_instances_json_gets_one_line(tmp_path: Path, change: Any, message: str) -> None:
    truth = {**TRUTH_JSON, **change} if isinstance(change, dict) else change
    with pytest.raises(UserError, match=message) as caught:
        evaluate_json(tmp_path, truth, [RESULT])
    assert "\n" not in str(caught.value)
