import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from raydet.common.errors import UserError
from raydet.config import (
    EvaluateConfig,
    InspectConfig,
    PrepareCocoConfig,
    PrepareImagesConfig,
    PrepareShapesConfig,
    config_hash,
)
from raydet.images.collection import open_collection
from raydet.images.decode import decode
from raydet.inspection.inspect import inspect
from raydet.measuring.evaluate import evaluate
from raydet.preparation.prepare import prepare_coco, prepare_images, prepare_shapes
from raydet.preparation.sources.fitting import CLIPPED, NO_AREA, OUTSIDE, fit_objects
from raydet.preparation.sources.source import SourceObjects
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.output_folder import RUN_FILE
from raydet.tables.table import open_table
from tests.outcomes import RecordingConsole
from tests.small_sets import annotation, files_below, rows_of, save_coco, save_image


@pytest.mark.parametrize(("split", "numbers"), [("train", (205, 2804)), ("val", (87, 1137)), ("test", (72, 945))])
def test_bccd(test_data: Path, tmp_path: Path, split: str, numbers: tuple[int, int]) -> None:
    annotations = test_data / "bccd" / f"instances_{split}.json"
    config = PrepareCocoConfig(
        annotations=str(annotations), images=str(test_data / "bccd" / "images"), out=str(tmp_path / "out")
    )
    report = prepare_coco(config)
    assert (report.found, report.accepted, report.rejected) == (numbers[0], numbers[0], 0)
    assert report.boxes == numbers[1] == sum(report.boxes_by_class.values())
    assert report.dropped == (0 if split == "test" else 1)
    table = open_table(report.out, "images")
    assert [category.name for category in table.categories] == ["Platelets", "RBC", "WBC"]
    assert table.manifest["prepare"]["boxes"] == report.boxes
    truth = json.loads(annotations.read_text())
    boxes_of: dict[int, list[list[float]]] = {entry["id"]: [] for entry in truth["images"]}
    for item in truth["annotations"]:
        if item["bbox"][2] > 0 and item["bbox"][3] > 0:
            boxes_of[item["image_id"]].append(item["bbox"])
    rows = rows_of(report.out)
    assert [row["image_id"] for row in rows] == [entry["id"] for entry in truth["images"]]
    assert {row["image_id"]: row["objects"]["bbox"] for row in rows} == boxes_of
    first = rows[0]
    assert first["image"]["bytes"] == (test_data / "bccd" / "images" / first["image"]["path"]).read_bytes()


def test_coco_with_crowds_gaps_and_images_without_boxes(test_data: Path, tmp_path: Path) -> None:
    for split, numbers in {"train": (47, 524, 6), "val": (57, 517, 7)}.items():
        config = PrepareCocoConfig(
            annotations=str(test_data / "coco_mini" / f"instances_{split}.json"),
            images=str(test_data / "coco_mini" / split),
            out=str(tmp_path / split),
            image_storage="reference",
        )
        report = prepare_coco(config)
        assert (report.accepted, report.boxes, report.crowd_boxes) == numbers
        rows = rows_of(report.out)
        assert sum(not row["objects"]["id"] for row in rows) == report.without_boxes
        assert sum(sum(row["objects"]["iscrowd"]) for row in rows) == numbers[2]
        for row in rows:
            assert row["image"]["bytes"] is None
            assert Path(row["image"]["path"]).is_absolute()
            with Image.open(row["image"]["path"]) as image:
                assert image.size == (row["width"], row["height"])
        assert [category.id for category in open_table(report.out, "images").categories][-1] == 90
        assert {"license", "coco_url"} <= set(rows[0])


