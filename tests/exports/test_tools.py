"""Exports to annotation tools are what the tools import, and come back as the same table."""

import json
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.common.errors import UserError
from raydet.config import (
    ExportCvatConfig,
    ExportLabelStudioConfig,
    PrepareCocoConfig,
    PrepareCvatConfig,
    PrepareLabelStudioConfig,
)
from raydet.exports.cvat import export_cvat
from raydet.exports.label_studio import export_label_studio
from raydet.images.files import ImageFolder
from raydet.preparation.prepare import prepare_coco, prepare_cvat, prepare_label_studio
from raydet.preparation.sources.source import Source
from raydet.preparation.sources.tools.cvat import read_cvat
from raydet.preparation.sources.tools.label_studio import read_label_studio
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import Table, TableWriter, open_table
from tests.small_sets import files_below, rows_of

CLASSES = [Category(7, 'owl & "<bird>'), Category(2, "Zähler")]


def write_table(folder: Path, rows: list[dict[str, Any]]) -> str:
    kind: Any = "images" if "image" in rows[0] else "detections"
    with TableWriter(str(folder), build_schema(kind, CLASSES), config_hash="x") as writer:
        writer.write_rows(rows)
    return str(folder)


def image(image_id: int, path: str, ids: list[int], boxes: list[list[float]], crowds: list[bool]) -> dict[str, Any]:
    objects = {
        "id": ids,
        "bbox": boxes,
        "category": [id_ % 2 for id_ in ids],
        "area": [box[2] * box[3] for box in boxes],
        "iscrowd": crowds,
    }
    return {"image_id": image_id, "image": {"bytes": b"x", "path": path}, "width": 64, "height": 48, "objects": objects}


def detections(folder: Path) -> str:
    found = {"bbox": [[16.0, 12.0, 32.0, 24.0], [0.0, 0.0, 8.0, 6.0]], "score": [0.75, 0.25], "category": [1, 0]}
    empty: dict[str, Any] = {"bbox": [], "score": [], "category": []}
    size = {"width": 64, "height": 48}
    rows: list[dict[str, Any]] = [
        {"image_id": 4, "path": "/set/a b.jpg", "detections": found, "error": None, **size},
        {"image_id": 2, "path": "/set/sub/b.jpg", "detections": empty, "error": None, **size},
        {"image_id": 3, "path": "/set/c.jpg", "detections": empty, "error": "x", "width": None, "height": None},
    ]
    return write_table(folder, rows)


def test_cvat_gets_boxes_and_labels(tmp_path: Path) -> None:
    data = write_table(
        tmp_path / "table", [image(9, "a & b.jpg", [5, 8], [[4, 2, 10, 20], [0.25, 0.3, 1, 2]], [False, True])]
    )
    report = export_cvat(ExportCvatConfig(data=data, out=str(tmp_path / "out")))
    assert (report.num_images, report.num_boxes, report.num_copied) == (1, 2, 1)
    assert files_below(tmp_path / "out") == ["annotations.xml", "images/a & b.jpg", "labels.json"]
    labels = json.loads((tmp_path / "out/labels.json").read_text())
    assert [label["name"] for label in labels] == [category.name for category in CLASSES]
    root = ElementTree.parse(tmp_path / "out/annotations.xml").getroot()
    assert [item.text for item in root.findall("meta/task/labels/label/name")] == [item.name for item in CLASSES]
    (item,) = root.findall("image")
    assert item.attrib == {"id": "9", "name": "a & b.jpg", "width": "64", "height": "48"}
    first, second = item.findall("box")
    assert [first.get(key) for key in ("label", "source", "xtl", "ytl", "xbr", "ybr")] == [
        "Zähler",
        "manual",
        "4",
        "2",
        "14",
        "22",
    ]
    assert [box.findtext("attribute[@name='is_crowd']") for box in (first, second)] == ["false", "true"]


