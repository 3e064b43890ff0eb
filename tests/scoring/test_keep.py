"""`predict --keep` stores the vectors of the queries that have a detection, the same however the images are divided."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
from PIL import Image, ImageEnhance

from raydet import (
    EvaluateConfig,
    ExportCocoConfig,
    PredictConfig,
    PrepareDetectionsConfig,
    SelectConfig,
    UserError,
    evaluate,
    export_coco,
    predict,
    prepare_detections,
    select,
)
from raydet.browsing.sources import open_sources
from raydet.config import BrowseConfig
from raydet.engines.torch_engine import TorchEngine
from raydet.models.loading import build_detector, load_detector
from raydet.scoring.predict import predict_with
from raydet.tables.kept.columns import KeptVectors
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.schema import build_schema
from raydet.tables.table import open_table
from tests.engines.test_kept_vectors import vary
from tests.outcomes import assert_same_rows
from tests.small_sets import rows_of

KEEP: Any = ["class_scores", "embedding"]
DIMENSION = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> PredictConfig:
    """A finished run with vectors over a folder of five images, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("keep")
    images = open_table(str(shapes / "train"), "images")
    detector = build_detector("conditional_detr_tiny", images.categories, image_size=64, seed=3)
    vary(detector)
    detector.save(str(folder / "checkpoint"))
    (folder / "images").mkdir()
    for number, row in enumerate(rows_of(images.uri)[:4]):  # in the order of their sizes, by which batches are made
        picture = Image.open(io.BytesIO(row["image"]["bytes"]))
        picture.crop((0, 0, 64, 40 + 8 * number)).save(folder / "images" / f"{number}.png")
    (folder / "images" / "2b.png").write_bytes(b"no image")
    run = PredictConfig(
        checkpoint=str(folder / "checkpoint"),
        data=str(folder / "images"),
        out=str(folder / "kept"),
        keep=KEEP,
        top_k=30,  # of 20 queries
        batch_size=2,
        rows_per_file=2,
        threads_per_worker=1,
    )
    predict_with(run, in_process=True)
    return run


def test_a_query_is_stored_once_and_each_detection_names_its_own(config: PredictConfig) -> None:
    table = open_table(config.out, "detections")
    rows = rows_of(config.out, "detections")
    assert [row["error"] is None for row in rows] == [True, True, True, False, True]
    several = 0
    for row in rows:
        found, queries = row["detections"], row["queries"]
        if row["error"]:
            assert found["query"] == [] and all(part == [] for part in queries.values())
            assert row["image_embedding"] is None
            continue
        assert len(row["image_embedding"]) == DIMENSION
        assert {len(part) for part in queries.values()} == {max(found["query"]) + 1}
        # In the order of their first detections, and each with one.
        assert list(dict.fromkeys(found["query"])) == list(range(len(queries["bbox"])))
        assert [queries["bbox"][query] for query in found["query"]] == found["bbox"]
        classes = zip(found["query"], found["category"], strict=True)
        scores = [queries["class_scores"][query][category] for query, category in classes]
        np.testing.assert_allclose(scores, found["score"], rtol=1e-3)
        assert len({tuple(vector) for vector in queries["embedding"]}) == len(queries["embedding"])
        several += len(found["query"]) - len(queries["bbox"])
    assert several > 0
    assert KeptVectors.of_table(table.schema, table.uri) == KeptVectors(
        class_scores="sigmoid", num_classes=3, dimension=DIMENSION
    )
    content = json.loads(table.schema.metadata[b"raydet"])
    assert content["class_scores"] == {"kind": "sigmoid", "dimension": 3}
    assert content["embedding"] == {"dimension": DIMENSION}


def test_the_vectors_are_the_engine_s(config: PredictConfig) -> None:
    engine = TorchEngine(load_detector(config.checkpoint or ""), keep=KEEP)
    picture = np.array(Image.open(Path(config.data_uri) / "3.png").convert("RGB"))
    (found,) = engine.predict(engine.prepare([picture]))
    best = found.take(np.arange(30)).with_used_queries()
    row = rows_of(config.out, "detections")[4]
    assert best.vectors is not None and best.queries is not None
    assert row["detections"]["query"] == best.queries.tolist()
    for stored, kept in (
        (row["queries"]["embedding"], best.vectors.embedding),
        (row["queries"]["class_scores"], best.vectors.class_scores),
        (row["image_embedding"], best.vectors.image_embedding),
    ):
        assert kept is not None
        np.testing.assert_allclose(stored, kept, atol=2e-3)


