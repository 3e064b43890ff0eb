"""Other programs open the tables, with class names: pandas, DuckDB and datasets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest

from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter
from tests.command_lines import blocks_of
from tests.small_sets import rows_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.fixture(scope="module")
def tables(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the images table `data/val` and its detections `detections`, one per object, named in index order."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "data").mkdir()
    (folder / "data" / "val").symlink_to(shapes / "val")
    categories = [Category(3, "rectangle"), Category(1, "ellipse"), Category(2, "it's a triangle")]
    with TableWriter(str(folder / "detections"), build_schema("detections", categories), config_hash="x") as writer:
        for row in rows_of(shapes / "val"):
            found: dict[str, Any] = {key: row["objects"][key] for key in ("bbox", "category")}
            found["score"] = [0.5] * len(found["category"])
            size = {key: row[key] for key in ("image_id", "width", "height")}
            writer.write_rows([{**size, "path": row["image"]["path"], "detections": found}])
    return folder


def test_pandas(tables: Path) -> None:
    for name, column in (("data/val", "objects"), ("detections", "detections")):
        frame = pandas.read_parquet(tables / name)
        assert len(frame) == 10 and len(frame[column][0]["bbox"]) == len(frame[column][0]["category"])
    names = [item["name"] for item in json.loads(_metadata(tables / "detections"))["categories"]]
    assert names == ["rectangle", "ellipse", "it's a triangle"]


def _metadata(folder: Path) -> bytes:
    return bytes(pq.read_schema(next(folder.glob("*.parquet"))).metadata[b"raydet"])


def test_the_documented_query_names_the_classes(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.chdir(tables)
    (query,) = blocks_of(DOCUMENT, "sql")
    counts = dict(duckdb.sql(query).fetchall())
    boxes = [
        category for row in rows_of(tables / "detections", "detections") for category in row["detections"]["category"]
    ]
    names = ["rectangle", "ellipse", "it's a triangle"]
    assert counts == {names[category]: boxes.count(category) for category in set(boxes)}


def test_datasets(tables: Path, tmp_path: Path) -> None:
    script = """
import sys
from datasets import load_dataset
for name, column in (("data/val", "objects"), ("detections", "detections")):
    # The whole folder, with the manifest, the record of the run, and the tables of rejected images and findings.
    rows = load_dataset("parquet", data_dir=f"{sys.argv[1]}/{name}", split="train")
    assert len(rows) == 10 and len(rows.features[column]["category"].feature.names) == 3, rows.features
    assert len(rows[0][column]["bbox"]) == len(rows[0][column]["category"])
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tables)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_pyarrow_skips_what_is_no_part_of_a_table(tables: Path) -> None:
    import pyarrow.dataset

    names = {path.name for path in (tables / "data" / "val").iterdir()}
    assert {".manifest.json", ".run.json", "__rejected", "__findings"} <= names
    assert pyarrow.dataset.dataset(str(tables / "data" / "val"), format="parquet").count_rows() == 10
