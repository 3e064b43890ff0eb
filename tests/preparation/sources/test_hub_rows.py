"""Hugging Face data sets → records and images tables, created with `datasets` from real images."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raydet
from raydet import PrepareCocoConfig, PrepareHubConfig, UserError
from raydet.cli.main import main
from raydet.images.decode import decode
from raydet.images.files import MissingFileError, ReadError
from raydet.preparation.sources.hub import HubImages, is_on_hub, load_hub
from raydet.preparation.sources.hub_objects import parse_objects
from raydet.preparation.sources.hub_rows import read_hub
from raydet.tables.schema import with_token
from raydet.tables.table import open_table

datasets = pytest.importorskip("datasets")
NAMES = ["Platelets", "RBC", "WBC"]


@pytest.fixture(scope="module")
def bccd(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a folder with `images` and `instances.json` of the first twelve images of BCCD's val, and their `table`."""
    folder = tmp_path_factory.mktemp("bccd")
    content = json.loads((test_data / "bccd" / "instances_val.json").read_text())
    content["images"] = content["images"][:12]
    kept = {entry["id"] for entry in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    (folder / "images").mkdir()
    for entry in content["images"]:
        shutil.copy(test_data / "bccd" / "images" / entry["file_name"], folder / "images")
    (folder / "instances.json").write_text(json.dumps(content))
    raydet.prepare_coco(
        PrepareCocoConfig(
            annotations=str(folder / "instances.json"), images=str(folder / "images"), out=str(folder / "table")
        )
    )
    return folder


def config_of(dataset: Path | str, **options: Any) -> PrepareHubConfig:
    return PrepareHubConfig(dataset=str(dataset), out="unused", **options)


def test_a_text_file_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "metadata.jsonl").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(UserError, match=r"metadata\.jsonl' is larger than 512 MiB"):
        load_hub(config_of(tmp_path))


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [("owner/name", True), ("name", True), ("hf://datasets/owner/name", True)]
    + [(place, False) for place in ("/data/set", "./set", "~/set", "data/sets/mine", "parts/*.parquet")],
)
def test_names_on_the_hub_differ_from_paths(dataset: str, expected: bool) -> None:
    assert is_on_hub(dataset) == expected


def test_a_pipe_among_the_images_does_not_stop_the_others(bccd: Path, tmp_path: Path) -> None:
    shutil.copytree(bccd / "images", tmp_path / "set")
    os.mkfifo(tmp_path / "set" / "pipe.jpg")
    prepared = raydet.prepare_hub(PrepareHubConfig(dataset=str(tmp_path / "set"), out=str(tmp_path / "out")))
    assert (prepared.found, prepared.accepted) == (12, 12)  # `datasets` lists regular files only


def test_an_empty_parquet_file_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="cannot load the data set"):
        load_hub(config_of(tmp_path / "rows.parquet"))
    assert capfd.readouterr().err == ""


def cppe_rows(bccd: Path) -> list[dict[str, Any]]:
    """Return the rows in CPPE-5's layout, without `iscrowd`, with the path of each image."""
    content = json.loads((bccd / "instances.json").read_text())
    index_of = {entry["id"]: NAMES.index(entry["name"]) for entry in content["categories"]}
    rows = []
    for image in content["images"]:
        found = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        objects = {
            "id": [entry["id"] for entry in found],
            "area": [entry["area"] for entry in found],
            "bbox": [entry["bbox"] for entry in found],
            "category": [index_of[entry["category_id"]] for entry in found],
        }
        size = {"width": image["width"], "height": image["height"]}
        rows.append(
            {"image_id": image["id"], "image": str(bccd / "images" / image["file_name"]), **size} | {"objects": objects}
        )
    return rows


def cppe_features() -> Any:
    listed = datasets.List
    return datasets.Features(
        {
            "image_id": datasets.Value("int64"),
            "image": datasets.Image(),
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "objects": {
                "id": listed(datasets.Value("int64")),
                "area": listed(datasets.Value("float64")),
                "bbox": listed(listed(datasets.Value("float64"), length=4)),
                "category": listed(datasets.ClassLabel(names=NAMES)),
            },
        }
    )


