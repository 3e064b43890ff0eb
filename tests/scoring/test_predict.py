"""Scoring writes one row per input row, whatever the images contain and however often the run is repeated."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydet import (
    EvaluateConfig,
    PlanConfig,
    PredictConfig,
    PrepareImagesConfig,
    UserError,
    evaluate,
    plan,
    predict,
    prepare_images,
)
from raydet.engines.torch_engine import TorchEngine
from raydet.images.decode import decode
from raydet.models.loading import build_detector, load_detector
from raydet.scoring.predict import PredictResult
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import Table, TableWriter, open_table
from tests.outcomes import RecordingConsole, assert_same_rows
from tests.small_sets import rows_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> str:
    """A tiny untrained model with the classes of the generated images."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    categories = open_table(str(shapes / "val"), "images").categories
    build_detector("rt_detr_v2_tiny", categories, image_size=64, seed=3).save(folder)
    return folder


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory, shapes: Path, checkpoint: str, ray_cluster: None
) -> tuple[PredictConfig, PredictResult]:
    """A finished run over 24 images, in four files."""
    out = str(tmp_path_factory.mktemp("scored") / "d")
    config = PredictConfig(checkpoint=checkpoint, data=str(shapes / "train"), out=out, batch_size=3, rows_per_file=6)
    return config, predict(config)


def test_every_image_has_its_row_and_the_rows_are_the_model_s(
    scored: tuple[PredictConfig, PredictResult], checkpoint: str
) -> None:
    config, result = scored
    assert (result.num_images, result.num_errors) == (24, 0)
    spaces = [open_table(uri, ("images", "detections")).manifest["id_space"] for uri in (config.data_uri, result.out)]
    assert spaces[0] == spaces[1]
    rows = {row["image_id"]: row for row in open_table(result.out, "detections").read().to_pylist()}
    images = open_table(config.data_uri, "images").read().to_pylist()
    assert sorted(rows) == sorted(image["image_id"] for image in images)
    engine = TorchEngine(load_detector(checkpoint))
    for image in images[:6]:
        found = engine.predict(engine.prepare([decode(image["image"]["bytes"], max_pixels=10**8)]))[0]
        row = rows[image["image_id"]]["detections"]
        np.testing.assert_allclose(row["score"], found.scores, atol=1e-5)
        np.testing.assert_allclose(row["bbox"][:5], found.boxes_xywh[:5], atol=1e-2)
        assert row["score"] == sorted(row["score"], reverse=True)
    assert evaluate(EvaluateConfig(truth=config.data_uri, detections=result.out)).result.num_images == 24


def test_running_again_does_what_is_left_and_then_nothing(
    scored: tuple[PredictConfig, PredictResult], tmp_path: Path
) -> None:
    config, first = dataclasses.replace(scored[0], out=str(tmp_path / "d")), scored[1]
    shutil.copytree(first.out, config.out)
    parts = sorted(Path(config.out).glob("part-*.parquet"))
    assert len(parts) == 4
    # The state after a kill: some files written, no manifest.
    (Path(config.out) / MANIFEST_NAME).unlink()
    for part in parts[:2]:
        part.unlink()
    kept = {part: part.stat().st_mtime_ns for part in parts[2:]}
    # A different --rows-per-file is ignored: the plan of the first run holds.
    console = RecordingConsole()
    again = predict(dataclasses.replace(config, rows_per_file=9), console=console)
    assert "resuming at 12 of 24 images" in console.lines
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert (again.num_images, again.num_detections) == (first.num_images, first.num_detections)
    assert_same_rows(rows_of(again.out, "detections"), rows_of(first.out, "detections"))
    assert predict(dataclasses.replace(config, num_workers=2)).already_done
    with pytest.raises(UserError, match=r"--score-threshold.*0\.0 → 0\.5"):
        predict(dataclasses.replace(config, score_threshold=0.5))


@pytest.mark.usefixtures("ray_cluster")
def test_a_limit_scores_the_first_images(
    scored: tuple[PredictConfig, PredictResult], shapes: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(scored[0], out=str(tmp_path / "d"), limit=6)
    result = predict(config)
    assert result.num_images == 6
    assert_same_rows(rows_of(result.out, "detections"), rows_of(scored[1].out, "detections")[:6])
    with pytest.raises(UserError, match=r"--limit.*6 → 9"):
        predict(dataclasses.replace(config, limit=9))
    # The report is the measurement of a plan.
    forecast = plan(PlanConfig(run=result.out, images=10_000_000))
    assert forecast.measured.num_images == 6 and forecast.total_s > 0 and not forecast.is_extrapolated


@pytest.mark.usefixtures("ray_cluster")
def test_awkward_images_in_the_table_and_beside_it_are_all_accounted_for(
    test_data: Path, shapes: Path, checkpoint: str, tmp_path: Path
) -> None:
    """Files that vanished or broke after the table was written keep their rows, with the reason."""
    folder = tmp_path / "images"
    shutil.copytree(test_data / "awkward", folder)
    config = PrepareImagesConfig(images=str(folder), out=str(tmp_path / "inline"), image_storage="inline")
    inline = prepare_images(config)
    assert inline.accepted + inline.rejected == inline.found == 29
    for number, row in enumerate(open_table(str(shapes / "val"), "images").read().to_pylist()):
        (folder / f"{number}.png").write_bytes(row["image"]["bytes"])
    config = dataclasses.replace(config, out=str(tmp_path / "beside"), image_storage="reference")
    beside = prepare_images(config)
    assert beside.accepted == inline.accepted + 10 and beside.accepted + beside.rejected == beside.found == 39
    (folder / "3.png").unlink()
    (folder / "4.png").write_bytes(b"\x89PNG broken")
    rows = [
        row for name in ("inline", "beside") for row in open_table(str(tmp_path / name), "images").read().to_pylist()
    ]
    with TableWriter(str(tmp_path / "both"), build_schema("images"), config_hash="x") as writer:
        writer.write_rows([{**row, "image_id": number} for number, row in enumerate(rows)])

    result = predict(PredictConfig(checkpoint=checkpoint, data=str(tmp_path / "both"), out=str(tmp_path / "d")))
    assert (result.num_images, result.num_errors) == (inline.accepted + beside.accepted, 2)
    found = open_table(result.out, "detections").read().to_pylist()
    assert sorted(row["image_id"] for row in found) == list(range(len(rows)))
    assert result.unreadable == {row["path"]: row["error"] for row in found if row["error"]}
    by_name = {row["path"].rpartition("/")[2]: row for row in found if row["image_id"] >= inline.accepted}
    assert by_name["3.png"]["error"] and not by_name["3.png"]["detections"]["score"]
    assert by_name["4.png"]["error"] and not by_name["4.png"]["detections"]["score"]
    assert by_name["5.png"]["error"] is None and by_name["5.png"]["detections"]["score"]


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
        message = "files that raydet did not write"
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
    from raydet.models.checkpoints import read_checkpoint

    found = read_checkpoint(checkpoint)
    assert found.model_type == "rt_detr_v2" and len(found.categories) == 3
    assert all(isinstance(category, Category) for category in found.categories)
