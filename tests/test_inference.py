"""Scoring: one row out for each row in, whatever is in them and however often it is run again."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydet import EvaluateConfig, PredictConfig, PrepareImagesConfig, UserError, evaluate, predict, prepare_images
from raydet.collate import Example, collate
from raydet.decode import decode
from raydet.geometry import resize
from raydet.models import build_detector, load_detector
from raydet.schema import Category
from raydet.tables import MANIFEST_NAME, Table, open_table


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> str:
    """A tiny untrained model that knows the classes of the generated pictures."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    categories = open_table(str(shapes / "val"), "images").categories
    build_detector("rt_detr_v2_tiny", categories, image_size=64, seed=3).save(folder)
    return folder


@pytest.mark.usefixtures("ray_cluster")
def test_every_image_has_its_row_and_the_rows_are_the_model_s(shapes: Path, checkpoint: str, tmp_path: Path) -> None:
    config = PredictConfig(checkpoint=checkpoint, data=str(shapes / "train"), out=str(tmp_path / "d"), batch_size=5)
    result = predict(config)
    assert (result.num_images, result.num_errors) == (24, 0)
    rows = {row["image_id"]: row for row in open_table(result.out, "detections").read().to_pylist()}
    images = open_table(config.data, "images").read().to_pylist()
    assert sorted(rows) == sorted(image["image_id"] for image in images)
    detector = load_detector(checkpoint)
    for image in images[:6]:
        pixels = decode(image["image"]["bytes"], max_pixels=10**8)
        size_hw = (pixels.shape[0], pixels.shape[1])
        rule = detector.resize_rule
        resized = resize(pixels, rule.target_size_hw(size_hw), rule.resample)
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        found = detector.predict(collate([Example(0, resized, size_hw, *nothing)]))[0]
        row = rows[image["image_id"]]["detections"]
        np.testing.assert_allclose(row["score"], found.scores, atol=1e-5)
        np.testing.assert_allclose(row["bbox"][:5], found.boxes_xywh[:5], atol=1e-2)
        assert row["score"] == sorted(row["score"], reverse=True)
    assert evaluate(EvaluateConfig(truth=config.data, detections=result.out)).result.num_images == 24


@pytest.mark.usefixtures("ray_cluster")
def test_running_again_does_what_is_left_and_then_nothing(shapes: Path, checkpoint: str, tmp_path: Path) -> None:
    config = PredictConfig(
        checkpoint=checkpoint,
        data=str(shapes / "train"),
        out=str(tmp_path / "d"),
        batch_size=3,
        rows_per_file=6,
        score_threshold=0.01,
    )
    first = predict(config)
    parts = sorted(Path(first.out).glob("part-*.parquet"))
    assert len(parts) == 4
    # As a kill leaves it: some files written, no manifest.
    (Path(first.out) / MANIFEST_NAME).unlink()
    for part in parts[:2]:
        part.unlink()
    kept = {part: part.stat().st_mtime_ns for part in parts[2:]}
    # Another number of rows would cut the work anew: the plan of the first run holds.
    again = predict(dataclasses.replace(config, rows_per_file=9))
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert (again.num_images, again.num_detections) == (first.num_images, first.num_detections)
    ids = open_table(again.out, "detections").read(["image_id"])["image_id"].to_pylist()
    assert sorted(ids) == list(range(24))
    assert predict(dataclasses.replace(config, num_workers=2)).already_done
    with pytest.raises(UserError, match=r"another run \(score_threshold: 0.01 → 0.5\)"):
        predict(dataclasses.replace(config, score_threshold=0.5))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("storage", ["inline", "reference"])
def test_awkward_images_are_all_accounted_for(test_data: Path, checkpoint: str, tmp_path: Path, storage: str) -> None:
    config = PrepareImagesConfig(images=str(test_data / "awkward"), out=str(tmp_path / "t"), image_storage=storage)  # type: ignore[arg-type]
    report = prepare_images(config)
    assert report.accepted + report.rejected == report.found == 29
    result = predict(PredictConfig(checkpoint=checkpoint, data=str(tmp_path / "t"), out=str(tmp_path / "d")))
    assert (result.num_images, result.num_errors) == (report.accepted, 0)


@pytest.mark.usefixtures("ray_cluster")
def test_an_image_that_became_unreadable_keeps_its_row_with_the_reason(
    shapes: Path, checkpoint: str, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, row in enumerate(open_table(str(shapes / "val"), "images").read().to_pylist()):
        (folder / f"{number}.png").write_bytes(row["image"]["bytes"])
    prepare_images(PrepareImagesConfig(images=str(folder), out=str(tmp_path / "t"), image_storage="reference"))
    (folder / "3.png").unlink()
    (folder / "4.png").write_bytes(b"\x89PNG broken")
    result = predict(PredictConfig(checkpoint=checkpoint, data=str(tmp_path / "t"), out=str(tmp_path / "d")))
    assert (result.num_images, result.num_errors) == (10, 2)
    rows = {row["image_id"]: row for row in open_table(result.out, "detections").read().to_pylist()}
    assert rows[3]["error"] == "the file is not there any more"
    assert rows[4]["error"] and not rows[4]["detections"]["score"]
    assert rows[5]["error"] is None and rows[5]["detections"]["score"]


@pytest.mark.parametrize("case", ["no folder", "no model", "no weights", "no table", "other version", "other files"])
def test_mistakes_are_found_before_anything_is_written(
    shapes: Path, checkpoint: str, tmp_path: Path, case: str
) -> None:
    data, model, out = str(shapes / "val"), checkpoint, tmp_path / "d"
    empty = tmp_path / "empty"
    empty.mkdir()
    if case == "no folder":
        model, message = str(tmp_path / "absent"), "no such checkpoint"
    elif case == "no model":
        model, message = str(empty), "holds no model"
    elif case == "no weights":
        (empty / "config.json").write_text('{"model_type": "detr"}')
        model, message = str(empty), "no model weights"
    elif case == "no table":
        data, message = str(tmp_path / "absent"), "no such path"
    elif case == "other version":
        data, message = str(_of_another_version(open_table(data, "images"), tmp_path / "old")), "schema version 0"
    else:
        out.mkdir()
        (out / "letter.txt").write_text("dear")
        message = "no detections of raydet"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        predict(PredictConfig(checkpoint=model, data=data, out=str(out)))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def _of_another_version(table: Table, folder: Path) -> Path:
    folder.mkdir()
    for name in table.files:
        pq.write_table(pq.read_table(Path(table.uri) / name), folder / name)
    (folder / MANIFEST_NAME).write_text(json.dumps({**table.manifest, "schema_version": 0}))
    return folder


def test_categories_of_a_checkpoint_are_read_without_torch(checkpoint: str) -> None:
    from raydet.checkpoints import read_checkpoint

    found = read_checkpoint(checkpoint)
    assert found.model_type == "rt_detr_v2" and len(found.categories) == 3
    assert all(isinstance(category, Category) for category in found.categories)
