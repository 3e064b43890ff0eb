"""A model's detections → an images table: which become labels, which ignore regions, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import raydet
from raydet import UserError
from raydet.cli.main import main
from raydet.common.version import __version__
from raydet.config import EvaluateConfig, PrepareDetectionsConfig
from raydet.measuring.evaluate import evaluate
from raydet.preparation.prepare import prepare_detections
from raydet.preparation.report import PrepareReport
from raydet.preparation.sources.scored.rows import RecentRows
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table
from raydet.training.feeding.chunks import ROW_TYPE
from tests.small_sets import files_below, rows_of, save_image

SIZE = (64, 48)
NUM_IMAGES = 12
CLASSES = tuple(Category(number, name) for number, name in enumerate(("cat", "dog", "owl"), start=1))
"""Nothing is ever right about owls."""
SCORES = ((0.9, 0.7, 0.5, 0.2), (0.8, 0.6, 0.4, 0.1), (0.95, 0.75, 0.55, 0.25))
"""Of each class at the four places of each image."""


def boxes_of(image_id: int) -> list[list[float]]:
    return [[2.0 + 15 * place, 4.0 + image_id, 12.0, 10.0] for place in range(4)]


def detections_of(image_id: int) -> dict[str, list[Any]]:
    found = [
        (score, box, category)
        for category, scores in enumerate(SCORES)
        for score, box in zip(scores, boxes_of(image_id), strict=True)
    ]
    found.sort(key=lambda one: -one[0])
    return {
        "bbox": [box for _, box, _ in found],
        "score": [one for one, *_ in found],
        "category": [c for *_, c in found],
    }


def write_detections(
    folder: Path, images: str, order: list[int] | None = None, *, errors: tuple[int, ...] = (), **metadata: Any
) -> str:
    """Write a detections table for an images table; `order` holds rows of it, `errors` ids of images."""
    rows = rows_of(images)
    schema = build_schema("detections", CLASSES, extra_metadata={"checkpoint": "runs/teacher", **metadata})
    with TableWriter(str(folder), schema, config_hash="x" * 12) as writer:
        writer.extra["id_space"] = open_table(images).manifest.get("id_space")
        for place in order if order is not None else range(len(rows)):
            image_id, is_bad = rows[place]["image_id"], rows[place]["image_id"] in errors
            writer.write_rows(
                [
                    {
                        "image_id": image_id,
                        "path": rows[place]["image"]["path"],
                        "width": None if is_bad else SIZE[0],
                        "height": None if is_bad else SIZE[1],
                        "detections": {"bbox": [], "score": [], "category": []} if is_bad else detections_of(image_id),
                        "error": "the file is truncated" if is_bad else None,
                    }
                ]
            )
            if place % 5 == 4:
                writer.flush()
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build tables: `inline` and `reference` images, `found` and `shuffled` detections, and `truth` of some images."""
    folder = tmp_path_factory.mktemp("scored")
    lines = ["path,camera"]
    for number in range(NUM_IMAGES):
        save_image(folder / "images" / f"{number:02d}.png", SIZE, seed=number)
        lines.append(f"images/{number:02d}.png,{'left' if number % 2 else 'right'}")
    (folder / "list.csv").write_text("\n".join(lines))
    for storage in ("inline", "reference"):
        raydet.prepare_images(
            images=str(folder / "list.csv"), out=str(folder / storage), image_storage=storage, num_threads=1
        )
    write_detections(folder / "found", str(folder / "inline"), checkpoint_hash="0123456789abcdef")
    order = np.random.default_rng(0).permutation(NUM_IMAGES).tolist()
    write_detections(folder / "shuffled", str(folder / "inline"), order)
    # Cats are at the two best boxes, dogs at the best three.
    images = [row for row in rows_of(str(folder / "inline")) if row["image_id"] % 2]
    with TableWriter(str(folder / "truth"), build_schema("images", CLASSES), config_hash="y" * 12) as writer:
        for row in images:
            boxes = [(box, 0) for box in boxes_of(row["image_id"])[:2]]
            boxes += [(box, 1) for box in boxes_of(row["image_id"])[:3]]
            objects = {
                "id": list(range(1, 6)),
                "bbox": [box for box, _ in boxes],
                "category": [category for _, category in boxes],
                "area": [120.0] * 5,
                "iscrowd": [False] * 5,
            }
            names = ("image_id", "image", "width", "height")
            writer.write_rows([{**{name: row[name] for name in names}, "objects": objects}])
    return folder


def prepare(folder: Path, out: Path, **options: Any) -> PrepareReport:
    given = {"data": str(folder / "inline"), "detections": str(folder / "found"), "num_threads": 1, **options}
    return prepare_detections(PrepareDetectionsConfig(out=str(out), **given))