def cppe(bccd: Path) -> Any:
    return datasets.Dataset.from_list(cppe_rows(bccd), features=cppe_features())


def rows_of(out: Path | str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = open_table(str(out), "images").read().to_pylist()
    return rows


def prepare(out: Path, dataset: Path | str, **options: Any) -> Any:
    return raydet.prepare_hub(PrepareHubConfig(dataset=str(dataset), out=str(out), **options))


def without_extras(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    columns = ("image_id", "image", "width", "height", "objects", *names)
    return [{name: row[name] for name in columns} for row in rows]


def opened(features: dict[str, Any], rows: list[dict[str, Any]], folder: str | None = None) -> HubImages:
    return HubImages(
        datasets.Dataset.from_list(rows, features=datasets.Features(features)).with_format("arrow"), folder
    )


OBJECTS = {
    "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
    "category": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
}
IMAGE = {"bytes": b"x", "path": "a.jpg"}


@pytest.mark.parametrize(
    "layout",
    [
        "parquet folder",
        "saved",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("parquet file", "parquet pattern", "saved splits")),
    ],
)
def test_embedded_images_in_the_layout_of_cppe5_give_the_table_that_coco_gives(
    bccd: Path, tmp_path: Path, layout: str
) -> None:
    source = tmp_path / "set"
    if layout.startswith("saved"):
        saved = cppe(bccd) if layout == "saved" else datasets.DatasetDict({"train": cppe(bccd)})
        saved.save_to_disk(str(source))
    else:
        (source / "data").mkdir(parents=True)
        cppe(bccd).to_parquet(str(source / "data" / "train-00000-of-00001.parquet"))
    names = {"parquet file": "data/train-00000-of-00001.parquet", "parquet pattern": "data/*.parquet"}
    report = prepare(tmp_path / "out", source / names.get(layout, ""), allow_root=[str(bccd)])
    expected = rows_of(bccd / "table")
    assert without_extras(rows_of(report.out)) == without_extras(expected)
    assert (report.found, report.accepted, report.rejected) == (12, 12, 0)
    assert report.boxes == sum(len(row["objects"]["id"]) for row in expected)
    assert [category.name for category in open_table(report.out, "images").categories] == NAMES


@pytest.mark.parametrize("metadata", ["jsonl", "csv"])
def test_an_imagefolder_with_metadata_gives_the_table_that_coco_gives(
    bccd: Path, tmp_path: Path, metadata: str
) -> None:
    folder = tmp_path / "set" / "train"
    shutil.copytree(bccd / "images", folder)
    lines = []
    for row in cppe_rows(bccd):
        name = Path(row["image"]).name
        objects = {**row["objects"], "categories": [NAMES[index] for index in row["objects"]["category"]]}
        del objects["category"]
        lines.append({"file_name": name, "image_id": row["image_id"], "objects": objects, "stain": "Wright"})
    if metadata == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
        quoted = [json.dumps(line["objects"]).replace('"', '""') for line in lines]
        rows = [
            f'{line["file_name"]},{line["image_id"]},"{text}",Wright' for line, text in zip(lines, quoted, strict=True)
        ]
        (folder / "metadata.csv").write_text("\n".join(["file_name,image_id,objects,stain", *rows]))
    report = prepare(tmp_path / "out", tmp_path / "set")
    found, expected = rows_of(report.out), without_extras(rows_of(bccd / "table"))
    order = [row["image_id"] for row in expected]
    found.sort(key=lambda row: order.index(row["image_id"]))
    for row in expected:
        row["image"]["path"] = f"train/{row['image']['path']}"
    assert without_extras(found) == expected
    assert {row["stain"] for row in found} == {"Wright"}


def test_our_own_table_comes_back_equal(bccd: Path, tmp_path: Path) -> None:
    report = prepare(tmp_path / "out", bccd / "table")
    again, first = open_table(report.out, "images"), open_table(str(bccd / "table"), "images")
    assert again.read().equals(first.read())
    # Each table names the run that wrote it.
    assert with_token(again.schema, "").equals(with_token(first.schema, ""), check_metadata=True)
    assert again.categories == first.categories


def test_a_table_that_is_labelled_in_part_comes_back_equal(bccd: Path, tmp_path: Path) -> None:
    first = prepare(tmp_path / "first", bccd / "table", labelled=["RBC", "WBC"])
    again = prepare(tmp_path / "again", first.out)
    assert open_table(again.out, "images").read().equals(open_table(first.out, "images").read())
    two = prepare(tmp_path / "two", first.out, classes=["WBC", "RBC"])
    assert set(map(tuple, open_table(two.out, "images").read()["labelled_categories"].to_pylist())) == {(0, 1)}


def test_datasets_reads_what_was_made_of_its_rows(bccd: Path, tmp_path: Path) -> None:
    cppe(bccd).save_to_disk(str(tmp_path / "set"))
    report = prepare(tmp_path / "out", tmp_path / "set")
    rows = datasets.load_dataset("parquet", data_files=f"{report.out}/*.parquet", split="train")
    assert rows.features["objects"]["category"].feature.names == NAMES
    assert np.array_equal(np.asarray(rows[3]["image"]), np.asarray(cppe(bccd)[3]["image"]))


def test_images_without_labels_and_references(bccd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for number, path in enumerate(sorted((bccd / "images").iterdir())[:4]):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "ab"[number % 2])
    report = prepare(tmp_path / "out", folder, image_storage="reference")
    rows = rows_of(report.out)
    assert sorted(row["image"]["path"] for row in rows) == sorted(str(path) for path in folder.glob("*/*.jpg"))
    assert all(row["image"]["bytes"] is None and not row["objects"]["id"] for row in rows)
    assert report.boxes_by_class == {}
    assert {row["source_id"] for row in rows} == {str(path.relative_to(folder)) for path in folder.glob("*/*.jpg")}
    data = next((bccd / "images").iterdir()).read_bytes()
    embedded = datasets.Dataset.from_list([{"image": {"bytes": data, "path": None}}])
    embedded.to_parquet(str(tmp_path / "embedded.parquet"))
    with pytest.raises(UserError, match="there is no file to refer to"):
        prepare(tmp_path / "none", tmp_path / "embedded.parquet", image_storage="reference")


def test_sizes_that_are_wrong_are_corrected_and_counted(bccd: Path, tmp_path: Path) -> None:
    wrong = [row | {"height": 500, "width": 500} for row in cppe_rows(bccd)]
    datasets.Dataset.from_list(wrong, features=cppe_features()).save_to_disk(str(tmp_path / "set"))
    report = prepare(tmp_path / "out", tmp_path / "set")
    assert report.size_mismatches == 12
    assert {(row["width"], row["height"]) for row in rows_of(report.out)} == {(640, 480)}


def test_awkward_rows_are_rejected_or_counted_and_none_is_lost(bccd: Path, tmp_path: Path) -> None:
    data = next((bccd / "images").iterdir()).read_bytes()
    box = [10.0, 10.0, 20.0, 20.0]
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": data, "path": "ok.jpg"}, "objects": {"bbox": [box], "category": [0]}},
        {"image": {"bytes": None, "path": None}, "objects": {"bbox": [box], "category": [0]}},
        {"image": None, "objects": None},
        {"image": {"bytes": b"<html>", "path": "page.jpg"}, "objects": {"bbox": [], "category": []}},
        {"image": {"bytes": data[:5000], "path": "cut.jpg"}, "objects": {"bbox": [box], "category": [1]}},
        {"image": {"bytes": None, "path": "gone.jpg"}, "objects": {"bbox": [box], "category": [1]}},
        {
            "image": {"bytes": data, "path": "nan.jpg"},
            "objects": {"bbox": [[1.0, None, 5.0, 5.0], box], "category": [0, 1]},
        },
        {"image": {"bytes": data, "path": "range.jpg"}, "objects": {"bbox": [box, box], "category": [7, 1]}},
        {"image": {"bytes": data, "path": "three.jpg"}, "objects": {"bbox": [[1.0, 2.0, 3.0]], "category": [0]}},
        {"image": {"bytes": data, "path": "lengths.jpg"}, "objects": {"bbox": [box, box], "category": [0]}},
        {"image": {"bytes": data, "path": "null.jpg"}, "objects": None},
    ]
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("objects", pa.struct([("bbox", pa.list_(pa.list_(pa.float64()))), ("category", pa.list_(pa.int64()))])),
        ]
    )
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "set" / "train.parquet")
    report = prepare(tmp_path / "out", tmp_path / "set", classes=["cat", "dog"])
    assert (report.found, report.accepted, report.rejected) == (11, 5, 6)
    assert report.reasons == {
        "the row has neither the bytes of an image nor a path": 2,
        "not an image Pillow can read (it is text)": 1,
        "truncated: the JPEG file ends in the middle of the image data": 1,
        "no such file": 1,
        "its objects have lists of different lengths": 1,
    }
    assert report.findings["boxes of an unknown class, dropped"] == 1
    assert report.findings["boxes that are not four numbers, dropped"] == 1
    assert {row["source_id"]: row["objects"]["category"] for row in rows_of(report.out)} == {
        "ok.jpg": [0],
        "nan.jpg": [1],
        "range.jpg": [1],
        "three.jpg": [],
        "null.jpg": [],
    }
    assert report.dropped == 1


