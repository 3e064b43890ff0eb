"""Round trips through COCO, VOC and YOLO preserve a table, and damaged input never loses count of an image."""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raydet.common.errors import UserError
from raydet.config import (
    ExportCocoConfig,
    ExportVocConfig,
    ExportYoloConfig,
    PrepareCocoConfig,
    PrepareVocConfig,
    PrepareYoloConfig,
)
from raydet.exports.coco import export_coco
from raydet.exports.voc import export_voc
from raydet.exports.yolo import export_yolo
from raydet.preparation.prepare import prepare_coco, prepare_voc, prepare_yolo
from raydet.preparation.report import PrepareReport
from raydet.tables.table import Table, open_table


@pytest.fixture(scope="module")
def bccd(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("bccd")
    annotations, images = test_data / "bccd" / "instances_val.json", test_data / "bccd" / "images"
    prepare_coco(PrepareCocoConfig(annotations=str(annotations), images=str(images), out=str(folder / "table")))
    return open_table(str(folder / "table"), "images")


def by_name(table: Table) -> dict[str, dict[str, Any]]:
    """Return size and boxes of each image by file name; boxes as (class name, crowd, x, y, w, h)."""
    names = [category.name for category in table.categories]
    rows = {}
    for row in table.read(["image", "width", "height", "objects"]).to_pylist():
        objects = row["objects"]
        columns = zip(objects["category"], objects["iscrowd"], objects["bbox"], strict=True)
        boxes = [(names[category], is_crowd, *box) for category, is_crowd, box in columns]
        size = (row["width"], row["height"])
        rows[Path(row["image"]["path"]).stem] = {"size": size, "bytes": row["image"]["bytes"], "boxes": boxes}
    return rows


def assert_same(first: Table, second: Table) -> None:
    ours, theirs = by_name(first), by_name(second)
    assert ours.keys() == theirs.keys() and len(ours) == first.num_rows
    for name, row in ours.items():
        assert {key: row[key] for key in ("size", "bytes")} == {key: theirs[name][key] for key in ("size", "bytes")}
        assert [box[:2] for box in row["boxes"]] == [box[:2] for box in theirs[name]["boxes"]]
        mine, other = ([box[2:] for box in boxes] for boxes in (row["boxes"], theirs[name]["boxes"]))
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-6)


def test_real_labels_through_voc(bccd: Table, tmp_path: Path) -> None:
    out = tmp_path / "voc"
    export_voc(ExportVocConfig(data=bccd.uri, out=str(out)))
    report = prepare_voc(
        PrepareVocConfig(
            annotations=str(out / "Annotations"),
            images=str(out / "JPEGImages"),
            split=str(out / "ImageSets/Main/train.txt"),
            classes=[str(out / "classes.txt")],
            out=str(tmp_path / "table"),
        )
    )
    again = open_table(str(tmp_path / "table"), "images")
    assert_same(bccd, again)
    assert [item.name for item in again.categories] == [item.name for item in bccd.categories]
    assert report.rejected == report.clipped == report.dropped == sum(report.findings.values()) == 0


def test_real_labels_through_yolo(bccd: Table, tmp_path: Path) -> None:
    export_yolo(ExportYoloConfig(data=bccd.uri, out=str(tmp_path / "yolo"), split="val"))
    data_yaml = str(tmp_path / "yolo" / "data.yaml")
    report = prepare_yolo(PrepareYoloConfig(data=data_yaml, split="val", out=str(tmp_path / "table")))
    again = open_table(str(tmp_path / "table"), "images")
    assert_same(bccd, again)
    assert [item.name for item in again.categories] == [item.name for item in bccd.categories]
    assert report.rejected == report.clipped == report.dropped == sum(report.findings.values()) == 0


