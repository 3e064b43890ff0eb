"""Exports to COCO JSON preserve all numbers exactly."""

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pycocotools.coco import COCO

from raydet.common.errors import UserError
from raydet.config import EvaluateConfig, ExportCocoConfig, PrepareCocoConfig
from raydet.exports.coco import CocoExportReport, export_coco
from raydet.measuring.evaluate import evaluate
from raydet.preparation.prepare import prepare_coco
from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.schema import LABELLED_COLUMN, Category, build_schema
from raydet.tables.table import TableWriter, open_table

Row = dict[str, Any]
SPARSE = [Category(7, "cat"), Category(2, "dog")]
"""Categories whose ids are neither indices nor in index order."""


def _export(data: str, out: str, *, score_threshold: float = 0.0) -> CocoExportReport:
    return export_coco(ExportCocoConfig(data=data, out=out, score_threshold=score_threshold))


def write_detections(folder: Path, rows: list[Row], categories: list[Category]) -> str:
    with TableWriter(str(folder), build_schema("detections", categories), config_hash="x") as writer:
        writer.write_rows([{"path": "a.png", "width": 64, "height": 64, "error": None, **row} for row in rows])
    return str(folder)


def write_images(folder: Path, rows: list[Row], categories: list[Category], **kwargs: Any) -> str:
    with TableWriter(str(folder), build_schema("images", categories, **kwargs), config_hash="x") as writer:
        writer.write_rows(rows)
    return str(folder)


def detections(image_id: int, *found: tuple[list[float], float, int], error: str | None = None) -> Row:
    boxes, scores, categories = zip(*found, strict=True) if found else ((), (), ())
    return {
        "image_id": image_id,
        "detections": {"bbox": list(boxes), "score": list(scores), "category": list(categories)},
        "error": error,
    }


def image(image_id: int, path: str, *boxes: tuple[list[float], int, bool], **extra: object) -> Row:
    objects = {
        "id": [100 - number for number in range(len(boxes))],
        "bbox": [box for box, _, _ in boxes],
        "category": [category for _, category, _ in boxes],
        "area": [box[2] * box[3] / 3 for box, _, _ in boxes],
        "iscrowd": [is_crowd for _, _, is_crowd in boxes],
    }
    stored = {"bytes": None, "path": path}
    return {"image_id": image_id, "image": stored, "width": 64, "height": 48, "objects": objects, **extra}


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_results_hold_the_same_numbers_and_the_ids_of_the_source(tmp_path: Path) -> None:
    odd = [0.1 + 0.2, 1e-7, 1 / 3, 123456.789e3]
    rows = [
        detections(5, (odd, 0.30000001192092896, 1), ([1.0, 2.0, 3.0, 4.0], 0.25, 0)),
        detections(3),
        detections(2**53 - 1, ([-0.5, 5e-324, 1e14, 7.0], 1.0, 0)),
        detections(4, error="empty file"),
    ]
    report = _export(write_detections(tmp_path / "found", rows, SPARSE), str(tmp_path / "deep" / "results.json"))
    assert load(tmp_path / "deep" / "results.json") == [
        {"image_id": 5, "category_id": 2, "bbox": odd, "score": 0.30000001192092896},
        {"image_id": 5, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.25},
        {"image_id": 2**53 - 1, "category_id": 7, "bbox": [-0.5, 5e-324, 1e14, 7], "score": 1},
    ]
    assert (report.kind, report.num_images, report.num_boxes, report.num_omitted) == ("detections", 4, 3, 0)
    assert report.lines()[0] == "3 detections of 4 images"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["results.json"]


def test_every_float64_reads_back_as_it_was(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    numbers = generator.random((2000, 5)) * 10.0 ** generator.integers(-12, 12, (2000, 5))
    numbers[:, 4] = generator.random(2000)
    rows = [detections(number, (line[:4].tolist(), float(line[4]), 0)) for number, line in enumerate(numbers)]
    _export(write_detections(tmp_path / "found", rows, SPARSE), str(tmp_path / "r.json"))
    read = np.array([[*item["bbox"], item["score"]] for item in load(tmp_path / "r.json")])
    assert read.tobytes() == numbers.tobytes()


def test_the_threshold_leaves_out_what_is_at_or_below_it_and_zero_keeps_all(tmp_path: Path) -> None:
    box = [1.0, 1.0, 2.0, 2.0]
    rows = [detections(1, (box, 0.9, 0), (box, 0.5, 0), (box, 0.0, 1)), detections(2, (box, 0.4, 1))]
    table = write_detections(tmp_path / "found", rows, SPARSE)
    report = _export(table, str(tmp_path / "r.json"), score_threshold=0.5)
    assert [item["score"] for item in load(tmp_path / "r.json")] == [0.9]
    assert "3 at or below the threshold" in report.lines()[0]
    _export(table, str(tmp_path / "r.json"))
    assert [item["score"] for item in load(tmp_path / "r.json")] == [0.9, 0.5, 0, 0.4]
    _export(table, str(tmp_path / "r.json"), score_threshold=0.95)
    assert load(tmp_path / "r.json") == []


def noisy_detections(truth: str, folder: Path) -> str:
    """Build detections near the boxes of an images table, with false positives and equal scores."""
    table = open_table(truth, "images")
    generator = np.random.default_rng(1)
    rows = []
    for row in table.read(["image_id", "image", "objects"]).to_pylist():
        found = []
        for box, category in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True):
            for _ in range(generator.integers(0, 4)):
                near = np.array(box) + generator.normal(0, 2, 4)
                other = category if generator.random() < 0.8 else int(generator.integers(len(table.categories)))
                found.append((np.maximum(near, 0.5).tolist(), float(generator.integers(1, 11)) / 10, other))
        own = detections(row["image_id"], *sorted(found, key=lambda item: -item[1]))
        rows.append({**own, "path": row["image"]["path"]})
    return write_detections(folder, rows, list(table.categories))


