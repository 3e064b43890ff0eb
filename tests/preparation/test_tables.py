"""Splits, parts and executors: the rows do not depend on how the tables are written."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydet.common.errors import RunError, UserError
from raydet.config import PrepareCocoConfig, PrepareImagesConfig, PrepareShapesConfig
from raydet.images.files import ImageFolder
from raydet.preparation.prepare import _in_folder, _prepare, prepare_images, prepare_shapes
from raydet.preparation.report import PrepareReport
from raydet.preparation.sources.coco import read_coco
from raydet.preparation.sources.images import read_images
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.output_folder import RUN_FILE
from raydet.tables.table import open_table
from tests.small_sets import files_below, rows_of, save_coco, save_image

CATEGORIES = (5, 6, 7)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write forty images of unbalanced classes, including two copies and two unreadable files."""
    folder = tmp_path_factory.mktemp("set")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(40):
        path = folder / "images" / f"{number:02d}.png"
        save_image(path, seed=number % 38)
        images.append({"id": 100 - number, "file_name": path.name})
        for category in [5] + [6] * (number % 5 == 0) + [7] * (number in (3, 4)):
            box = [1, 1, 5 + category, 5]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": 100 - number, "category_id": category, "bbox": box}
            )
    for number in (10, 11):
        (folder / "images" / f"{number}.png").write_bytes(b"broken")
    save_coco(folder, images, annotations, CATEGORIES)
    return folder


SMALL_PARTS = {"file_bytes": 20_000, "survey_images": 7}
"""Sizes at which the data set takes several files of a few images each."""


def prepare(data_set: Path, out: Path, sizes: dict[str, Any] | None = None, **options: Any) -> PrepareReport:
    config = PrepareCocoConfig(
        annotations=str(data_set / "instances.json"), images=str(data_set / "images"), out=str(out), **options
    )
    return _prepare(config, partial(_in_folder, read_coco), **(sizes or {}))


def contents_below(folder: Path) -> dict[str, bytes]:
    """Return the content of all Parquet files by relative path."""
    return {name: (folder / name).read_bytes() for name in files_below(folder) if name.endswith(".parquet")}


def test_a_split_parts_the_rows_of_the_whole(data_set: Path, tmp_path: Path) -> None:
    whole = prepare(data_set, tmp_path / "whole")
    report = prepare(data_set, tmp_path / "out", val_fraction=0.25)
    assert (report.found, report.accepted, report.rejected) == (40, 38, 2)
    assert dict(report.tables) == {"train": f"{tmp_path}/out/train", "val": f"{tmp_path}/out/val"}
    train, val = rows_of(tmp_path / "out" / "train"), rows_of(tmp_path / "out" / "val")
    rows = rows_of(tmp_path / "whole")
    held_out = {row["image_id"] for row in val}
    assert [row for row in rows if row["image_id"] in held_out] == val
    assert [row for row in rows if row["image_id"] not in held_out] == train
    assert not {row["image"]["bytes"] for row in train} & {row["image"]["bytes"] for row in val}
    by_class = {5: [0, 0], 6: [0, 0], 7: [0, 0]}
    for side, table in enumerate((train, val)):
        for row in table:
            for category in row["objects"]["category"]:
                by_class[CATEGORIES[category]][side] += 1
    assert by_class[7] == [1, 1] and by_class[6] == [5, 2] and 8 <= by_class[5][1] <= 10
    assert report.splits["val"] == {
        "images": len(val),
        "boxes": sum(len(row["objects"]["id"]) for row in val),
        "boxes_by_class": {"cell": by_class[5][1], "class 6": by_class[6][1], "class 7": 1},
    }
    assert report.boxes == whole.boxes and report.boxes_by_class == whole.boxes_by_class
    assert report.not_in_val == []
    words = [line.split() for line in report.lines() if line.startswith("  ")]
    assert ["train", "val"] in words and ["class", "7", "1", "1"] in words
    assert report.lines()[-1] == f"{tmp_path}/out/train, {tmp_path}/out/val"
    assert len(rows_of(tmp_path / "out" / "__rejected", "rejected")) == 2
    again = prepare(data_set, tmp_path / "out", val_fraction=0.25, num_threads=1)
    assert again.already_done and {**vars(again), "already_done": False} == vars(report)
    assert open_table(f"{tmp_path}/out/val", "images").manifest["prepare"]["splits"] == report.splits