def test_real_labels_through_coco(bccd: Table, test_data: Path, tmp_path: Path) -> None:
    annotations, images = str(tmp_path / "instances.json"), str(test_data / "bccd" / "images")
    export_coco(ExportCocoConfig(data=bccd.uri, out=annotations))
    prepare_coco(PrepareCocoConfig(annotations=annotations, images=images, out=str(tmp_path / "table")))
    again = open_table(str(tmp_path / "table"), "images")
    assert_same(bccd, again)
    assert again.categories == bccd.categories


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9)).save(buffer, format="PNG")
    return buffer.getvalue()


PICTURES = st.sampled_from([_picture(), _picture(), _picture()[:30], b"", b"no picture"])
NUMBERS = st.one_of(st.floats(-1, 14, width=16), st.sampled_from(["nan", "inf", "", "x", "1e400"]))
STEMS = st.sampled_from(["a", "b", "sub/c", "d e"])
IMAGES = st.dictionaries(STEMS.flatmap(lambda stem: st.sampled_from([f"{stem}.png", f"{stem}.JPG"])), PICTURES)
VOC_OBJECTS = st.lists(st.tuples(st.sampled_from(["dog", "cat", ""]), *[NUMBERS] * 4), max_size=3)
VOC_FILES = st.dictionaries(
    STEMS, st.one_of(VOC_OBJECTS, st.sampled_from(["<annotation>", "<a/>", "<!DOCTYPE a><a/>"]))
)
YOLO_FILES = st.dictionaries(STEMS, st.lists(st.lists(NUMBERS, max_size=8), max_size=3))


def _write(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def _voc_text(content: Any) -> bytes:
    if isinstance(content, str):
        return content.encode()
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = (
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, corners, strict=True))
        + "</bndbox></object>"
        for name, *corners in content
    )
    return f"<annotation>{''.join(objects)}</annotation>".encode()


def _assert_accounted(report: PrepareReport, out: str, num_found: int) -> None:
    table, rejected = open_table(out, "images"), open_table(f"{out}/__rejected", "rejected")
    assert report.accepted + report.rejected == report.found == num_found
    assert (table.num_rows, rejected.num_rows) == (report.accepted, report.rejected)
    rows = table.read().to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    ids = [id_ for row in rows for id_ in row["objects"]["id"]]
    assert len(set(ids)) == len(ids) == report.boxes
    for row in rows:
        for left, top, width, height in row["objects"]["bbox"]:
            assert 0 <= left < left + width <= row["width"] + 1e-9 and 0 <= top < top + height <= row["height"] + 1e-9


@settings(max_examples=40, deadline=None)
@given(images=IMAGES, labels=VOC_FILES)
def test_voc_with_defects_loses_nothing(images: dict[str, bytes], labels: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = PrepareVocConfig(
            images=_write(Path(folder, "img"), images),
            annotations=_write(Path(folder, "xml"), {f"{stem}.xml": _voc_text(item) for stem, item in labels.items()}),
            classes=["dog"],
            out=f"{folder}/table",
            num_threads=1,
        )
        try:
            report = prepare_voc(config)
        except UserError:  # no image is usable, and nothing is written
            assert not Path(config.out).exists()
            return
        lonely = {stem for stem in labels if not any(name.rpartition(".")[0] == stem for name in images)}
        _assert_accounted(report, config.out, len(images) + len(lonely))


@settings(max_examples=40, deadline=None)
@given(images=IMAGES, labels=YOLO_FILES)
def test_yolo_with_defects_loses_nothing(images: dict[str, bytes], labels: dict[str, list[list[object]]]) -> None:
    texts = {
        f"{stem}.txt": "\n".join(" ".join(map(str, [0, *line])) for line in lines).encode()
        for stem, lines in labels.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        config = PrepareYoloConfig(
            images=_write(Path(folder, "img"), images),
            labels=_write(Path(folder, "txt"), texts),
            classes=["dog"],
            out=f"{folder}/table",
            num_threads=1,
        )
        try:
            report = prepare_yolo(config)
        except UserError:
            assert not Path(config.out).exists()
            return
        _assert_accounted(report, config.out, len(images))