def test_evaluate_gives_the_same_for_the_json_as_for_the_tables(shapes: Path, tmp_path: Path) -> None:
    truth = str(shapes / "train")
    table = noisy_detections(truth, tmp_path / "found")
    results, instances = str(tmp_path / "results.json"), str(tmp_path / "instances.json")
    _export(table, results)
    _export(truth, instances)
    expected = evaluate(EvaluateConfig(truth=truth, detections=table)).result
    assert expected.AP is not None and 0.05 < expected.AP < 0.95
    for truth_uri, detections_uri in ((truth, results), (instances, results), (instances, table)):
        result = evaluate(EvaluateConfig(truth=truth_uri, detections=detections_uri)).result
        assert result.values == expected.values
        assert result.per_class == expected.per_class


def test_pycocotools_loads_both_files(shapes: Path, tmp_path: Path) -> None:
    truth = open_table(str(shapes / "val"), "images")
    _export(truth.uri, str(tmp_path / "instances.json"))
    _export(noisy_detections(truth.uri, tmp_path / "found"), str(tmp_path / "results.json"))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "instances.json"))
        results = coco.loadRes(str(tmp_path / "results.json"))
    rows = truth.read(["image_id", "objects"]).to_pylist()
    num_boxes = sum(len(row["objects"]["bbox"]) for row in rows)
    assert sorted(coco.anns) == list(range(1, num_boxes + 1)) and num_boxes > 5
    assert set(coco.imgs) == {row["image_id"] for row in rows}
    assert {item["name"] for item in coco.cats.values()} == {category.name for category in truth.categories}
    for row in rows:
        boxes = [item["bbox"] for item in coco.imgToAnns[row["image_id"]]]
        assert boxes == row["objects"]["bbox"]
    assert len(results.anns) == len(load(tmp_path / "results.json")) > 0


def test_instances_have_sizes_areas_crowds_and_the_further_columns(tmp_path: Path) -> None:
    rows = [
        image(9, "a/1.png", ([1.5, 2.0, 6.0, 5.0], 1, True), ([0.0, 0.0, 1.0, 3.0], 0, False), city='Lü"b', lux=2.5),
        image(4, "2.png", city=None, lux=math.nan),
        image(6, "b/3.png", ([3.0, 3.0, 3.0, 3.0], 0, False), city="Ulm", lux=None),
    ]
    extra = [pa.field("city", pa.string()), pa.field("lux", pa.float64())]
    table = write_images(tmp_path / "images", rows, SPARSE, extra_fields=extra)
    report = _export(table, str(tmp_path / "instances.json"))
    content = load(tmp_path / "instances.json")
    assert [(item["id"], item["name"]) for item in content["categories"]] == [(7, "cat"), (2, "dog")]
    assert content["images"] == [
        {"id": 9, "file_name": "a/1.png", "width": 64, "height": 48, "city": 'Lü"b', "lux": 2.5},
        {"id": 4, "file_name": "2.png", "width": 64, "height": 48, "city": None},
        {"id": 6, "file_name": "b/3.png", "width": 64, "height": 48, "city": "Ulm", "lux": None},
    ]
    assert content["annotations"] == [
        {
            "id": 1,
            "image_id": 9,
            "category_id": 2,
            "bbox": [1.5, 2, 6, 5],
            "area": 10,
            "iscrowd": 1,
            "segmentation": [],
        },
        {"id": 2, "image_id": 9, "category_id": 7, "bbox": [0, 0, 1, 3], "area": 1, "iscrowd": 0, "segmentation": []},
        {"id": 3, "image_id": 6, "category_id": 7, "bbox": [3, 3, 3, 3], "area": 3, "iscrowd": 0, "segmentation": []},
    ]
    first, last = report.lines()
    assert first == "3 annotations of 3 images" and last.endswith(str(tmp_path / "instances.json"))