def test_the_split_follows_the_content_and_not_names_order_or_storage(data_set: Path, tmp_path: Path) -> None:
    content = json.loads((data_set / "instances.json").read_text())
    new_names = {entry["id"]: f"{entry['id'] * 7919 % 1000:03d}.png" for entry in content["images"]}
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    for entry in content["images"]:
        data = (data_set / "images" / entry["file_name"]).read_bytes()
        (other / "images" / new_names[entry["id"]]).write_bytes(data)
    images = [{"id": 500 - entry["id"], "file_name": new_names[entry["id"]]} for entry in content["images"]]
    annotations = [item | {"image_id": 500 - item["image_id"]} for item in reversed(content["annotations"])]
    save_coco(other, sorted(images, key=lambda entry: str(entry["file_name"])), annotations, CATEGORIES)
    prepare(data_set, tmp_path / "a", val_fraction=0.3, seed=7)
    prepare(other, tmp_path / "b", val_fraction=0.3, seed=7, num_threads=1)
    prepare(data_set, tmp_path / "c", val_fraction=0.3, seed=7, image_storage="reference")
    prepare(data_set, tmp_path / "d", val_fraction=0.3, seed=8)

    def held_out(name: str) -> set[bytes]:
        rows = rows_of(tmp_path / name / "val")
        return {row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes() for row in rows}

    assert held_out("a") == held_out("b") == held_out("c") != held_out("d")
    prepare(data_set, tmp_path / "whole")
    spaces = [
        open_table(str(tmp_path / name), "images").manifest["id_space"]
        for name in ("whole", "a/train", "a/val", "c/val", "b/val")
    ]
    assert [space == spaces[0] for space in spaces] == [True, True, True, True, False]


def test_a_class_too_rare_for_validation_is_named(tmp_path: Path) -> None:
    for number in range(10):
        save_image(tmp_path / "images" / f"{number}.png", seed=number)
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(10)]
    boxes = [{"id": n + 1, "image_id": n, "category_id": 6 if n == 4 else 5, "bbox": [1, 1, 4, 4]} for n in range(10)]
    save_coco(tmp_path, images, boxes, CATEGORIES)
    report = prepare(tmp_path, tmp_path / "out", val_fraction=0.2)
    assert report.not_in_val == ["class 6"] and report.splits["train"]["boxes_by_class"]["class 6"] == 1
    assert any("val" in line and line.endswith(": class 6") for line in report.lines())


def test_parts_do_not_change_the_rows(data_set: Path, tmp_path: Path) -> None:
    for options in ({}, {"val_fraction": 0.25}, {"duplicate_images": "drop"}):
        name = "-".join(options) or "plain"
        prepare(data_set, tmp_path / name / "parts", SMALL_PARTS, **options)
        prepare(data_set, tmp_path / name / "one", **options)
        for split in ("train", "val") if "val_fraction" in options else ("",):
            one, parts = tmp_path / name / "one" / split, tmp_path / name / "parts" / split
            assert rows_of(one) == rows_of(parts)
            assert len(open_table(str(one), "images").files) == 1
            assert len(open_table(str(parts), "images").files) > (1 if split == "val" else 4)
        for kind in ("rejected", "findings"):
            assert rows_of(tmp_path / name / "one" / f"__{kind}", kind) == rows_of(
                tmp_path / name / "parts" / f"__{kind}", kind
            )


@pytest.mark.usefixtures("ray_cluster")
def test_ray_tasks_write_the_same_bytes_as_threads(data_set: Path, tmp_path: Path) -> None:
    for options in ({}, {"val_fraction": 0.25, "image_storage": "reference"}):
        name = "-".join(options) or "plain"
        here = prepare(data_set, tmp_path / name / "here", SMALL_PARTS, use_ray=False, **options)
        there = prepare(data_set, tmp_path / name / "there", SMALL_PARTS, use_ray=True, **options)
        files = contents_below(tmp_path / name / "here")
        assert len(files) > 6 and files == contents_below(tmp_path / name / "there")
        assert {**vars(here), "out": "", "tables": {}} == {**vars(there), "out": "", "tables": {}}


@pytest.mark.usefixtures("ray_cluster")
def test_mistakes_in_ray_tasks_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    config = PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out"), use_ray=True)
    with pytest.raises(UserError, match=r"none of the 1 images .*empty file: 1"):
        prepare_images(config)
    assert not (tmp_path / "out").exists()


def test_an_image_that_changes_under_way_is_no_silent_mistake(data_set: Path, tmp_path: Path) -> None:
    folder = ImageFolderThatChanges(str(data_set / "images"))
    config = PrepareImagesConfig(
        images=str(data_set / "images"), out=str(tmp_path / "out"), val_fraction=0.5, num_threads=1
    )
    source = read_images(folder)
    with pytest.raises(RunError, match=r"05.png changed"):
        _prepare(config, lambda _: (source, folder))
    assert not (tmp_path / "out").exists()


class ImageFolderThatChanges(ImageFolder):
    """Folder in which one image has different content at each read."""

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        data = super().read(path, max_bytes=max_bytes)
        self.num_reads = getattr(self, "num_reads", 0) + 1
        return data if path != "05.png" else data + bytes([self.num_reads % 256])