def test_detections_become_boxes_to_correct(tmp_path: Path) -> None:
    data = detections(tmp_path / "found")
    report = export_cvat(ExportCvatConfig(data=data, out=str(tmp_path / "cvat"), score_threshold=0.25))
    assert report.num_boxes == 1 and sorted(report.notes.values()) == [1, 1]
    root = ElementTree.parse(tmp_path / "cvat/annotations.xml").getroot()
    assert [(item.get("id"), item.get("name")) for item in root.findall("image")] == [
        ("4", "a b.jpg"),
        ("2", "sub/b.jpg"),
    ]
    (box,) = root.findall("image/box")
    assert (box.get("source"), box.findtext("attribute[@name='score']")) == ("auto", "0.75")

    export_label_studio(ExportLabelStudioConfig(data=data, out=str(tmp_path / "ls"), image_prefix="s3://bucket/set/"))
    first, second = json.loads((tmp_path / "ls/tasks.json").read_text())
    assert first["data"] == {"image": "s3://bucket/set/a b.jpg", "image_id": 4} and "annotations" not in first
    (prediction,) = first["predictions"]
    assert (prediction["score"], prediction["model_version"]) == (0.5, "raydet")
    assert [item["score"] for item in prediction["result"]] == [0.75, 0.25]
    assert prediction["result"][0]["value"] == {
        "rotation": 0,
        "x": 25,
        "y": 25,
        "width": 50,
        "height": 50,
        "rectanglelabels": ["Zähler"],
    }
    assert second["predictions"] == [{"model_version": "raydet", "result": []}]


def test_label_studio_gets_annotations_and_an_interface(tmp_path: Path) -> None:
    data = write_table(tmp_path / "table", [image(9, "a b.jpg", [5, 8], [[4, 2, 10, 20], [0, 0, 1, 2]], [False, True])])
    export_label_studio(ExportLabelStudioConfig(data=data, out=str(tmp_path / "out")))
    assert files_below(tmp_path / "out") == ["classes.txt", "images/a b.jpg", "label_config.xml", "tasks.json"]
    root = ElementTree.parse(tmp_path / "out/label_config.xml").getroot()
    controls = {item.get("name"): item.get("toName") for item in root if item.get("toName")}
    assert [item.get("value") for item in root.iter("Label")] == [category.name for category in CLASSES]
    (task,) = json.loads((tmp_path / "out/tasks.json").read_text())
    assert task["id"] == 9 and task["data"]["image"] == "/data/local-files/?d=images/a%20b.jpg"
    results = task["annotations"][0]["result"]
    assert all(controls[item["from_name"]] == item["to_name"] == "image" for item in results)
    assert [(item["id"], item["type"]) for item in results] == [
        ("5", "rectanglelabels"),
        ("8", "rectanglelabels"),
        ("8", "choices"),
    ]


def test_an_images_table_has_no_scores(tmp_path: Path) -> None:
    data = write_table(tmp_path / "table", [image(9, "a.jpg", [], [], [])])
    with pytest.raises(UserError, match="no scores"):
        export_cvat(ExportCvatConfig(data=data, out=str(tmp_path / "out"), score_threshold=0.5))
    assert not (tmp_path / "out").exists()


def through_cvat(data: str, folder: Path) -> Source:
    export_cvat(ExportCvatConfig(data=data, out=f"{folder}/cvat"))
    places = {"annotations": f"{folder}/cvat/annotations.xml", "images": f"{folder}/cvat/images", "out": "unused"}
    config = PrepareCvatConfig(**places)  # type: ignore[arg-type]
    return read_cvat(config, ImageFolder(config.images))


def through_label_studio(data: str, folder: Path) -> Source:
    export_label_studio(ExportLabelStudioConfig(data=data, out=f"{folder}/ls"))
    places = {"annotations": f"{folder}/ls/tasks.json", "images": f"{folder}/ls/images", "out": "unused"}
    config = PrepareLabelStudioConfig(**places, classes=[f"{folder}/ls/classes.txt"])  # type: ignore[arg-type]
    return read_label_studio(config, ImageFolder(config.images))