@pytest.mark.parametrize("storage_kind", ["inline", "reference"])
@pytest.mark.parametrize("labelled", [None, ["person", "cat", "clock"]])
def test_what_is_exported_can_be_prepared_again(
    test_data: Path, tmp_path: Path, storage_kind: Any, labelled: list[str] | None
) -> None:
    folder = test_data / "coco_mini"
    source = load(folder / "instances_val.json")
    images = {item["id"]: item for item in source["images"][:8]}
    part = {
        **source,
        "images": list(images.values()),
        "annotations": [item for item in source["annotations"] if item["image_id"] in images],
    }
    (tmp_path / "part.json").write_text(json.dumps(part))
    columns = ["image_id", "width", "height", "objects", *([] if labelled is None else [LABELLED_COLUMN])]
    contents = []
    annotations = str(tmp_path / "part.json")
    image_folder = str(folder / "val")
    for name in ("first", "second"):
        out = str(tmp_path / name)
        prepare_coco(
            PrepareCocoConfig(
                images=image_folder,
                annotations=annotations,
                out=out,
                image_storage=storage_kind,
                labelled=labelled if name == "first" else None,
            )
        )
        table = open_table(out, "images")
        assert (LABELLED_COLUMN in table.schema.names) == (labelled is not None)
        contents.append(table.read(columns).to_pylist())
        annotations = str(tmp_path / f"{name}.json")
        report = _export(out, annotations)
        image_folder = report.images_folder or image_folder
    assert contents[0] == contents[1]
    assert len(contents[0]) == 8 and sum(len(row["objects"]["bbox"]) for row in contents[0]) > 10
    assert (report.images_folder is None) == (storage_kind == "inline")
    assert not load(Path(annotations))["images"][0]["file_name"].startswith("/")


def test_tables_without_boxes_or_rows_are_whole_files(tmp_path: Path) -> None:
    _export(write_images(tmp_path / "images", [image(1, "a.png")], []), str(tmp_path / "i.json"))
    content = load(tmp_path / "i.json")
    assert (len(content["images"]), content["annotations"], content["categories"]) == (1, [], [])
    _export(write_detections(tmp_path / "found", [], SPARSE), str(tmp_path / "r.json"))
    assert load(tmp_path / "r.json") == []


def test_mistakes_get_one_line_and_leave_what_was_there(tmp_path: Path) -> None:
    box, out = [1.0, 1.0, 2.0, 2.0], tmp_path / "out" / "r.json"
    good = write_detections(tmp_path / "good", [detections(1, (box, 0.5, 0))], SPARSE)
    _export(good, str(out))
    before = out.read_bytes()
    many = [detections(number, (box, 0.5, 0)) for number in range(600)]
    bad = {
        "id 7": ([], [Category(7, "a"), Category(7, "b")]),
        "score .*not finite.* image 8": ([*many, detections(8, (box, math.nan, 0))], SPARSE),
        "box .*not finite.* image 8": ([detections(8, ([1.0, math.inf, 1.0, 1.0], 0.5, 0))], SPARSE),
        "category .* 2 categories": ([detections(8, (box, 0.5, 2))], SPARSE),
    }
    for number, (message, (rows, categories)) in enumerate(bad.items()):
        with pytest.raises(UserError, match=message) as caught:
            _export(write_detections(tmp_path / str(number), rows, categories), str(out))
        assert "\n" not in str(caught.value)
    cut = tmp_path / "cut" / "part-00000.parquet"
    shutil.copytree(tmp_path / "good", cut.parent)
    cut.write_bytes(cut.read_bytes()[:-200])
    for source, target, message in (
        (tmp_path / "nowhere", out, "nowhere"),
        (tmp_path / "good", tmp_path / "r.csv", r"\.json"),
        (cut.parent, out, "damaged|Parquet"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            _export(str(source), str(target))
        assert "\n" not in str(caught.value)
    images = write_images(tmp_path / "images", [image(1, "a.png")], SPARSE)
    with pytest.raises(UserError, match="--score-threshold"):
        _export(images, str(out), score_threshold=0.5)
    (tmp_path / "images" / MANIFEST_NAME).unlink()
    with pytest.raises(UserError, match="images"):
        _export(images, str(out))
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["r.json"]


def check_object_storage(folder: Path, bucket: str) -> None:
    box = [0.1, 0.2, 0.3, 0.4]
    local = write_detections(folder / "found", [detections(1, (box, 0.5, 0))], SPARSE)
    storage.publish_folder(local, f"{bucket}/found")
    _export(f"{bucket}/found", f"{bucket}/out/results.json")
    expected = [{"image_id": 1, "category_id": 7, "bbox": box, "score": 0.5}]
    assert json.loads(storage.read_bytes(f"{bucket}/out/results.json")) == expected
    bad = write_detections(folder / "bad", [detections(1, (box, 0.5, 5))], SPARSE)
    for name in ("results.json", "other.json"):
        with pytest.raises(UserError):
            _export(bad, f"{bucket}/out/{name}")
    assert storage.list_files(f"{bucket}/out") == ["results.json"]
    assert json.loads(storage.read_bytes(f"{bucket}/out/results.json")) == expected


@pytest.mark.usefixtures("quick_leases")
def test_object_storage_gets_the_file_when_it_is_whole(tmp_path: Path) -> None:
    check_object_storage(tmp_path, f"memory://{tmp_path.name}")


@pytest.mark.slow
def test_s3_gets_the_file_when_it_is_whole(tmp_path: Path, bucket: str) -> None:
    check_object_storage(tmp_path, bucket)