def test_what_a_killed_split_leaves_is_cleaned(data_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare(data_set, out, val_fraction=0.25)
    before = contents_below(out)
    # The state after a kill between writing the manifests of val and train.
    (out / "train" / MANIFEST_NAME).unlink()
    report = prepare(data_set, out, val_fraction=0.25)
    assert not report.already_done and vars(report) == vars(first) and contents_below(out) == before
    # Another run in the same folder, without a split, removes those files.
    (out / "train" / MANIFEST_NAME).unlink()
    prepare(data_set, out)
    assert not (out / "train").exists() and len(rows_of(out)) == 38


def test_tables_of_others_below_out_are_never_touched(data_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(data_set, out / "val")
    before = contents_below(out)
    with pytest.raises(UserError, match=r"such as val/"):
        prepare(data_set, out, val_fraction=0.25)
    prepare(data_set, tmp_path / "whole")
    with pytest.raises(UserError, match=r"--val-fraction: None → 0.25"):
        prepare(data_set, tmp_path / "whole", val_fraction=0.25)
    # The record of a killed run without a split does not cover subfolders.
    shutil.copy(tmp_path / "whole" / RUN_FILE, out)
    with pytest.raises(UserError, match=r"such as val/"):
        prepare(data_set, out, val_fraction=0.25)
    (out / RUN_FILE).unlink()
    assert contents_below(out) == before


def test_a_split_needs_two_images(tmp_path: Path) -> None:
    save_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes((tmp_path / "in" / "a.png").read_bytes())
    config = PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out"), val_fraction=0.5)
    with pytest.raises(UserError, match=r"--val-fraction .* two .* found 1"):
        prepare_images(config)
    assert not (tmp_path / "out").exists()
    for fraction in (0.0, 1.0, -1.0, 15.0):
        with pytest.raises(UserError, match="--val-fraction"):
            PrepareImagesConfig(images="x", out="y", val_fraction=fraction)


@pytest.fixture
def many_images(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(1200):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((320, 240)).save(folder / f"{number:04d}.jpg")
    return folder


SLOW_TASKS = """
import sys, time
from raydet.preparation import prepare
from raydet.config import PrepareImagesConfig
config = PrepareImagesConfig(images=sys.argv[1], out=sys.argv[2], use_ray=True)
print(prepare._prepare(config, prepare._open_images, file_bytes=100_000).accepted, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_worker_that_is_killed_changes_nothing(many_images: Path, tmp_path: Path) -> None:
    expected = prepare_images(PrepareImagesConfig(images=str(many_images), out=str(tmp_path / "calm")))
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", SLOW_TASKS, str(many_images), str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        for pid in _first_workers(process, tmp_path / "out"):
            os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert output.splitlines()[-1] == str(expected.accepted) == "1200"
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "calm")


def _first_workers(process: "subprocess.Popen[str]", out: Path) -> Iterator[int]:
    """Yield one Ray worker of a process that has started to write."""
    import psutil

    deadline = time.monotonic() + 170
    while time.monotonic() < deadline and process.poll() is None:
        if list(out.glob("part-*.parquet")):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # the process has just exited
                    if "_work_on" in " ".join(child.cmdline()):
                        yield child.pid
                        return
        time.sleep(0.005)
    raise AssertionError("no worker was seen at work")


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_two_nodes_write_the_table_of_one(many_images: Path, tmp_path: Path) -> None:
    script = """
import sys, tempfile
import ray
from ray.cluster_utils import Cluster
from raydet.preparation import prepare
from raydet.config import PrepareImagesConfig
options = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**options, "temp_dir": tempfile.mkdtemp(prefix="rdt")})
cluster.add_node(**options)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
config = PrepareImagesConfig(images=sys.argv[1], out=sys.argv[2], val_fraction=0.2, use_ray=True)
report = prepare._prepare(config, prepare._open_images, file_bytes=100_000)
print(report.accepted, len(ray.nodes()), flush=True)
ray.shutdown()
cluster.shutdown()
"""
    prepare_images(PrepareImagesConfig(images=str(many_images), out=str(tmp_path / "one"), val_fraction=0.2))
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", script, str(many_images), str(tmp_path / "two")]
    for _ in range(3):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        # Some Ray processes must start within 15 s, which a busy machine may not manage.
        if "Timed out waiting for file" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["1200", "2"]
    for split in ("train", "val"):
        assert rows_of(tmp_path / "one" / split) == rows_of(tmp_path / "two" / split)


def test_shapes_in_several_files_are_those_in_one(tmp_path: Path) -> None:
    prepare_shapes(PrepareShapesConfig(out=str(tmp_path / "one"), num_train=12, num_val=3, image_size=32))
    config = PrepareShapesConfig(out=str(tmp_path / "parts"), num_train=12, num_val=3, image_size=32)
    report = prepare_shapes(config, file_bytes=5 * 32**2)
    assert len(open_table(f"{tmp_path}/parts/train", "images").files) == 3 and report.found == 15
    assert rows_of(tmp_path / "one" / "train") == rows_of(tmp_path / "parts" / "train")
    assert Counter(report.reasons) == Counter()