def test_layouts_of_objects_and_formats_of_boxes() -> None:
    columns = {"bboxes": [[10, 20, 40, 60]], "labels": ["cat"], "area": [None]}
    expected = [(10.0, 20.0, 40.0, 60.0)]
    listed = [{"bboxes": [10, 20, 40, 60], "labels": "cat"}]
    layouts: list[Any] = [columns, listed, json.dumps(columns), json.dumps(listed)]
    for value in layouts:
        parsed = parse_objects(value, "coco")
        assert (parsed.boxes_xywh, parsed.categories, parsed.areas) == (expected, ["cat"], [2400.0]), value
        assert (parsed.ids, parsed.iscrowd, parsed.refusal) == ([None], [False], None)
    assert parse_objects(columns, "voc").boxes_xywh == [(10.0, 20.0, 30.0, 40.0)]
    (box_xywh,) = parse_objects({"bbox": [[0.5, 0.5, 0.2, 0.4]], "category": [0], "area": [9.0]}, "yolo").boxes_xywh
    assert box_xywh == pytest.approx((0.4, 0.3, 0.2, 0.4))
    none: list[Any] = [None, [], {"bbox": [], "category": []}, {"bbox": None, "category": None}, "[]", "null"]
    for value in none:
        assert parse_objects(value, "coco").boxes_xywh == []
        assert parse_objects(value, "coco").refusal is None
    wrong: list[Any] = [
        "{",
        "7",
        [1],
        {"bbox": 7, "category": 7},
        {"bbox": [[1, 2, 3, 4]], "category": None},
        {"bbox": []},
    ]
    for value in wrong:
        assert parse_objects(value, "coco").refusal is not None, value


