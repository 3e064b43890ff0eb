"""Vectors in a stranger's detections table are checked like everything else in it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raydet.common.errors import UserError
from raydet.tables.kept.columns import KeptVectors
from raydet.tables.kept.thumbnails import THUMBNAIL_FIELD
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table

CATEGORIES = (Category(3, "cat"), Category(7, "dog"))
KEPT = KeptVectors(class_scores="softmax", num_classes=2, dimension=3)
BOX = [0.0, 0.5, 1.0, 2.0]


def row(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"bbox": [BOX, BOX], "score": [0.5, 0.25], "category": [1, 0], "query": [0, 0]}
    queries = {"bbox": [BOX], "class_scores": [[0.25, 0.5]], "embedding": [[1.0, -2.0, 65504.0]]}
    return {
        "image_id": 1,
        "path": "1.jpg",
        "width": 4,
        "height": 3,
        "detections": {**found, **changes.pop("detections", {})},
        "queries": {**queries, **changes.pop("queries", {})},
        "image_embedding": [1.0, 2.0, 3.0],
        "error": None,
        **changes,
    }


def write(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> str:
    with TableWriter(str(folder), schema or KEPT.schema(CATEGORIES, {}), config_hash="0" * 12) as writer:
        writer.write_rows(rows)
    return str(folder)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    nothing = row(image_id=2, image_embedding=None)
    for name in ("detections", "queries"):
        nothing[name] = {key: [] for key in nothing[name]}
    rows = [row(), nothing]
    table = open_table(write(tmp_path, rows))
    assert table.read().to_pylist() == rows
    assert KeptVectors.of_table(table.schema, table.uri) == KEPT
    assert [len(batch.column("queries")) for batch in table.iter_batches(["queries"], batch_size=1)] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"detections": {"query": [0, 1]}}, "names a query that its row does not have"),
        ({"detections": {"query": [0, -1]}}, "names a query"),
        ({"detections": {"query": [0]}}, "differ in length"),
        ({"queries": {"bbox": []}}, "differ in length"),
        ({"queries": {"bbox": [[0.0, 0.0, float("nan"), 1.0]]}}, "not finite"),
        ({"queries": {"bbox": [[0.0, 0.0, -1.0, 1.0]]}}, "negative"),
        ({"queries": {"class_scores": [[0.5, 1.01]]}}, "outside 0 … 1"),
        ({"queries": {"class_scores": [[0.5, -0.01]]}}, "outside 0 … 1"),
        ({"queries": {"class_scores": [[0.5, float("nan")]]}}, "NaN"),
        ({"queries": {"embedding": [[0.5, float("inf"), 0.0]]}}, "infinite"),
        ({"image_embedding": [0.5, float("-inf"), 0.0]}, "infinite"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    table = open_table(write(tmp_path, [row(**changes)]))
    with pytest.raises(UserError) as caught:
        table.read()
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        KeptVectors(class_scores="sigmoid", num_classes=5).schema(CATEGORIES, {}),
        build_schema("detections", CATEGORIES, extra_fields=KEPT.fields(), with_queries=True),
        build_schema("detections", CATEGORIES, extra_fields=[pa.field("queries", pa.int64())]),
        KEPT.schema(CATEGORIES, {}).with_metadata(
            build_schema("detections", CATEGORIES, extra_metadata={"class_scores": {"kind": "tanh"}}).metadata
        ),
        KEPT.schema(CATEGORIES, {}).with_metadata(
            build_schema("detections", CATEGORIES, extra_metadata={"embedding": {"dimension": 10**9}}).metadata
        ),
    ],
    ids=["other length", "no metadata", "no struct", "unknown kind", "too long"],
)
def test_columns_that_contradict_the_metadata_are_refused(tmp_path: Path, schema: pa.Schema) -> None:
    uri = write(tmp_path, [], schema)
    with pytest.raises(UserError, match="is damaged"):
        open_table(uri)


def test_thumbnails_of_another_form_are_refused(tmp_path: Path) -> None:
    damaged = build_schema("detections", CATEGORIES, extra_fields=[pa.field("thumbnail", pa.list_(pa.uint8()))])
    with pytest.raises(UserError, match="the column thumbnail has the type list"):
        open_table(write(tmp_path / "list", [], damaged))
    pixels: list[int | None] = [0] * 191
    found: dict[str, Any] = {"bbox": [], "score": [], "category": []}
    schema = build_schema("detections", CATEGORIES, extra_fields=[THUMBNAIL_FIELD])
    table = open_table(write(tmp_path / "null", [row(detections=found, thumbnail=[*pixels, None])], schema))
    with pytest.raises(UserError, match="thumbnail has pixels that are null"):
        table.read()