SIDES = st.tuples(st.floats(0, 60), st.floats(0, 40), st.floats(1e-3, 4), st.floats(1e-3, 8)).map(list)
IMAGES = st.lists(st.lists(st.tuples(SIDES, st.booleans()), max_size=4), min_size=1, max_size=4)
ORDERS = st.permutations(range(1, 17))


@settings(max_examples=25, deadline=None)
@given(images=IMAGES, ids=ORDERS)
def test_generated_tables_come_back(images: list[list[tuple[list[float], bool]]], ids: list[int]) -> None:
    numbers = iter(ids)
    rows = [
        image(
            40 - rank,
            f"sub {rank}/ü&'{rank}.jpg",
            [next(numbers) for _ in boxes],
            [box for box, _ in boxes],
            [is_crowd for _, is_crowd in boxes],
        )
        for rank, boxes in enumerate(images)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_table(folder / "table", rows)
        for through, keeps_box_ids in ((through_cvat, False), (through_label_studio, True)):
            source = through(data, folder)
            assert [category.name for category in source.categories] == [category.name for category in CLASSES]
            assert not source.findings
            for row, record in zip(rows, source.images, strict=True):
                objects = record.objects
                assert objects is not None and record.refusal is None
                assert (record.image_id, record.size_hw or (48, 64)) == (row["image_id"], (48, 64))
                assert objects.categories == row["objects"]["category"]
                assert objects.iscrowd == row["objects"]["iscrowd"]
                assert objects.ids == row["objects"]["id"] or not keeps_box_ids
                np.testing.assert_allclose(
                    np.reshape(objects.boxes_xywh, (-1, 4)), np.reshape(row["objects"]["bbox"], (-1, 4)), atol=1e-6
                )


@pytest.fixture(scope="module", params=["bccd", "coco_mini"])
def real(request: pytest.FixtureRequest, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = test_data / request.param
    images = folder / ("images" if request.param == "bccd" else "val")
    out = str(tmp_path_factory.mktemp(request.param) / "table")
    prepare_coco(PrepareCocoConfig(annotations=str(folder / "instances_val.json"), images=str(images), out=out))
    return open_table(out, "images")


def assert_same(first: Table, second: Table, *, has_box_ids: bool) -> None:
    ours, theirs = rows_of(first.uri), rows_of(second.uri)
    assert [category.name for category in first.categories] == [category.name for category in second.categories]
    assert len(ours) == len(theirs) == first.num_rows
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("image_id", "image", "width", "height"):
            assert mine[key] == other[key]
        for key in ("category", "iscrowd", *(["id"] if has_box_ids else [])):
            assert mine["objects"][key] == other["objects"][key]
        boxes, others = (np.reshape(row["objects"]["bbox"], (-1, 4)) for row in (mine, other))
        np.testing.assert_allclose(boxes, others, rtol=0, atol=1e-6)


def test_real_labels_through_cvat(real: Table, tmp_path: Path) -> None:
    out = str(tmp_path / "cvat")
    export_cvat(ExportCvatConfig(data=real.uri, out=out))
    config = PrepareCvatConfig(
        annotations=f"{out}/annotations.xml", images=f"{out}/images", out=str(tmp_path / "table")
    )
    report = prepare_cvat(config)
    assert report.rejected == report.clipped == report.dropped == 0
    assert_same(real, open_table(str(tmp_path / "table"), "images"), has_box_ids=False)


def test_real_labels_through_label_studio(real: Table, tmp_path: Path) -> None:
    out = str(tmp_path / "ls")
    export_label_studio(ExportLabelStudioConfig(data=real.uri, out=out))
    config = PrepareLabelStudioConfig(
        annotations=f"{out}/tasks.json",
        images=f"{out}/images",
        classes=[f"{out}/classes.txt"],
        out=str(tmp_path / "table"),
    )
    report = prepare_label_studio(config)
    assert report.rejected == report.clipped == report.dropped == 0
    assert_same(real, open_table(str(tmp_path / "table"), "images"), has_box_ids=True)