def test_other_files_and_a_kill_leave_the_same_rows(config: PredictConfig, tmp_path: Path) -> None:
    rows = rows_of(config.out, "detections")
    run = dataclasses.replace(config, out=str(tmp_path / "d"), rows_per_file=4, keep=KEEP[::-1])
    predict_with(run, in_process=True)
    assert_same_rows(rows_of(run.out, "detections"), rows)
    (Path(run.out) / MANIFEST_NAME).unlink()
    min(Path(run.out).glob("part-*.parquet")).unlink()
    with pytest.raises(UserError, match="--keep"):
        predict(dataclasses.replace(run, keep=["embedding"]))
    assert not predict(run).already_done
    assert_same_rows(rows_of(run.out, "detections"), rows)


def test_without_it_the_table_has_no_further_column_and_the_detections_are_equal(
    config: PredictConfig, tmp_path: Path
) -> None:
    run = dataclasses.replace(config, out=str(tmp_path / "d"), keep=None)
    predict_with(run, in_process=True)
    assert open_table(run.out).schema.equals(build_schema("detections"))
    for plain, kept in zip(rows_of(run.out, "detections"), rows_of(config.out, "detections"), strict=True):
        assert plain == {name: kept[name] for name in plain} | {
            "detections": {name: kept["detections"][name] for name in ("bbox", "score", "category")}
        }


def test_a_thumbnail_is_the_image_at_8_by_8_pixels_whatever_merges_the_boxes(
    config: PredictConfig, tmp_path: Path
) -> None:
    keep: Any = ["thumbnail"]
    run = dataclasses.replace(config, out=str(tmp_path / "d"), keep=keep, tile=64, flip=True)
    predict_with(run, in_process=True)
    table = open_table(run.out)
    assert table.schema.names == [*build_schema("detections").names, "thumbnail"]
    rows = table.read().to_pylist()
    assert [row["thumbnail"] is None for row in rows] == [row["error"] is not None for row in rows]
    picture = np.array(Image.open(Path(config.data_uri) / "0.png").convert("RGB"), float)  # of 40 × 64 pixels
    means = picture.reshape(8, 5, 8, 8, 3).mean(axis=(1, 3))
    found = np.reshape(rows[0]["thumbnail"], (8, 8, 3))
    np.testing.assert_allclose(found.mean(axis=(0, 1)), means.mean(axis=(0, 1)), atol=4)
    assert np.corrcoef(found.reshape(-1), means.reshape(-1))[0, 1] > 0.99


