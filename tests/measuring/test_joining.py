"""Detections are measured only against labels of the same images."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydet.common.errors import UserError
from raydet.config import CompareConfig, EvaluateConfig
from raydet.measuring.compare import compare
from raydet.measuring.evaluate import evaluate
from raydet.measuring.joining import ImageKeys, join_images
from raydet.tables.schema import Category, TableKind, build_schema
from raydet.tables.table import TableWriter

Row = dict[str, Any]
CATEGORIES = [Category(1, "cat")]
NUM_IMAGES = 6


def write_table(folder: Path, kind: TableKind, rows: list[Row], id_space: str | None) -> str:
    with TableWriter(str(folder), build_schema(kind, CATEGORIES), config_hash="x") as writer:
        writer.extra = {"id_space": id_space}
        for start in range(0, len(rows), 2):
            writer.write_rows(rows[start : start + 2])
            writer.flush()
    return str(folder)


def truth_rows() -> list[Row]:
    objects = {"id": [1], "bbox": [[10.0, 10, 20, 20]], "category": [0], "area": [400.0], "iscrowd": [False]}
    common = {"width": 100, "height": 80, "objects": objects}
    return [
        {"image_id": number, "image": {"bytes": None, "path": f"val/{number % 2}/{number}.jpg"}, **common}
        for number in range(NUM_IMAGES)
    ]


def found_rows() -> list[Row]:
    """Return detections in the same images, correct in all but the last."""
    rows = []
    for number in range(NUM_IMAGES):
        box = [10.0, 10, 20, 20] if number < NUM_IMAGES - 1 else [60.0, 60, 20, 20]
        found = {"bbox": [box], "score": [0.5 + number / 20], "category": [0]}
        size = {"width": 100, "height": 80}
        path = f"val/{number % 2}/{number}.jpg"
        rows.append({"image_id": number, "path": path, **size, "detections": found, "error": None})
    return rows


def same(rows: list[Row]) -> list[Row]:
    return rows


def moved(rows: list[Row]) -> list[Row]:
    return [{**row, "path": row["path"].replace("val/", "/data/validation/")} for row in rows]


def shifted(rows: list[Row]) -> list[Row]:
    return [{**row, "image_id": row["image_id"] + 1} for row in rows]


def renumbered(rows: list[Row]) -> list[Row]:
    return [{**row, "image_id": 100 - row["image_id"]} for row in moved(rows)]


def other_images(rows: list[Row]) -> list[Row]:
    return [{**row, "path": f"val/0/other{row['image_id']}.jpg"} for row in rows]


def one_renamed(rows: list[Row]) -> list[Row]:
    return [{**row, "path": "val/0/4b.jpg" if row["image_id"] == 4 else row["path"]} for row in rows]


def other_folder_for_one(rows: list[Row]) -> list[Row]:
    return [{**row, "path": row["path"].replace("val/", "x/") if row["image_id"] == 2 else row["path"]} for row in rows]


def resized(rows: list[Row]) -> list[Row]:
    return [{**row, "width": 99 if row["image_id"] == 3 else 100} for row in rows]


def no_paths(rows: list[Row]) -> list[Row]:
    return [{**row, "path": None} for row in rows]


def config(
    folder: Path,
    change: Callable[[list[Row]], list[Row]] = same,
    id_spaces: tuple[str | None, str | None] = (None, None),
    **options: Any,
) -> EvaluateConfig:
    truth = write_table(folder / "truth", "images", truth_rows(), id_spaces[0])
    found = write_table(folder / "found", "detections", change(found_rows()), id_spaces[1])
    return EvaluateConfig(truth=truth, detections=found, bootstrap=0, **options)


def both_ways(config: EvaluateConfig) -> list[EvaluateConfig]:
    """Return the config without and with `out`: matched in shards, and in one piece as tables require."""
    return [config, dataclasses.replace(config, out=f"{config.detections}-out")]


@pytest.mark.parametrize("allow_partial", [False, True])
@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (other_images, ["6 of the 6", "image 0", "image 1", "image 2", "val/1/1.jpg", "other1.jpg", "--join path"]),
        (shifted, ["5 of the 5", "image 1", "--join path"]),
        (one_renamed, ["1 of the 6", "image 4", "4b.jpg"]),
        (other_folder_for_one, ["1 of the 6", "image 2", "x/0/2.jpg"]),
        (resized, ["1 of the 6", "image 3", "100 × 80", "99 × 80"]),
    ],
)
def test_other_images_under_the_same_ids_are_refused(
    tmp_path: Path, change: Callable[[list[Row]], list[Row]], facts: list[str], allow_partial: bool
) -> None:
    for own in both_ways(config(tmp_path, change, allow_partial=allow_partial)):
        with pytest.raises(UserError) as caught:
            evaluate(own)
        assert all(fact in str(caught.value) for fact in facts)
        assert "image 5" not in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=facts[0]):
        compare(CompareConfig(truth=own.truth, first=own.detections, second=own.detections, bootstrap=10))


@pytest.mark.parametrize(("change", "join"), [(moved, "id"), (moved, "path"), (shifted, "path"), (renumbered, "path")])
def test_the_same_images_in_another_folder_or_order_give_the_same_numbers(
    tmp_path: Path, change: Callable[[list[Row]], list[Row]], join: Any
) -> None:
    expected = evaluate(config(tmp_path / "same"))
    assert expected.result.AP50 is not None and 0 < expected.result.AP50 < 1
    for own in both_ways(config(tmp_path, change, join=join, num_shards=3)):
        evaluation = evaluate(own)
        assert evaluation.result == expected.result
        assert ("joined by path" in evaluation.lines()) == (join == "path")
    comparison = CompareConfig(truth=own.truth, first=own.detections, second=own.detections, join=join, bootstrap=10)
    assert compare(comparison).num_images == NUM_IMAGES


def test_images_of_both_sides_are_measured_by_path(tmp_path: Path) -> None:
    partial = config(tmp_path, lambda rows: renumbered(rows)[:4], join="path")
    with pytest.raises(UserError, match=r"\b2 of the 6 images .*--allow-partial"):
        evaluate(partial)
    for own in both_ways(dataclasses.replace(partial, allow_partial=True)):
        evaluation = evaluate(own)
        assert (evaluation.result.num_images, evaluation.num_left_out) == (4, 2)
        assert evaluation.result.num_detections == 4


def test_the_error_of_an_image_goes_to_the_same_image_of_the_truth(tmp_path: Path) -> None:
    def with_error(rows: list[Row]) -> list[Row]:
        nothing: Row = {"bbox": [], "score": [], "category": []}
        return renumbered([{**rows[0], "detections": nothing, "error": "truncated"}, *rows[1:]])[::-1]

    own = config(tmp_path, with_error, join="path", out=str(tmp_path / "out"))
    assert evaluate(own).result.num_unreadable == 1
    table = pa.parquet.read_table(next((tmp_path / "out" / "per_image").glob("*.parquet")))
    assert dict(zip(table["image_id"].to_pylist(), table["error"].to_pylist(), strict=True))[0] == "truncated"


def test_nothing_in_common_by_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\b6 images .*other0\.jpg"):
        evaluate(config(tmp_path, other_images, join="path", allow_partial=True))
    with pytest.raises(UserError, match=r"--join path .*found"):
        evaluate(config(tmp_path, no_paths, join="path"))
    repeated = config(tmp_path, lambda rows: [*rows, {**rows[0], "image_id": 77}], join="path")
    with pytest.raises(UserError, match=r"found .*'val/0/0\.jpg'"):
        evaluate(repeated)


def test_tables_of_other_id_spaces_are_not_joined_by_ids_alone(tmp_path: Path) -> None:
    for id_spaces in (("a", "a"), ("a", None), ("a", "b")):
        assert evaluate(config(tmp_path, same, id_spaces)).note is None
    assert evaluate(config(tmp_path, no_paths, ("a", "a"))).note is None
    note = evaluate(config(tmp_path, no_paths, ("a", None))).note
    assert note is not None and "size" in note
    with pytest.raises(UserError, match="independently"):
        evaluate(config(tmp_path, no_paths, ("a", "b")))


def test_json_with_file_names_is_checked_and_results_are_said_to_be_joined_by_id(tmp_path: Path) -> None:
    own = config(tmp_path)
    rows = truth_rows()
    images = [
        {"id": row["image_id"], "file_name": f"./{row['image']['path']}", "width": 100, "height": 80} for row in rows
    ]
    boxes = [
        {"id": number, "image_id": number, "category_id": 1, "bbox": [10, 10, 20, 20], "iscrowd": 0}
        for number in range(NUM_IMAGES)
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    file, results = tmp_path / "truth.json", tmp_path / "results.json"
    file.write_text(json.dumps(content))
    results.write_text(json.dumps([{"image_id": 2, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.5}]))
    with_json = dataclasses.replace(own, truth=str(file))
    assert evaluate(with_json).result == evaluate(own).result
    for truth in (own.truth, str(file)):
        evaluation = evaluate(EvaluateConfig(truth=truth, detections=str(results)))
        assert any("joined by image id" in line and str(results) in line for line in evaluation.lines())
        with pytest.raises(UserError, match=r"--join path .*results\.json"):
            evaluate(EvaluateConfig(truth=truth, detections=str(results), join="path"))
    images[0]["file_name"], images[1]["file_name"] = images[1]["file_name"], images[0]["file_name"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="2 of the 6"):
        evaluate(with_json)


def listed(paths: list[str]) -> ImageKeys:
    count = len(paths)
    sizes_hw = np.full((count, 2), 9)
    return ImageKeys(uri="x", image_ids=np.arange(count), sizes_hw=sizes_hw, paths=pa.array(paths, pa.large_string()))


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        (["a/1.jpg", "a/2.jpg"], ["1.jpg", "2.jpg"], True),
        (["/1.jpg", "/2.jpg"], ["s3://b/1.jpg", "s3://b/2.jpg"], True),
        (["a/x/1.jpg", "a/y/1.jpg"], ["b/x/1.jpg", "b/y/1.jpg"], True),
        (["a/x/1.jpg", "a/y/1.jpg"], ["b/y/1.jpg", "b/x/1.jpg"], False),
        (["a/1.jpg", "b/2.jpg"], ["b/1.jpg", "a/2.jpg"], False),
        (["a/1.jpg"], ["a/11.jpg"], False),
        (["ü/1.jpg", "ü/2.jpg"], ["x/1.jpg", "x/2.jpg"], True),
        (["a/1.jpg", ""], ["b/1.jpg", "b/2.jpg"], True),
    ],
)
def test_paths_agree_when_one_folder_is_another(first: list[str], second: list[str], is_same: bool) -> None:
    if is_same:
        assert join_images(listed(first), listed(second), by="id", allow_partial=False).truth_rows.tolist() == [
            *range(len(first))
        ]
        return
    with pytest.raises(UserError, match="different images"):
        join_images(listed(first), listed(second), by="id", allow_partial=False)


def test_file_names_that_repeat_in_other_folders_are_joined_by_the_whole_path() -> None:
    names = [f"{camera}/{number}/image.jpg" for camera in "abc" for number in range(40)]
    order = np.random.default_rng(0).permutation(len(names))
    found = listed([f"/mnt/{names[place]}" for place in order.tolist()])
    assert join_images(listed(names), found, by="path", allow_partial=False).truth_row.tolist() == order.tolist()
