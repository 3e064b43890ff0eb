"""Exports to Pascal VOC are readable by other programs, with the same boxes."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hotcoco import COCO

from raydet.common.errors import UserError
from raydet.config import ExportVocConfig
from raydet.exports.label_files import FolderExportReport
from raydet.exports.voc import export_voc
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter

CLASSES = [Category(7, "owl & <bird>"), Category(2, "cat")]


def write_images(folder: Path, paths: list[str]) -> str:
    objects = {
        "id": [1, 2],
        "bbox": [[4.0, 2.0, 10.0, 20.0], [0.25, 0.1 + 0.2, 4 / 3, 47.5]],
        "category": [1, 0],
        "area": [200.0, 5.0],
        "iscrowd": [False, True],
    }
    rows = [
        {"image_id": rank, "image": {"bytes": b"x", "path": path}, "width": 64, "height": 48, "objects": objects}
        for rank, path in enumerate(paths)
    ]
    with TableWriter(str(folder), build_schema("images", CLASSES), config_hash="x") as writer:
        writer.write_rows(rows)
    return str(folder)


def export(data: str, out: Path, **options: Any) -> FolderExportReport:
    return export_voc(ExportVocConfig(data=data, out=str(out), **options))


def test_files_hold_what_the_devkit_has(tmp_path: Path) -> None:
    report = export(write_images(tmp_path / "table", ["a & b.jpg", "sub/c.png"]), tmp_path / "out", split="test")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {
        "Annotations/a & b.xml",
        "Annotations/sub/c.xml",
        "ImageSets/Main/test.txt",
        "JPEGImages/a & b.jpg",
        "JPEGImages/sub/c.png",
        "classes.txt",
        "labelmap.txt",
    }
    assert (tmp_path / "out/ImageSets/Main/test.txt").read_text() == "a & b\nsub/c\n"
    assert (tmp_path / "out/classes.txt").read_text() == "owl & <bird>\ncat\n"
    root = ElementTree.parse(tmp_path / "out/Annotations/a & b.xml").getroot()
    assert [root.findtext(tag) for tag in ("filename", "size/width", "size/height")] == ["a & b.jpg", "64", "48"]
    first, second = root.findall("object")
    assert [side.text for side in first.find("bndbox") or ()] == ["5", "3", "14", "22"]
    assert [item.findtext("name") for item in (first, second)] == ["cat", "owl & <bird>"]
    assert [item.findtext("difficult") for item in (first, second)] == ["0", "1"]
    assert (report.num_images, report.num_boxes, report.num_copied) == (2, 4, 2)


@pytest.mark.parametrize(("zero_based", "corners"), [(False, ["5", "3"]), (True, ["4", "2"])])
def test_the_first_pixel(tmp_path: Path, zero_based: bool, corners: list[str]) -> None:
    export(write_images(tmp_path / "table", ["a.jpg"]), tmp_path / "out", zero_based=zero_based)
    root = ElementTree.parse(tmp_path / "out/Annotations/a.xml").getroot()
    box = root.find("object/bndbox")
    assert box is not None
    assert [box.findtext(side) for side in ("xmin", "ymin", "xmax", "ymax")] == [*corners, "14", "22"]


def test_another_reader_sees_the_same_boxes(tmp_path: Path) -> None:
    export(write_images(tmp_path / "table", ["a.jpg"]), tmp_path / "out")
    theirs = COCO.from_voc(str(tmp_path / "out")).dataset
    boxes = [annotation["bbox"] for annotation in theirs["annotations"]]
    assert boxes[0] == [4.0, 2.0, 10.0, 20.0]
    assert boxes[1] == pytest.approx([0.25, 0.1 + 0.2, 4 / 3, 47.5], abs=1e-12)
    assert [annotation["iscrowd"] for annotation in theirs["annotations"]] == [0, 1]


def test_detections_are_refused(tmp_path: Path) -> None:
    with TableWriter(str(tmp_path / "found"), build_schema("detections", CLASSES), config_hash="x"):
        pass
    with pytest.raises(UserError, match=r"detections table.*scores"):
        export(str(tmp_path / "found"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