def labels_of(out: Path) -> dict[int, list[tuple[int, float, bool]]]:
    """Return class, score and crowd flag of the boxes of each image."""
    return {
        row["image_id"]: list(
            zip(row["objects"]["category"], row["objects"]["score"], row["objects"]["iscrowd"], strict=True)
        )
        for row in rows_of(str(out))
    }


def expected(image_id: int, thresholds: list[float], ignore: float) -> list[tuple[int, float, bool]]:
    found = detections_of(image_id)
    return [
        (category, score, score < thresholds[category])
        for category, score in zip(found["category"], found["score"], strict=True)
        if score >= min(ignore, thresholds[category])
    ]


def test_detections_become_labels_and_ignore_regions(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = prepare(folder, out, threshold=0.6, ignore_threshold=0.4)
    assert (report.found, report.accepted, report.crowd_boxes) == (NUM_IMAGES, NUM_IMAGES, 3 * NUM_IMAGES)
    assert report.thresholds == {"cat": 0.6, "dog": 0.6, "owl": 0.6}
    assert "labels are detections with scores of at least: 0.6" in report.lines()
    assert labels_of(out) == {number: expected(number, [0.6] * 3, 0.4) for number in range(NUM_IMAGES)}
    table, given = open_table(str(out), "images"), rows_of(str(folder / "inline"))
    assert table.categories == CLASSES
    for row, image in zip(rows_of(str(out)), given, strict=True):
        assert {name: row[name] for name in ("image_id", "image", "camera")} == {
            name: image[name] for name in ("image_id", "image", "camera")
        }
    ids = [number for row in rows_of(str(out)) for number in row["objects"]["id"]]
    assert ids == list(range(1, len(ids) + 1))
    assert prepare(folder, out, threshold=0.6, ignore_threshold=0.4).already_done
    with pytest.raises(UserError, match="already holds another run"):
        prepare(folder, out, threshold=0.7)


def test_a_finished_table_is_not_taken_for_that_of_other_detections(folder: Path, tmp_path: Path) -> None:
    detections, file, out = tmp_path / "found", tmp_path / "t.yaml", tmp_path / "out"
    shutil.copytree(folder / "found", detections)
    file.write_text("default: 0.6")
    options: dict[str, Any] = {"detections": str(detections), "thresholds": str(file)}
    prepare(folder, out, **options)
    assert prepare(folder, out, **options).already_done
    file.write_text("default: 0.5")
    with pytest.raises(UserError, match=r"is finished, and --thresholds .*t\.yaml has changed since"):
        prepare(folder, out, **options)
    file.write_text("default: 0.6")
    shutil.rmtree(detections)
    assert prepare(folder, out, **options).already_done
    write_detections(detections, str(folder / "inline"), errors=(1,))
    with pytest.raises(UserError, match=r"is finished, and --detections .*found has changed since"):
        prepare(folder, out, **options)


@pytest.mark.parametrize(("paths", "is_same"), [("val/{}", False), ("photos/images/{}", True), ("{}", True)])
def test_equal_names_in_folders_that_were_numbered_apart_are_no_proof(
    folder: Path, tmp_path: Path, paths: str, is_same: bool
) -> None:
    other = tmp_path / "other"
    with TableWriter(str(other), build_schema("images", CLASSES), config_hash="y" * 12) as writer:
        writer.extra["id_space"] = "0123456789abcdef"
        for row in rows_of(str(folder / "inline")):
            row["image"]["path"] = paths.format(row["image"]["path"].rpartition("/")[2])
            writer.write_rows([{name: row[name] for name in ("image_id", "image", "width", "height", "objects")}])
    options: dict[str, Any] = {"data": str(other), "threshold": 0.6}
    if is_same:
        assert prepare(folder, tmp_path / "out", **options).accepted == NUM_IMAGES
        return
    with pytest.raises(UserError, match=r"different images: image 0 is 'val/00.png'.*'images/00.png'"):
        prepare(folder, tmp_path / "out", **options)


def test_the_table_names_the_model_and_the_thresholds(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", threshold=0.6)
    labels = json.loads(open_table(str(tmp_path / "out")).schema.metadata[b"raydet"])["labels"]
    assert labels == {
        "checkpoint": "runs/teacher",
        "checkpoint_hash": "0123456789abcdef",
        "detections": str(folder / "found"),
        "detections_hash": open_table(str(folder / "found")).fingerprint,
        "thresholds": {"cat": 0.6, "dog": 0.6, "owl": 0.6},
        "ignore_threshold": None,
        "target_precision": None,
        "truth": None,
        "raydet_version": __version__,
    }


@pytest.mark.parametrize("detections", ["found", "shuffled"])
@pytest.mark.parametrize("storage", ["inline", "reference"])
def test_rows_may_be_in_any_order_and_refer_to_files(
    folder: Path, tmp_path: Path, detections: str, storage: str
) -> None:
    for out_storage in {"inline", storage}:
        options = {"data": str(folder / storage), "detections": str(folder / detections), "threshold": 0.6}
        prepare(folder, tmp_path / out_storage, **options, image_storage=out_storage)
        assert labels_of(tmp_path / out_storage) == {n: expected(n, [0.6] * 3, 1) for n in range(NUM_IMAGES)}
        for row, image in zip(rows_of(str(tmp_path / out_storage)), rows_of(str(folder / storage)), strict=True):
            is_same = row["image"] == image["image"]
            assert (
                is_same
                if out_storage == storage
                else row["image"]["bytes"] == Path(image["image"]["path"]).read_bytes()
            )


@pytest.mark.parametrize("join", ["id", "path"])
def test_thresholds_reach_a_precision_on_the_images_with_truth(folder: Path, tmp_path: Path, join: Any) -> None:
    report = prepare(folder, tmp_path / "out", target_precision=0.9, truth=str(folder / "truth"), join=join)
    assert report.thresholds == {"cat": 0.7, "dog": 0.4, "owl": None}
    assert "  classes without a threshold, and so without labels: owl" in report.lines()
    measured = evaluate(
        EvaluateConfig(
            truth=str(folder / "truth"),
            detections=str(folder / "found"),
            target_precision=0.9,
            allow_partial=True,
            out=str(tmp_path / "metrics"),
            bootstrap=0,
        )
    )
    rows = open_table(str(tmp_path / "metrics" / "metrics")).read().to_pylist()
    stated = {row["category"]: row["value"] for row in rows if row["metric"] == "threshold_at_precision"}
    assert {name: stated[name] for name in report.thresholds} == report.thresholds
    assert measured.num_left_out == NUM_IMAGES // 2
    for labels in labels_of(tmp_path / "out").values():
        assert [(category, crowd) for category, _, crowd in labels] == [(0, False), (1, False)] * 2 + [(1, False)]


@pytest.mark.parametrize("name", ["thresholds.yaml", "thresholds.json"])
def test_thresholds_of_a_file(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({"CAT": 0.8, "owl": None, "default": 0.7}))
    report = prepare(folder, tmp_path / "out", thresholds=str(tmp_path / name), ignore_threshold=0.4)
    assert report.thresholds == {"cat": 0.8, "dog": 0.7, "owl": None}
    assert labels_of(tmp_path / "out")[3] == expected(3, [0.8, 0.7, 2.0], 0.4)


@pytest.mark.parametrize(
    ("content", "expected_text"),
    [
        ("cat: 0.5", "no threshold for 'dog', 'owl'"),
        ("{cat: 0.5, lynx: 0.5, default: 0.5}", "'lynx', which is no class of the detections: cat, dog, owl"),
        ("{cat: 1.5, default: 0.5}", "'cat' must be a number above 0 and at most 1, or null; got 1.5"),
        ("{no: 0.5, default: 0.5}", "class names must be texts; write False in quotes"),
        ("- 0.5", "as `class name: score`"),
        ("{", "cannot read --thresholds"),
        (None, "no such file"),
    ],
)
def test_a_file_of_thresholds_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, content: str | None, expected_text: str
) -> None:
    if content is not None:
        (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        prepare(folder, tmp_path / "out", thresholds=str(tmp_path / "t.yaml"))
    assert expected_text in str(caught.value) and "\n" not in str(caught.value)
    assert files_below(tmp_path / "out") == []


def test_images_that_could_not_be_scored_are_rejected(folder: Path, tmp_path: Path) -> None:
    detections = write_detections(tmp_path / "found", str(folder / "inline"), errors=(2, 7))
    report = prepare(folder, tmp_path / "out", detections=detections, threshold=0.6)
    assert (report.accepted, report.reasons) == (NUM_IMAGES - 2, {"not scored: the file is truncated": 2})
    assert set(labels_of(tmp_path / "out")) == set(range(NUM_IMAGES)) - {2, 7}


def test_detections_of_other_images_are_refused(folder: Path, tmp_path: Path) -> None:
    few = write_detections(tmp_path / "few", str(folder / "inline"), [0, 1, 2])
    save_image(tmp_path / "others" / "0.png", SIZE)
    shutil.copy(tmp_path / "others" / "0.png", tmp_path / "others" / "1.png")
    raydet.prepare_images(images=str(tmp_path / "others"), out=str(tmp_path / "other"), num_threads=1)
    others = write_detections(tmp_path / "foreign", str(tmp_path / "other"))
    for options, text in (
        ({"detections": few}, f"no row for 9 of the {NUM_IMAGES} images"),
        ({"data": str(tmp_path / "other")}, "describe different images: image 0 is '0.png'"),
        ({"detections": others, "truth": str(folder / "truth"), "data": str(tmp_path / "other")}, "different images"),
        ({"image_storage": "reference"}, "holds its images"),
        ({"detections": str(folder / "inline")}, "is a table of images; expected a table of detections"),
        ({"data": str(folder / "found")}, "is a table of detections; expected a table of images"),
    ):
        rule = {"target_precision": 0.9} if "truth" in options else {"threshold": 0.6}
        with pytest.raises(UserError, match=text):
            prepare(folder, tmp_path / "out", **rule, **options)
        assert files_below(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "set one of --threshold"),
        ({"threshold": 0.5, "thresholds": "t.yaml"}, "set one of --threshold"),
        ({"target_precision": 0.9}, "need each other"),
        ({"threshold": 0.5, "truth": "t"}, "need each other"),
        ({"threshold": 0.5, "join": "path"}, "--join is about --truth"),
        ({"threshold": 0.5, "ignore_threshold": 0.5}, "must be below --threshold"),
        ({"threshold": 0.0}, "--threshold must be above 0"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        PrepareDetectionsConfig(data="data", detections="found", out="out", **options)


def test_a_precision_that_no_class_reaches_is_refused(folder: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    with TableWriter(str(truth), build_schema("images", CLASSES), config_hash="y" * 12) as writer:
        objects: dict[str, list[Any]] = {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
        names = ("image_id", "image", "width", "height")
        row = rows_of(str(folder / "inline"))[0]
        writer.write_rows([{**{name: row[name] for name in names}, "objects": objects}])
    with pytest.raises(UserError, match="no class reach the precision"):
        prepare(folder, tmp_path / "out", target_precision=0.9, truth=str(truth))


def test_everything_reads_the_table(folder: Path, tmp_path: Path) -> None:
    out, reader = tmp_path / "out", pytest.importorskip("datasets")
    prepare(folder, out, threshold=0.6, ignore_threshold=0.4, val_fraction=0.25)
    for split, number in (("train", 9), ("val", 3)):
        table = str(out / split)
        assert open_table(table).num_rows == number
        found = reader.load_dataset("parquet", data_dir=table, cache_dir=str(tmp_path / "cache"), split="train")
        assert found.features["objects"]["category"].feature.names == ["cat", "dog", "owl"]
        assert found[0]["objects"]["score"] == rows_of(table)[0]["objects"]["score"]
        rows = pq.read_table(f"{table}/part-00000.parquet", columns=["image_id", "image", "width", "height", "objects"])
        assert rows.to_struct_array().chunk(0).cast(ROW_TYPE).type == ROW_TYPE, "as training reads them"
        assert main(["export", "coco", "--data", table, "--out", str(tmp_path / f"{split}.json")]) == 0
    duckdb = pytest.importorskip("duckdb")
    query = f"SELECT min(s) FROM (SELECT unnest(objects.score) AS s FROM '{out}/train/*.parquet')"
    assert duckdb.sql(query).fetchall() == [(0.4,)]
    page = tmp_path / "page"
    assert (
        main(
            ["inspect", "--data", str(out / "train"), "--out", str(page), "--num-images", "1", "--augmentation", "none"]
        )
        == 0
    )


def test_boxes_without_a_score_are_those_that_people_drew(folder: Path, tmp_path: Path) -> None:
    row = rows_of(str(folder / "truth"))[0]
    schema = build_schema("images", CLASSES, with_scores=True)
    for name, scores, is_valid in (("mixed", [0.5, None, 1.0, 0.2, None], True), ("bad", [2.0, *[None] * 4], False)):
        with TableWriter(str(tmp_path / name), schema, config_hash="z" * 12) as writer:
            writer.write_rows([{**row, "objects": {**row["objects"], "score": scores}}])
        table = open_table(str(tmp_path / name))
        if is_valid:
            assert table.read().to_pylist()[0]["objects"]["score"] == scores
        else:
            with pytest.raises(UserError, match="a score outside 0 … 1"):
                table.read()


def test_rows_are_found_by_position_in_any_order(folder: Path) -> None:
    table = open_table(str(folder / "found"))
    assert len(table.row_groups()) == 3
    rows, positions = RecentRows(table, ["image_id"]), np.array([11, 0, 0, 7, 3, 4, 5])
    assert rows.take(positions).column("image_id").to_pylist() == positions.tolist()
    assert [rows.at(place)["image_id"][0].as_py() for place in (10, 2)] == [10, 2]