def test_near_duplicates_are_found_by_their_thumbnails_without_a_model_that_knows_them(
    config: PredictConfig, shapes: Path, tmp_path: Path
) -> None:
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows_of(shapes / "train")[:8]]
    (tmp_path / "images").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "images" / f"{number}.png")
    small = pictures[1].resize((picture.width // 2, picture.height // 2))
    contrast = ImageEnhance.Contrast(pictures[2]).enhance(0.7)
    ImageEnhance.Brightness(pictures[0]).enhance(0.8).save(tmp_path / "images" / "8.jpg", quality=60)
    small.save(tmp_path / "images" / "9.jpg", quality=90)
    contrast.save(tmp_path / "images" / "a.webp", quality=60)
    data = str(tmp_path / "images")
    keep: Any = ["thumbnail", "embedding"]
    run = dataclasses.replace(config, data=data, out=str(tmp_path / "d"), keep=keep, reduced_decode=True)
    predict_with(run, in_process=True)
    result = select(SelectConfig(detections=run.out, near_duplicates=True, out=str(tmp_path / "found")))
    found = rows_of(result.table, "near_duplicates")
    assert [(row["image_id"], row["duplicate_of"]) for row in found] == [(8, 0), (9, 1), (10, 2)]
    assert all(0.95 < row["similarity"] <= 1.0001 for row in found)


@pytest.mark.parametrize("keep", ["class_scores", "embedding"])
def test_one_kind_alone_and_images_without_a_detection(config: PredictConfig, tmp_path: Path, keep: Any) -> None:
    run = dataclasses.replace(config, out=str(tmp_path / "d"), keep=[keep], score_threshold=0.999)
    predict_with(run, in_process=True)
    table = open_table(run.out)
    assert [field.name for field in table.schema.field("queries").type] == ["bbox", keep]
    assert ("image_embedding" in table.schema.names) == (keep == "embedding")
    rows = table.read().to_pylist()
    assert all(row["queries"]["bbox"] == [] == row["detections"]["query"] for row in rows)
    if keep == "embedding":
        assert sum(row["image_embedding"] is not None for row in rows) == 4


def test_every_command_goes_on_with_such_a_table(config: PredictConfig, shapes: Path, tmp_path: Path) -> None:
    run = dataclasses.replace(config, data=str(shapes / "train"), out=str(tmp_path / "d"))
    predict_with(run, in_process=True)
    plain = dataclasses.replace(run, out=str(tmp_path / "plain"), keep=None)
    predict_with(plain, in_process=True)
    kept, other = (evaluate(EvaluateConfig(truth=run.data_uri, detections=out)).result for out in (run.out, plain.out))
    assert kept == other
    labels = PrepareDetectionsConfig(detections=run.out, data=run.data_uri, out=str(tmp_path / "labels"), threshold=0.1)
    assert prepare_detections(labels)
    export_coco(ExportCocoConfig(data=run.out, out=str(tmp_path / "found.json")))
    assert len(json.loads((tmp_path / "found.json").read_text())) == 24 * 30
    assert open_sources(BrowseConfig(data=run.out)).runs[0].scored is not None
    assert " boxes</td>" in open_table(run.out)._repr_html_()


def test_other_programs_read_the_vectors(config: PredictConfig, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    rows = rows_of(config.out, "detections")
    ((count, longest),) = duckdb.sql(
        f"SELECT sum(len(queries.embedding)), max(len(image_embedding)) FROM '{config.out}/part-*.parquet'"
    ).fetchall()
    assert (count, longest) == (sum(len(row["queries"]["embedding"]) for row in rows), DIMENSION)
    read = pyarrow.dataset.dataset(config.out, format="parquet").to_table().to_pylist()
    assert [row["queries"] for row in read] == [row["queries"] for row in rows]
    script = """
import sys
import numpy
from datasets import load_dataset
rows = load_dataset("parquet", data_dir=sys.argv[1], split="train")
assert rows.features["image_embedding"].feature.dtype == "float16", rows.features
assert rows.features["queries"]["embedding"].feature.length == 32, rows.features
assert numpy.array(rows[0]["queries"]["class_scores"]).shape[1] == 3
assert len(rows[0]["image_embedding"]) == 32 and rows[3]["image_embedding"] is None
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, config.out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"engine": "openvino"}, "--engine openvino: it needs --engine torch"),
        ({"engine": "onnx"}, "--engine onnx"),
        ({"tile": 64}, "--tile, which merges"),
        ({"flip": True}, "--flip, which merges"),
        ({"compile": True}, "--compile: only class_scores"),
        ({"checkpoint": None, "model": "m", "labels": ["cat"]}, "--model: it needs a trained detector"),
    ],
)
def test_what_merges_boxes_or_has_no_vectors_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        PredictConfig(**{"checkpoint": "c", "data": "d", "out": "o", "keep": KEEP, **options})
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_have_no_table_for_vectors(config: PredictConfig) -> None:
    picture = str(Path(config.data_uri) / "0.png")
    with pytest.raises(UserError, match="--keep cannot be combined with pictures"):
        predict(PredictConfig(checkpoint=config.checkpoint, data=picture, keep=KEEP))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_writes_the_same_rows(config: PredictConfig, tmp_path: Path) -> None:
    run = dataclasses.replace(config, out=str(tmp_path / "d"))
    predict_with(run, in_process=False)
    assert_same_rows(rows_of(run.out, "detections"), rows_of(config.out, "detections"))