def test_awkward_files_are_all_accounted_for(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "awkward"
    report = prepare_images(PrepareImagesConfig(images=str(folder), out=str(tmp_path / "out")))
    with (folder / "MANIFEST.csv").open() as manifest:
        loads = {row["file"]: row["pillow_13_load"] == "ok" for row in csv.DictReader(manifest)}
    assert report.found == report.accepted + report.rejected == len(loads) == 29
    rows, rejected = rows_of(report.out), rows_of(tmp_path / "out" / "__rejected", "rejected")
    assert {row["source_id"] for row in rows} == {name for name, ok in loads.items() if ok}
    assert {row["path"] for row in rejected} == {name for name, ok in loads.items() if not ok}
    assert all(len(row["reason"]) > 5 and "\n" not in row["reason"] for row in rejected)
    assert sum(report.reasons.values()) == report.rejected
    for row in rows:
        assert decode(row["image"]["bytes"], max_pixels=10**8).shape[:2] == (row["height"], row["width"])
        assert row["objects"] == {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
    ids = [row["image_id"] for row in rows]
    assert ids == sorted(set(ids)) and ids[-1] < 29
    lines = report.lines()
    out = str(tmp_path / "out")
    assert lines[0] == f"29 images found, 17 accepted, 12 rejected (listed in {out}/__rejected)" and lines[-1] == out
    assert any("truncated: the JPEG file" in line and line.endswith(": 2") for line in lines)


def test_pixel_limit_rejects(tmp_path: Path) -> None:
    save_image(tmp_path / "in" / "small.png", (10, 10))
    save_image(tmp_path / "in" / "large.png", (100, 100))
    report = prepare_images(
        PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out"), max_pixels=9_999)
    )
    assert report.reasons == {"10,000 pixels is over the limit of 9,999 pixels": 1}
    assert [row["source_id"] for row in rows_of(report.out)] == ["small.png"]


@pytest.mark.parametrize(
    ("orientation", "expected"),
    # The box (2, 3, 10, 5) on 40 × 30 stored pixels, by the table of rows and columns in the EXIF standard.
    [(5, [3, 2, 5, 10]), (6, [22, 2, 5, 10]), (7, [22, 28, 5, 10]), (8, [3, 28, 5, 10])],
)
def test_boxes_drawn_before_the_exif_rotation_are_turned(
    tmp_path: Path, orientation: int, expected: list[float]
) -> None:
    # White inside the box, so the pixels show the expected position.
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[3:8, 2:12] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright_box = annotation(2, [1, 2, 3, 4], image_id=2)
    images = [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "a.png", "width": 30, "height": 40},
    ]
    path = save_coco(tmp_path, images, [annotation(1, [2, 3, 10, 5]), upright_box])
    report = prepare_coco(PrepareCocoConfig(annotations=path, images=str(tmp_path), out=str(tmp_path / "out")))
    turned, kept = rows_of(report.out)
    assert (report.rotated, report.size_mismatches) == (1, 0)
    assert (turned["width"], turned["height"]) == (kept["width"], kept["height"]) == (30, 40)
    assert turned["objects"]["bbox"] == [expected]
    rows, columns = np.nonzero(decode(turned["image"]["bytes"], max_pixels=10**6)[..., 0])
    left, top, width, height = expected
    assert (columns.min(), rows.min()) == (left, top)
    assert (columns.max() + 1, rows.max() + 1) == (left + width, top + height)
    assert kept["objects"]["bbox"] == [[1, 2, 3, 4]]


def test_a_wrong_size_in_the_annotations_is_counted_and_the_true_one_written(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", (50, 29))
    path = save_coco(
        tmp_path, [{"id": 1, "file_name": "a.png", "width": 50, "height": 50}], [annotation(1, [40, 20, 10, 20])]
    )
    report = prepare_coco(PrepareCocoConfig(annotations=path, images=str(tmp_path), out=str(tmp_path / "out")))
    (row,) = rows_of(report.out)
    assert (row["width"], row["height"]) == (50, 29)
    assert row["objects"]["bbox"] == [[40, 20, 10, 9]]
    assert (report.size_mismatches, report.rotated, report.clipped) == (1, 0, 1)


def test_boxes_are_clipped_dropped_and_their_areas_follow() -> None:
    objects = SourceObjects(
        ids=[1, 2, 3, 4, 5, 6, 7],
        boxes_xywh=[
            (0.1, 0.2, 0.3, 0.4),  # inside: unchanged
            (-10, 0, 20, 10),  # half outside; area of the box
            (-10, 0, 20, 10),  # half outside; area of a mask smaller than the rest
            (-10, 0, 20, 10),  # half outside; area of a mask larger than the rest
            (200, 5, 10, 10),  # outside
            (5, 5, 0, 10),  # no width
            (float("nan"), 5, 5, float("inf")),
        ],
        categories=[0, 1, 2, 3, 4, 5, 6],
        areas=[0.05, 200.0, 60.0, 150.0, 100.0, 0.0, 1.0],
        iscrowd=[False, True, False, False, False, False, False],
    )
    fitted = fit_objects(objects, (100, 100))
    assert [len(fitted.findings[kind]) for kind in (CLIPPED, OUTSIDE, NO_AREA)] == [3, 1, 2]
    assert fitted.objects["id"] == [1, 2, 3, 4]
    assert fitted.objects["bbox"] == [[0.1, 0.2, 0.3, 0.4]] + [[0, 0, 10, 10]] * 3
    assert fitted.objects["area"] == [0.05, 100.0, 60.0, 100.0]
    assert fitted.objects["category"] == [0, 1, 2, 3]
    assert fitted.objects["iscrowd"] == [False, True, False, False]


def test_paths_that_leave_the_folder_are_rejected_unread(tmp_path: Path) -> None:
    save_image(tmp_path / "secret.png")
    save_image(tmp_path / "images" / "ok.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["ok.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "bad\ud800.png", "nul\0.png"]
    images = [{"id": rank, "file_name": name} for rank, name in enumerate(names)]
    path = save_coco(tmp_path, images, [])
    config = PrepareCocoConfig(annotations=path, images=str(tmp_path / "images"), out=str(tmp_path / "out"))
    report = prepare_coco(config)
    assert (report.found, report.accepted, report.rejected) == (6, 1, 5)
    rejected = rows_of(tmp_path / "out" / "__rejected", "rejected")
    assert [row["path"] for row in rejected][:3] == names[1:4]
    assert all("file name" in row["reason"] for row in rejected)


def test_opens_with_datasets(test_data: Path, tmp_path: Path) -> None:
    annotations, images = test_data / "bccd" / "instances_test.json", test_data / "bccd" / "images"
    prepare_coco(PrepareCocoConfig(annotations=str(annotations), images=str(images), out=str(tmp_path / "out")))
    script = """
import sys
from datasets import load_dataset
rows = load_dataset("parquet", data_files=sys.argv[1] + "/*.parquet", split="train")
assert len(rows) == 72, len(rows)
assert rows[0]["image"].size == (640, 480) == (rows[0]["width"], rows[0]["height"])
assert rows[0]["image"].format == "JPEG"
objects = rows.features["objects"]
assert objects["category"].feature.names == ["Platelets", "RBC", "WBC"], objects
assert len(rows[0]["objects"]["bbox"][0]) == 4
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_running_again_does_nothing_and_another_table_is_never_overwritten(tmp_path: Path) -> None:
    save_image(tmp_path / "in" / "a.png")
    config = PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out"))
    first = prepare_images(config)
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files_below(tmp_path / "out")}
    again = prepare_images(PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out"), num_threads=1))
    assert again.already_done and not first.already_done
    assert {**vars(again), "already_done": False} == vars(first)
    assert "already prepared" in again.lines()[-1]
    other = PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out"), max_pixels=10**7)
    with pytest.raises(UserError, match=r"--max-pixels: \d+ → 10000000"):
        prepare_images(other)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files_below(tmp_path / "out")} == before
    assert open_table(str(tmp_path / "out"), "images").manifest["config_hash"] == config_hash(config)


@pytest.mark.parametrize(
    "name", ["notes.txt", "part-00000.parquet", "__rejected/part-00000.parquet", "__findings/x", "data.parquet"]
)
def test_files_of_the_users_are_never_touched(tmp_path: Path, name: str) -> None:
    save_image(tmp_path / "in" / "a.png")
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=f"such as {name}"):
        prepare_images(PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out")))
    assert path.read_bytes() == b"mine" and files_below(tmp_path / "out") == [name]
    with pytest.raises(UserError, match="is a file"):
        prepare_images(PrepareImagesConfig(images=str(tmp_path / "in"), out=str(path)))


def test_the_folder_of_two_tables_is_refused_where_one_is_wanted(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    prepare_shapes(PrepareShapesConfig(out=out, num_train=2, num_val=1, image_size=32))
    found = tmp_path / "found.json"
    found.write_text("[]")
    commands: tuple[Callable[[], object], ...] = (
        partial(open_table, out, "images"),
        partial(open_collection, out, index_uri=None),
        partial(inspect, InspectConfig(data=out, out=str(tmp_path / "page"))),
        partial(evaluate, EvaluateConfig(truth=out, detections=str(found))),
    )
    for command in commands:
        with pytest.raises(UserError, match=r"tables train and val; .*/out/train"):
            command()


def test_a_killed_run_leaves_no_table_and_a_rerun_starts_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = """
import sys
from raydet import PrepareShapesConfig, prepare_shapes
prepare_shapes(PrepareShapesConfig(out=sys.argv[1], num_train=100_000, image_size=640))
"""
    with subprocess.Popen([sys.executable, "-c", script, str(out)]) as process:
        deadline = time.monotonic() + 60
        while not list((out / "train").glob(".part-00000.parquet.*.partial")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    left = files_below(out / "train")
    assert any("part-00000.parquet" in name for name in left) and MANIFEST_NAME not in left
    with pytest.raises(UserError, match="not a complete raydet table"):
        open_table(str(out / "train"), "images")
    console = RecordingConsole()
    report = prepare_shapes(PrepareShapesConfig(out=str(out), num_train=5, num_val=3), console=console)
    assert (report.found, report.accepted) == (8, 8)
    assert console.lines == [f"an earlier run left {out}/train unfinished; starting again from the first image"]
    assert files_below(out / "train") == [
        MANIFEST_NAME,
        RUN_FILE,
        f"__findings/{MANIFEST_NAME}",
        "__findings/part-00000.parquet",
        f"__rejected/{MANIFEST_NAME}",
        "__rejected/part-00000.parquet",
        "part-00000.parquet",
    ]
    assert len(rows_of(out / "train")) == 5


def test_when_every_image_is_rejected_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    (tmp_path / "in" / "b.jpg").write_text("text")
    with pytest.raises(UserError, match=r"none of the 2 images can be used \(empty file: 1; not an image"):
        prepare_images(PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_labelled_classes_are_stated_or_read(tmp_path: Path) -> None:
    """Check `--labelled`, and LVIS's lists: the classes of boxes and absent ones, without those labelled in part."""
    for name in "abc":
        save_image(tmp_path / "in" / f"{name}.png")
    images: list[dict[str, Any]] = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate("abc", 1)]
    boxes = [annotation(1, [1, 1, 4, 4]), annotation(2, [2, 2, 4, 4], category_id=9)]

    def prepared(out: str, **options: Any) -> list[list[int] | None]:
        annotations = save_coco(tmp_path, images, boxes, (5, 7, 9))
        config = PrepareCocoConfig(
            annotations=annotations, images=str(tmp_path / "in"), out=str(tmp_path / out), **options
        )
        return [row["labelled_categories"] for row in rows_of(prepare_coco(config).out)]

    assert prepared("stated", labelled=["class 9", "cell"]) == [[0, 2]] * 3
    with pytest.raises(UserError, match=r"--labelled: there is no class bus; the classes are cell, class 7, class 9"):
        prepared("wrong", labelled=["cell", "bus"])
    images[0] |= {"neg_category_ids": [7, 70], "not_exhaustive_category_ids": [9]}
    images[1] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    assert prepared("federated") == [[0, 1], [], None]
    with pytest.raises(UserError, match=r"--labelled: the annotations state"):
        prepared("both", labelled=["cell"])
    assert not any((tmp_path / name).exists() for name in ("wrong", "both"))


def test_mistakes_are_found_before_anything_is_written(tmp_path: Path) -> None:
    save_image(tmp_path / "in" / "a.png")
    annotations = save_coco(tmp_path, [{"id": 1, "file_name": "a.png"}], [])
    out = str(tmp_path / "out")
    for paths in [(str(tmp_path / "none.json"), str(tmp_path / "in")), (annotations, str(tmp_path / "none"))]:
        with pytest.raises(UserError, match=r"no such .*none"):
            prepare_coco(PrepareCocoConfig(annotations=paths[0], images=paths[1], out=out))
    with pytest.raises(UserError, match="no such image folder"):
        prepare_images(PrepareImagesConfig(images=str(tmp_path / "none"), out=out))
    assert not Path(out).exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be written: Not a directory"):
        prepare_images(PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "file" / "out")))