def test_yolo_boxes_are_parts_of_the_image(bccd: Path, tmp_path: Path) -> None:
    rows = cppe_rows(bccd)
    for row in rows:
        boxes = np.array(row["objects"]["bbox"]).reshape(-1, 4) / [640, 480, 640, 480]
        boxes[:, :2] += boxes[:, 2:] / 2
        row["objects"]["bbox"] = boxes.tolist()
    datasets.Dataset.from_list(rows, features=cppe_features()).save_to_disk(str(tmp_path / "set"))
    report = prepare(tmp_path / "out", tmp_path / "set", bbox_format="yolo")
    for row, expected in zip(rows_of(report.out), rows_of(bccd / "table"), strict=True):
        np.testing.assert_allclose(row["objects"]["bbox"], expected["objects"]["bbox"], atol=1e-9)


def test_classes_come_from_the_labels_the_names_or_the_numbers() -> None:
    def read(categories: list[Any], dtype: Any, **options: Any) -> tuple[list[tuple[int, str]], list[list[int]]]:
        features = {"image": datasets.Image(), "objects": OBJECTS | {"category": datasets.List(dtype)}}
        rows = [{"image": IMAGE, "objects": {"bbox": [[1, 2, 3, 4]], "category": [item]}} for item in categories]
        source = read_hub(opened(features, rows), config_of("-", **options))
        indices = [record.objects.categories for record in source.images if record.objects is not None]
        return [(category.id, category.name) for category in source.categories], indices

    label, text, number = datasets.ClassLabel(names=["cat", "dog"]), datasets.Value("string"), datasets.Value("int64")
    assert read([1, 0], label) == ([(0, "cat"), (1, "dog")], [[1], [0]])
    assert read([1, 0], label, classes=["a", "b"]) == ([(0, "a"), (1, "b")], [[1], [0]])
    assert read(["owl", "ant"], text) == ([(1, "ant"), (2, "owl")], [[1], [0]])
    assert read(["owl", "ant"], text, classes=["owl", "bee"]) == ([(0, "owl"), (1, "bee")], [[0], []])
    assert read([90, 7], number) == ([(7, "7"), (90, "90")], [[1], [0]])
    assert read([1, 2], number, classes=["a", "b"]) == ([(0, "a"), (1, "b")], [[1], []])


