"""Matching shard by shard, locally or on a cluster, is identical to matching in one piece."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import raydet.measuring.shards
from raydet.common.errors import UserError
from raydet.config import EvaluateConfig
from raydet.measuring.detections import read_detections
from raydet.measuring.evaluate import evaluate
from raydet.measuring.numbers.matches import COCO, Protocol
from raydet.measuring.numbers.matching import match
from raydet.measuring.numbers.metrics import accumulate
from raydet.measuring.shards import measure_shards
from raydet.measuring.truth import read_truth
from raydet.tables.schema import Category, TableKind, build_schema
from raydet.tables.table import TableWriter, open_table
from tests.measuring.test_evaluate import Row, numbers, results_to_rows, write_images

CATEGORIES = [Category(1, "cat"), Category(2, "dog")]


def write_in_groups(folder: Path, rows: list[Row], rows_per_group: int) -> None:
    """Write a detections table with several row groups."""
    with TableWriter(str(folder), build_schema("detections", CATEGORIES), config_hash="x") as writer:
        for start in range(0, len(rows), rows_per_group):
            writer.write_rows(rows[start : start + rows_per_group])
            writer.flush()


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    generator = np.random.default_rng(7)
    truth: list[Row] = []
    results: list[Row] = []
    for image_id in generator.permutation(60).tolist():
        boxes = np.round(generator.uniform(1, 120, (generator.integers(0, 5), 4)), 1)
        category = generator.integers(0, 2, len(boxes))
        objects = {
            "id": [*range(len(boxes))],
            "bbox": boxes.tolist(),
            "category": category.tolist(),
            "area": (boxes[:, 2] * boxes[:, 3]).tolist(),
            "iscrowd": (generator.random(len(boxes)) < 0.1).tolist(),
        }
        truth.append({"image_id": image_id, "width": 300, "height": 300, "objects": objects})
        for box, label in zip(boxes.tolist(), category.tolist(), strict=True):
            for shift in generator.normal(0, 4, 3).tolist():
                score = float(generator.integers(0, 11)) / 10
                found = [box[0] + shift, box[1], box[2], box[3]]
                results.append({"image_id": image_id, "category_id": label + 1, "bbox": found, "score": score})
    write_images(tmp_path / "truth", truth, CATEGORIES)
    rows = results_to_rows(results, truth, CATEGORIES)
    rows[0] = {**rows[0], "detections": {"bbox": [], "score": [], "category": []}, "error": "truncated file"}
    write_in_groups(tmp_path / "found", rows[::-1], 7)
    return EvaluateConfig(truth=str(tmp_path / "truth"), detections=str(tmp_path / "found"), ray_address="local")


@pytest.mark.parametrize("protocol", [COCO, Protocol(class_agnostic=True, max_detections=(1, 5))])
@pytest.mark.parametrize("num_shards", [None, 1, 3, 99])
def test_shards_are_the_whole_to_the_last_bit(
    config: EvaluateConfig, num_shards: int | None, protocol: Protocol
) -> None:
    truth = read_truth(config.truth)
    whole = read_detections(config.detections, truth)
    expected = accumulate(
        match(whole.truth_columns, whole.columns, len(truth.categories), protocol),
        () if protocol.class_agnostic else truth.categories,
        num_detections=whole.num_detections,
        num_unreadable=len(whole.errors),
    )
    scored, result = measure_shards(
        dataclasses.replace(config, ray_address=None, num_shards=num_shards), truth, protocol
    )
    assert result.AR1 is not None and 0 < result.AR1 < 1
    assert result == expected
    assert np.array_equal(result.precision, expected.precision)
    assert np.array_equal(result.recall, expected.recall)
    assert (scored.errors, scored.truth_rows.tolist()) == (whole.errors, whole.truth_rows.tolist())


def test_shards_hold_about_as_many_bytes_and_every_row_group_once(config: EvaluateConfig) -> None:
    table = open_table(config.detections, "detections")
    groups = table.row_groups()
    for num_shards in (1, 2, 4, 1000):
        shards = raydet.measuring.shards._row_groups(table, num_shards)
        assert [group for shard in shards for group in shard] == list(groups)
        assert min(num_shards, len(groups) // 2) <= len(shards) <= min(num_shards, len(groups))
    most_bytes = max(group.num_bytes for group in groups)
    shards = raydet.measuring.shards._row_groups(table, None, bytes_per_shard=2 * most_bytes)
    sizes = [sum(group.num_bytes for group in shard) for shard in shards]
    assert len(sizes) > 2
    assert max(sizes) <= 3 * most_bytes


def test_nothing_is_left_in_the_folder_for_temporary_files(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    here = dataclasses.replace(config, ray_address=None)
    assert evaluate(here).result.num_detections > 0
    (Path(config.detections) / "part-00000.parquet").write_bytes(b"no Parquet")
    with pytest.raises(UserError, match="damaged"):
        evaluate(here)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("num_shards", [None, 1, 4])
def test_the_numbers_are_those_of_one_process(
    config: EvaluateConfig, ray_cluster: None, num_shards: int | None
) -> None:
    here = evaluate(dataclasses.replace(config, ray_address=None))
    there = evaluate(dataclasses.replace(config, num_shards=num_shards))
    assert numbers(there) == numbers(here)
    assert there.result == here.result
    assert there.result.num_unreadable == 1
    assert there.lines() == here.lines()


def test_they_can_be_verified(config: EvaluateConfig, ray_cluster: None) -> None:
    found = evaluate(dataclasses.replace(config, verify=True)).verification
    assert found is not None and found.differing == () and found.num_images == 60


def test_the_tables_are_those_of_one_process(config: EvaluateConfig, ray_cluster: None, tmp_path: Path) -> None:
    for name, address in {"here": None, "there": "local"}.items():
        evaluate(dataclasses.replace(config, ray_address=address, out=str(tmp_path / name), bootstrap=20, run="r"))
    kinds: tuple[TableKind, ...] = ("metrics", "per_image", "errors", "confusion", "suspects")
    for kind in kinds:
        here, there = (open_table(str(tmp_path / name / kind), kind).read() for name in ("here", "there"))
        assert here.num_rows > 0
        assert here.equals(there)


def test_mistakes_get_the_same_line(config: EvaluateConfig, ray_cluster: None, tmp_path: Path) -> None:
    rows = open_table(config.detections, "detections").read().to_pylist()
    spoiled = {
        "missing": rows[1:],
        "unknown": [*rows, {**rows[0], "image_id": 999}],
        "repeated": [*rows, rows[0]],
        "negative": [{**rows[0], "detections": {"bbox": [[0, 0, -1, 1]], "score": [0.5], "category": [0]}}, *rows[1:]],
    }
    for name, content in spoiled.items():
        write_in_groups(tmp_path / name, content, 7)
        messages = []
        for address in (None, "local"):
            with pytest.raises(UserError) as caught:
                evaluate(dataclasses.replace(config, detections=str(tmp_path / name), ray_address=address))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert "\n" not in messages[0]


def test_what_both_sides_have_can_be_measured(config: EvaluateConfig, ray_cluster: None, tmp_path: Path) -> None:
    rows = open_table(config.detections, "detections").read().to_pylist()
    write_in_groups(tmp_path / "some", [*rows[20:], {**rows[0], "image_id": 999}], 7)
    partial = dataclasses.replace(config, detections=str(tmp_path / "some"), allow_partial=True)
    here, there = evaluate(dataclasses.replace(partial, ray_address=None)), evaluate(partial)
    assert there.result == here.result
    assert (there.num_left_out, there.result.num_images) == (here.num_left_out, 40) == (21, 40)


def test_json_is_not_for_clusters(config: EvaluateConfig, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="--ray-address"):
        evaluate(dataclasses.replace(config, detections=str(tmp_path / "results.json")))
