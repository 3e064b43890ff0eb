"""The gallery depends on the detections alone, and its pictures are readable."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydet.config import DrawIf
from raydet.images.collection import open_collection
from raydet.images.drawing import class_colours
from raydet.scoring.gallery import Chosen, GalleryPainter
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import Table, TableWriter, open_table

Row = dict[str, Any]
CATEGORIES = [Category(7, "cat"), Category(2, "dog")]


def row(image_id: int, *scores: float, error: str | None = None, size_hw: tuple[int, int] = (90, 120)) -> Row:
    found = {
        "bbox": [[10.0 + number, 20.0, 40.0, 30.0] for number in range(len(scores))],
        "score": list(scores),
        "category": [number % 2 for number in range(len(scores))],
    }
    size = {"height": size_hw[0], "width": size_hw[1]}
    return {"image_id": image_id, "path": f"{image_id}.png", **size, "detections": found, "error": error}


def write(folder: Path, rows: list[Row], *, rows_per_file: int = 1000) -> Table:
    schema = build_schema("detections", CATEGORIES)
    with TableWriter(str(folder), schema, config_hash="x", file_bytes=1) as writer:
        for start in range(0, len(rows), rows_per_file):
            writer.write_rows(rows[start : start + rows_per_file])
            writer.flush()
    return open_table(str(folder), "detections")


def choose(table: Table, count: int, draw_if: DrawIf = "any", **options: Any) -> list[Chosen]:
    return GalleryPainter("unused", CATEGORIES, count, draw_if, **options).choose(table)


def ids(chosen: list[Chosen]) -> list[int]:
    return [item.image_id for item in chosen]


def many_rows() -> list[Row]:
    generator = np.random.default_rng(0)
    rows = [
        row(int(image_id), *np.sort(generator.random(generator.integers(0, 6)).round(1))[::-1].tolist())
        for image_id in generator.permutation(300) * 3
    ]
    return [*rows[:-1], row(rows[-1]["image_id"], error="empty file")]


@pytest.mark.parametrize("draw_if", ["any", "low_score", "many_boxes"])
def test_neither_order_nor_files_change_what_is_chosen(tmp_path: Path, draw_if: DrawIf) -> None:
    rows = many_rows()
    expected = choose(write(tmp_path / "one", rows), 20, draw_if)
    shuffled = [rows[number] for number in np.random.default_rng(1).permutation(len(rows))]
    other = choose(write(tmp_path / "many", shuffled, rows_per_file=37), 20, draw_if)
    assert ids(other) == ids(expected) and len(set(ids(expected))) == 20
    assert ids(choose(write(tmp_path / "again", shuffled), 7, draw_if)) == ids(expected)[:7]
    for item in other:
        assert shuffled[item.position]["image_id"] == item.image_id
        assert item.path == f"{item.image_id}.png" and item.size_hw == (90, 120)


def test_any_is_a_fair_sample_that_the_seed_changes(tmp_path: Path) -> None:
    table = write(tmp_path / "found", [row(number) for number in range(2000)])
    samples = [set(ids(choose(table, 500, seed=seed))) for seed in range(4)]
    for sample in samples:
        assert np.histogram(list(sample), 4, (0, 2000))[0] == pytest.approx([125] * 4, abs=45)
        assert np.mean([image_id % 2 for image_id in sample]) == pytest.approx(0.5, abs=0.1)
    assert len(samples[0] & samples[1]) == pytest.approx(125, abs=45)


def test_low_score_takes_best_scores_near_the_threshold_and_draws_that_box(tmp_path: Path) -> None:
    rows = [row(1, 0.9, 0.31), row(2, 0.28, 0.1), row(3), row(4, 0.45, 0.4, 0.2), row(5, 0.3, error="cut"), row(6, 0.0)]
    chosen = choose(write(tmp_path / "found", rows), 10, "low_score", threshold=0.3)
    assert ids(chosen) == [2, 4, 6, 1]
    assert [item.best_score for item in chosen] == [0.28, 0.45, 0.0, 0.9]
    assert [item.scores.tolist() for item in chosen] == [[0.28], [0.45, 0.4], [0.0], [0.9, 0.31]]
    assert chosen[1].boxes_xywh.tolist() == [[10, 20, 40, 30], [11, 20, 40, 30]]
    assert chosen[1].categories.tolist() == [0, 1]


def test_many_boxes_counts_those_above_the_threshold(tmp_path: Path) -> None:
    rows = [row(1, 0.9), row(2, *[0.3] * 9), row(3, 0.8, 0.7, 0.6), row(4), row(5, *[0.9] * 4, error="cut")]
    chosen = choose(write(tmp_path / "found", rows), 10, "many_boxes", threshold=0.3)
    assert ids(chosen) == [3, 1]
    assert [len(item.scores) for item in chosen] == [3, 1]


def test_images_without_boxes_are_among_any_but_not_those_that_cannot_be_read(tmp_path: Path) -> None:
    table = write(tmp_path / "found", [row(1), row(2, error="empty file"), row(3, 0.1)])
    chosen = choose(table, 10)
    assert sorted(ids(chosen)) == [1, 3] and {item.best_score for item in chosen} == {None, 0.1}
    assert all(item.scores.size == 0 for item in chosen)
    assert choose(table, 0) == []


def save(path: Path, size_hw: tuple[int, int]) -> None:
    Image.fromarray(np.full((*size_hw, 3), 90, np.uint8)).save(path)


def read_index(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / "__drawn" / "index.csv").read_text())))


def test_pictures_are_drawn_at_a_readable_size_and_listed(tmp_path: Path) -> None:
    sizes = {0: (90, 120), 1: (3000, 1500), 2: (700, 500)}
    (tmp_path / "images").mkdir()
    for number, size_hw in sizes.items():
        save(tmp_path / "images" / f"{number}.png", size_hw)
    rows = [row(number, 0.9, *[0.8] * number, 0.1, size_hw=size_hw) for number, size_hw in sizes.items()]
    table, out = write(tmp_path / "found", rows), tmp_path / "out"
    images = open_collection(str(tmp_path / "images"), index_uri=None)
    gallery = GalleryPainter(str(out), CATEGORIES, 10, "many_boxes", 0.3)
    report = gallery.draw(images, gallery.choose(table))
    assert sorted(path.name for path in (out / "__drawn").iterdir()) == [
        "0001-2.jpg", "0002-1.jpg", "0003-0.jpg", "index.csv",
    ]  # fmt: skip
    (line,) = report.lines()
    assert line.startswith("3 images") and line.endswith(str(out / "__drawn"))
    assert read_index(out)[0] == {
        "image_id": "2", "path": "2.png", "file": "0001-2.jpg", "best_score": "0.9", "num_boxes": "3",
    }  # fmt: skip
    drawn = {entry["image_id"]: np.array(Image.open(out / "__drawn" / entry["file"])) for entry in read_index(out)}
    assert {name: picture.shape[:2] for name, picture in drawn.items()} == {
        "0": (480, 640), "1": (1600, 800), "2": (700, 500),
    }  # fmt: skip
    # Inside the lower edge of the box at (10, 20, 40, 30), in the picture enlarged by 5 1/3.
    tint = np.array(class_colours(["cat", "dog"])["cat"])
    edge = drawn["0"][round(50 * 16 / 3) - 1, round(30 * 16 / 3)].astype(int)
    assert np.abs(edge - tint).max() < 40
    assert np.abs(drawn["0"][round(35 * 16 / 3), round(30 * 16 / 3)].astype(int) - 90).max() < 20


def test_an_earlier_drawing_goes_and_what_cannot_be_read_is_reported(tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for number in range(4):
        save(folder / f"{number}.png", (90, 120))
    table = write(tmp_path / "found", [row(number, 0.9) for number in range(4)])
    images = open_collection(str(folder), index_uri=None)
    GalleryPainter(str(out), CATEGORIES, 4).draw(images, choose(table, 4))
    assert len(read_index(out)) == 4
    (out / "__drawn" / "notes.txt").write_text("the user's own")
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(b"")
    report = GalleryPainter(str(out), CATEGORIES, 4).draw(images, choose(table, 4))
    assert sorted(entry["image_id"] for entry in read_index(out)) == ["0", "3"] and report.num_drawn == 2
    names = {path.name for path in (out / "__drawn").iterdir()}
    assert names == {"index.csv", "notes.txt", *(entry["file"] for entry in read_index(out))}
    assert len(report.failures) == 2 and all("not drawn: image" in line for line in report.lines()[:2])
    others = write(tmp_path / "others", [row(number + 50, 0.9) for number in range(4)])
    report = GalleryPainter(str(out), CATEGORIES, 1).draw(images, choose(others, 1))
    assert report.num_drawn == 0 and "not the images that were scored" in report.lines()[0]