def test_ids_and_further_columns() -> None:
    features = {
        "image_id": datasets.Value("int32"),
        "photo": datasets.Image(),
        "camera": datasets.ClassLabel(names=["north", "south"]),
        "weather": datasets.Value("large_string"),
        "exposure": datasets.Value("float32"),
        "tags": datasets.List(datasets.Value("string")),
    }
    row = {"photo": IMAGE, "camera": 1, "weather": "rain", "exposure": 0.5, "tags": ["x"]}
    source = read_hub(opened(features, [row | {"image_id": 30}, row | {"image_id": 4, "camera": None}]), config_of("-"))
    first, second = source.images
    assert (first.image_id, second.image_id, first.path, first.objects) == (30, 4, "a.jpg", None)
    assert first.extra == {"camera": "south", "weather": "rain", "exposure": 0.5}
    assert second.extra["camera"] is None
    assert [str(field.type) for field in source.extra_fields] == ["string", "string", "float"]
    assert list(source.findings) == ["columns without scalar values, dropped"]
    for ids in ([7, 7], [None, 1], [-1, 2]):
        source = read_hub(opened(features, [row | {"image_id": item} for item in ids]), config_of("-"))
        assert [record.image_id for record in source.images] == [0, 1]
        assert [record.extra["source_id"] for record in source.images] == [
            "a.jpg" if item is None else str(item) for item in ids
        ]
        assert any("rows are numbered instead" in kind for kind in source.findings)


def test_annotation_ids_are_kept_if_they_can_be() -> None:
    features = {"image": datasets.Image(), "objects": OBJECTS | {"id": datasets.List(datasets.Value("int64"))}}

    def ids_of(*given: list[int | None]) -> list[list[int]]:
        rows = [
            {"image": IMAGE, "objects": {"bbox": [[1, 2, 3, 4]] * len(ids), "category": [0] * len(ids), "id": ids}}
            for ids in given
        ]
        source = read_hub(opened(features, rows), config_of("-"))
        return [record.objects.ids for record in source.images if record.objects is not None]

    assert ids_of([9, 4], [7]) == [[9, 4], [7]]
    assert ids_of([9, 4], [9]) == ids_of([0, 4], [9]) == ids_of([None, 4], [9]) == [[1, 2], [3]]


def test_a_data_set_of_the_hub_may_not_lead_to_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    rows = [{"image": {"bytes": None, "path": str(secret)}}, {"image": {"bytes": None, "path": "secret.jpg"}}]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    images = HubImages(datasets.Dataset.from_list(rows, features=features).with_format("arrow"), None)
    read_hub(images, config_of("-"))
    for row in ("0", "1"):
        with pytest.raises(ReadError, match="leads out of the data set"):
            images.read(row)
    local = HubImages(images.dataset, str(tmp_path))
    assert [pickle.loads(pickle.dumps(local)).read(row) for row in ("0", "1")] == [b"secret", b"secret"]
    (tmp_path / "inside").mkdir()
    inside = HubImages(images.dataset, str(tmp_path / "inside"))
    (tmp_path / "inside" / "secret.jpg").symlink_to(secret)
    for row in ("0", "1"):
        with pytest.raises(ReadError, match="leads out of the data set; --allow-root"):
            inside.read(row)
    secret.unlink()
    with pytest.raises(MissingFileError):
        local.read("0")
    web = [{"image": {"bytes": None, "path": "http://127.0.0.1:9/a.jpg"}}]
    named = datasets.Dataset.from_list(web, features=features).with_format("arrow")
    with pytest.raises(ReadError, match="--allow-web permits"):
        HubImages(named, None).read("0")