def test_shapes_are_the_same_whatever_the_threads(tmp_path: Path) -> None:
    tables = []
    for threads in (1, 5):
        out = tmp_path / str(threads)
        report = prepare_shapes(PrepareShapesConfig(out=str(out), num_train=40, num_val=10, num_threads=threads))
        assert (report.found, report.accepted, report.rejected) == (50, 50, 0)
        assert report.boxes == sum(report.boxes_by_class.values()) > 50
        tables.append([rows_of(out / split) for split in ("train", "val")])
    assert tables[0] == tables[1]
    train, val = tables[0]
    assert not {row["image"]["bytes"] for row in train} & {row["image"]["bytes"] for row in val}
    for row in train:
        assert decode(row["image"]["bytes"], max_pixels=10**6).shape == (128, 128, 3)
        limits = fit_objects(
            SourceObjects(*(row["objects"][key] for key in ("id", "bbox", "category", "area", "iscrowd"))), (128, 128)
        )
        assert limits.findings.keys().isdisjoint((CLIPPED, OUTSIDE, NO_AREA))


def test_row_groups_stay_small(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (700, 1000, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG", compress_level=0)
    for index in range(25):
        (tmp_path / "in" / f"{index}.png").write_bytes(stream.getvalue())
    prepare_images(PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out")))
    groups = open_table(str(tmp_path / "out"), "images").row_groups()
    assert len(groups) >= 2
    assert sum(group.num_rows for group in groups) == 25
    assert max(group.num_bytes for group in groups) <= 32 * 2**20


IMAGE_STATES = st.sampled_from(["ok", "rotated", "missing", "empty", "truncated", "text", "outside"])
NUMBERS = st.one_of(st.floats(-50, 90), st.just(float("nan")), st.just(0.0), st.none())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    states=st.lists(IMAGE_STATES, min_size=1, max_size=6),
    boxes=st.lists(st.tuples(st.integers(0, 7), st.lists(NUMBERS, min_size=4, max_size=4)), max_size=12),
)
def test_random_defects_lose_nothing(
    tmp_path: Path, states: list[str], boxes: list[tuple[int, list[float | None]]]
) -> None:
    shutil.rmtree(tmp_path / "case", ignore_errors=True)
    folder, out = tmp_path / "case" / "images", tmp_path / "case" / "out"
    folder.mkdir(parents=True)
    images = []
    for rank, state in enumerate(states):
        name = f"{'../' if state == 'outside' else ''}{rank}.png"
        save_image(folder / name, orientation=6 if state == "rotated" else 1)
        data = (folder / name).read_bytes()
        if state == "missing":
            (folder / name).unlink()
        elif state in ("empty", "truncated", "text"):
            (folder / name).write_bytes({"empty": b"", "truncated": data[:200], "text": b"<html>"}[state])
        images.append({"id": rank, "file_name": name, "width": 40, "height": 30})
    annotations = [
        {"id": rank + 1, "image_id": image_id, "category_id": 5, "bbox": bbox}
        for rank, (image_id, bbox) in enumerate(boxes)
    ]
    config = PrepareCocoConfig(
        annotations=save_coco(tmp_path / "case", images, annotations), images=str(folder), out=str(out)
    )
    readable = [rank for rank, state in enumerate(states) if state in ("ok", "rotated")]
    if not readable:
        with pytest.raises(UserError, match="none of the"):
            prepare_coco(config)
        assert not out.exists()
        return
    report = prepare_coco(config)
    assert report.found == report.accepted + report.rejected == len(states)
    rows = rows_of(out)
    assert [row["image_id"] for row in rows] == readable
    assert len(rows_of(out / "__rejected", "rejected")) == report.rejected
    assert report.rotated == states.count("rotated")
    of_readable = sum(image_id in readable for image_id, _ in boxes)
    assert report.boxes + report.dropped == of_readable
    assert report.findings.get("annotations of an unknown image, dropped", 0) == sum(
        image_id >= len(states) for image_id, _ in boxes
    )
    for row in rows:
        assert (row["width"], row["height"]) == ((30, 40) if states[row["image_id"]] == "rotated" else (40, 30))
        for left, top, width, height in row["objects"]["bbox"]:
            assert width > 0 and height > 0 and left >= 0 and top >= 0
            assert left + width <= row["width"] + 1e-9 and top + height <= row["height"] + 1e-9
    assert pq.read_schema(out / "part-00000.parquet").metadata[b"huggingface"]


@pytest.mark.usefixtures("quick_leases")
def test_remote_folders_and_tables(tmp_path: Path) -> None:
    remote = fsspec.filesystem("memory")
    save_image(tmp_path / "a b.png")
    remote.put(str(tmp_path / "a b.png"), "/prepare/in/sub/a b.png")
    remote.pipe("/prepare/in/empty.jpg", b"")
    config = PrepareImagesConfig(
        images="memory://prepare/in", out="memory://prepare/out", image_storage="reference", num_threads=2
    )
    report = prepare_images(config)
    assert (report.found, report.accepted, report.reasons) == (2, 1, {"empty file": 1})
    (row,) = rows_of("memory://prepare/out")
    assert row["image"] == {"bytes": None, "path": "memory://prepare/in/sub/a b.png"}
    assert prepare_images(config).already_done
    with pytest.raises(UserError, match="no such image folder: memory://prepare/none"):
        prepare_images(PrepareImagesConfig(images="memory://prepare/none", out="memory://prepare/other"))


@pytest.mark.timeout(60)
def test_names_that_lead_to_no_file_are_rejected_one_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    save_image(folder / "ok.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("gone.png")
    (folder / "device.png").symlink_to("/dev/zero")
    names = ["ok.png", "pipe.png", "folder.png", "loop.png", "dangling.png", "device.png"]
    names += ["x" * 300 + ".png", "y/" * 2_500 + "z.png", "ok.png/inner.png"]
    path = save_coco(tmp_path, [{"id": rank, "file_name": name} for rank, name in enumerate(names)], [])
    config = PrepareCocoConfig(annotations=path, images=str(folder), out=str(tmp_path / "out"))
    report = prepare_coco(config)
    assert (report.found, report.accepted, report.rejected) == (len(names), 1, len(names) - 1)
    rejected = rows_of(tmp_path / "out" / "__rejected", "rejected")
    assert [row["path"] for row in rejected] == names[1:]
    reasons = [row["reason"] for row in rejected]
    assert reasons[0] == "it is a named pipe, not a file" and reasons[1] == "it is a directory, not a file"
    assert "symbolic link; --allow-root" in reasons[4] and all("\n" not in reason for reason in reasons)
    report = prepare_images(PrepareImagesConfig(images=str(folder), out=str(tmp_path / "listed")))
    assert (report.found, report.accepted, report.rejected) == (5, 1, 4)


def test_a_folder_of_links_is_read_on_demand(tmp_path: Path) -> None:
    save_image(tmp_path / "store" / "blob.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to("../store/blob.png")
    (tmp_path / "images" / "notes.md").touch()
    with pytest.raises(UserError, match=r"all 1 image files .* lead out of it.*--allow-root .*/store$"):
        prepare_images(PrepareImagesConfig(images=str(tmp_path / "images"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    config = PrepareImagesConfig(
        images=str(tmp_path / "images"), out=str(tmp_path / "out"), allow_root=[str(tmp_path / "store")]
    )
    report = prepare_images(config)
    assert report.accepted == 1
    assert report.findings == {"files skipped because their endings are not those of images": 1}
