"""Exports to YOLO label files preserve all boxes exactly and are written atomically."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raydet.common.errors import UserError
from raydet.config import ExportYoloConfig
from raydet.exports.label_files import FileNames, FolderExportReport
from raydet.exports.yolo import export_yolo
from raydet.tables import storage
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter

Box = tuple[list[float], int, bool]
CLASSES = [Category(7, "white cell"), Category(2, "Zähler")]


def write_images(folder: Path, rows: list[dict[str, Any]], classes: list[Category] = CLASSES) -> str:
    with TableWriter(str(folder), build_schema("images", classes), config_hash="x") as writer:
        writer.write_rows(rows)
    return str(folder)


def image(image_id: int, path: str | None, *boxes: Box, data: bytes | None = None) -> dict[str, Any]:
    objects = {
        "id": list(range(1, len(boxes) + 1)),
        "bbox": [box for box, _, _ in boxes],
        "category": [category for _, category, _ in boxes],
        "area": [box[2] * box[3] for box, _, _ in boxes],
        "iscrowd": [is_crowd for _, _, is_crowd in boxes],
    }
    stored = {"bytes": data, "path": path}
    return {"image_id": image_id, "image": stored, "width": 64, "height": 48, "objects": objects}


def write_detections(folder: Path) -> str:
    found = {"bbox": [[16.0, 12.0, 32.0, 24.0], [0.0, 0.0, 8.0, 6.0]], "score": [0.75, 0.25], "category": [1, 0]}
    empty: dict[str, Any] = {"bbox": [], "score": [], "category": []}
    shared = {"width": 64, "height": 48}
    rows: list[dict[str, Any]] = [
        {"image_id": 1, "path": "/data/set/a.jpg", "detections": found, "error": None, **shared},
        {"image_id": 2, "path": "/data/set/sub/b.jpg", "detections": empty, "error": None, **shared},
        {"image_id": 3, "path": "/data/set/c.jpg", "detections": empty, "error": "x", "width": None, "height": None},
    ]
    with TableWriter(str(folder), build_schema("detections", CLASSES), config_hash="x") as writer:
        writer.write_rows(rows)
    return str(folder)


def export(data: str, out: Path, **options: Any) -> FolderExportReport:
    return export_yolo(ExportYoloConfig(data=data, out=str(out), **options))


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_images_labels_and_classes_lie_where_ultralytics_looks(tmp_path: Path) -> None:
    odd = [0.1 + 0.2, 1e-7, 1 / 3, 47.9]
    rows = [
        image(1, "images/a.jpg", ([16.0, 12.0, 32.0, 24.0], 1, False), (odd, 0, False), data=b"one"),
        image(2, "sub/b.PNG", ([1.0, 2.0, 3.0, 4.0], 0, True), data=b"two"),
        image(3, "A.png", data=b"three"),
    ]
    report = export(write_images(tmp_path / "table", rows), tmp_path / "out", split="val")
    assert files_below(tmp_path / "out") == {
        "data.yaml",
        *(f"images/val/{name}" for name in ("a.jpg", "sub/b.PNG", "A-3.png")),
        *(f"labels/val/{name}.txt" for name in ("a", "sub/b", "A-3")),
    }
    assert (tmp_path / "out/images/val/sub/b.PNG").read_bytes() == b"two"
    lines = (tmp_path / "out/labels/val/a.txt").read_text().splitlines()
    assert lines[0] == "1 0.5 0.5 0.5 0.5"
    cx, cy, width, height = np.array(lines[1].split()[1:], float) * [64, 48, 64, 48]
    np.testing.assert_allclose([cx - width / 2, cy - height / 2, width, height], odd, rtol=0, atol=1e-12)
    assert (tmp_path / "out/labels/val/sub/b.txt").read_text() == ""
    content = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert content == {"train": "images/val", "val": "images/val", "names": {0: "white cell", 1: "Zähler"}}
    assert (report.num_images, report.num_boxes, report.num_copied, report.num_renamed) == (3, 2, 3, 1)
    assert any("crowd boxes" in line and line.endswith(": 1") for line in report.lines())


def test_detections_have_their_score_and_unreadable_images_no_file(tmp_path: Path) -> None:
    data = write_detections(tmp_path / "found")
    report = export(data, tmp_path / "out", score_threshold=0.25)
    assert (tmp_path / "out/labels/train/a.txt").read_text() == "1 0.5 0.5 0.5 0.5 0.75\n"
    assert files_below(tmp_path / "out") == {"data.yaml", "labels/train/a.txt", "labels/train/sub/b.txt"}
    assert sorted(count for count in report.notes.values() if count) == [1, 1]
    with pytest.raises(UserError, match="--copy-images"):
        export(data, tmp_path / "other", copy_images=True)


def test_pictures_are_copied_as_asked(tmp_path: Path) -> None:
    (tmp_path / "real.jpg").write_bytes(b"far")
    inline, referred = image(1, "a.jpg", data=b"near"), image(2, str(tmp_path / "real.jpg"))
    data = write_images(tmp_path / "table", [inline, referred])
    for copy_images, num_copied in ((None, 1), (True, 2), (False, 0)):
        out = tmp_path / str(copy_images)
        assert export(data, out, copy_images=copy_images).num_copied == num_copied
        assert len(list((out / "images/train").rglob("*.jpg"))) == num_copied
    assert b"far" in [path.read_bytes() for path in (tmp_path / "True").rglob("*.jpg")]


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path) -> None:
    nowhere = write_images(tmp_path / "nowhere", [image(1, "a.jpg", data=b"x"), image(2, str(tmp_path / "none.jpg"))])
    not_finite = write_images(tmp_path / "nan", [image(1, "a.jpg", ([1.0, float("nan"), 2.0, 3.0], 0, False))])
    unknown = write_images(tmp_path / "unknown", [image(1, "a.jpg", ([1.0, 1.0, 2.0, 3.0], 2, False))])
    line_break = write_images(tmp_path / "line", [image(1, "a.jpg")], [Category(1, "a\nb")])
    for data, words in (
        (nowhere, r"none\.jpg: "),
        (not_finite, "not finite"),
        (unknown, "category .* 2 categories"),
        (line_break, r"'a\\nb'"),
    ):
        before = set(tmp_path.iterdir())
        with pytest.raises(UserError, match=words):
            export(data, tmp_path / "out", copy_images=True)
        assert set(tmp_path.iterdir()) == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    data = write_images(tmp_path / "table", [image(1, "a.jpg")])
    (tmp_path / "out").mkdir()
    export(data, tmp_path / "out")
    with pytest.raises(UserError, match="already contains files"):
        export(data, tmp_path / "out")
    with pytest.raises(UserError, match="is a file"):
        export(data, tmp_path / "out" / "data.yaml")
    with pytest.raises(UserError, match="--score-threshold"):
        export(data, tmp_path / "other", score_threshold=0.5)


def test_names_are_told_apart_and_stay_in_the_folder() -> None:
    names = FileNames("/data/")
    given = ["/data/a.jpg", "a.png", "../../etc/a", "s3://bucket/x/a.jpg", None, "C:\\b.gif", "A-2.tif", "c\n.jpg"]
    taken = [names.take(path, number) for number, path in enumerate(given, 1)]
    assert taken[:5] == ["a.jpg", "a-2.png", "etc/a.jpg", "bucket/x/a.jpg", "5.jpg"]
    assert taken[6] == "A-2-7.tif" and taken[7] == "c_.jpg"
    stems = [name.rpartition(".")[0].lower() for name in taken]
    assert len(set(stems)) == len(stems) and names.num_renamed == 2


@pytest.mark.usefixtures("quick_leases")
def test_a_store_gets_the_whole_folder(tmp_path: Path) -> None:
    data = write_images(tmp_path / "table", [image(1, "a.jpg", data=b"one")])
    out = f"memory://bucket/{tmp_path.name}"
    export_yolo(ExportYoloConfig(data=data, out=out))
    assert storage.list_files(out, recursive=True) == ["data.yaml", "images/train/a.jpg", "labels/train/a.txt"]
    with pytest.raises(UserError, match="already contains files"):
        export_yolo(ExportYoloConfig(data=data, out=out))