@pytest.mark.parametrize(
    ("dataset", "options", "words"),
    [
        ("someone/no-such-data-set", {}, "cannot load the data set someone/no-such-data-set: "),
        ("s3://bucket/set", {}, "must be a name on the Hugging Face Hub or a path"),
        ("/no/such/folder", {}, "no such path: /no/such/folder"),
        ("{set}", {"split": "vall"}, 'Unknown split "vall"'),
        ("{set}", {"image_column": "photo"}, "has no column photo; it has image_id, image, "),
        ("{set}", {"objects_column": "boxes"}, "has no column boxes; it has image_id, image, "),
        ("{set}", {"objects_column": "width"}, "the column width is neither a struct of lists"),
        ("{saved}", {"split": "val"}, "has no split val; it has train"),
        ("{empty}", {}, "cannot load the data set"),
        ("{script}", {}, "cannot load the data set"),
    ],
)
def test_mistakes_get_one_line(bccd: Path, tmp_path: Path, dataset: str, options: dict[str, Any], words: str) -> None:
    for name in ("set", "empty", "script"):
        (tmp_path / name).mkdir()
    cppe(bccd).to_parquet(str(tmp_path / "set" / "train.parquet"))
    datasets.DatasetDict({"train": cppe(bccd)}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('run')")
    places = {name: tmp_path / name for name in ("set", "saved", "empty", "script")}
    with pytest.raises(UserError, match=words) as caught:
        prepare(tmp_path / "out", dataset.format(**places), **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (tmp_path / "out").exists()


def test_load_hub_takes_parts_of_splits(bccd: Path, tmp_path: Path) -> None:
    cppe(bccd).to_parquet(str(tmp_path / "train.parquet"))
    config = config_of(tmp_path / "train.parquet", split="train[4:6]", allow_root=[str(bccd)])
    images = load_hub(config)
    assert [record.image_id for record in read_hub(images, config).images] == [
        row["image_id"] for row in cppe_rows(bccd)[4:6]
    ]
    assert images.read("0") == Path(cppe_rows(bccd)[4]["image"]).read_bytes()


def test_the_command(bccd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cppe(bccd).to_parquet(str(tmp_path / "train.parquet"))
    command = ["prepare", "hub", "--dataset", str(tmp_path / "train.parquet"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "the path leads out of the data set; --allow-root" in capsys.readouterr().err
    assert main([*command, "--allow-root", str(bccd)]) == 0
    assert "12 images found, 12 accepted, 0 rejected" in capsys.readouterr().out
    assert main(["prepare", "hub", "--dataset", "someone/none", "--out", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "cannot load the data set someone/none" in error and "Traceback" not in error


def test_truncated_images_are_kept_on_demand(bccd: Path, tmp_path: Path) -> None:
    data = next((bccd / "images").iterdir()).read_bytes()
    rows = [{"image": {"bytes": data[: len(data) * part // 4], "path": f"{part}.jpg"}} for part in (4, 3, 2)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    assert prepare(tmp_path / "rejected", tmp_path / "train.parquet").rejected == 2
    report = prepare(tmp_path / "kept", tmp_path / "train.parquet", truncated="keep")
    assert (report.accepted, report.rejected) == (3, 0)
    assert report.findings["truncated images whose readable part was kept"] == 2
    whole, most, half = rows_of(report.out)
    assert whole["image"]["bytes"] == data
    for row in (most, half):
        pixels = decode(row["image"]["bytes"], max_pixels=10**6)
        assert pixels.shape == (row["height"], row["width"], 3)
        np.testing.assert_array_equal(pixels[:200], decode(data, max_pixels=10**6)[:200])
    with pytest.raises(UserError, match="--truncated keep needs --image-storage inline"):
        PrepareHubConfig(dataset="x", out="y", truncated="keep", image_storage="reference")
