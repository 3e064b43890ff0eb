import json
import math
import sqlite3
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raydet.common.errors import RunError, UserError
from raydet.config import PrepareCocoConfig
from raydet.images.files import ImageFolder
from raydet.preparation.sources import coco_index
from raydet.preparation.sources.coco import read_coco
from raydet.preparation.sources.source import Source
from raydet.tables.spill import open_database

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "owl"}]


def image(image_id: Any = 1, file_name: Any = "a.jpg", **more: Any) -> dict[str, Any]:
    return {"id": image_id, "file_name": file_name, **more}


def box(annotation_id: Any = 1, image_id: Any = 1, category_id: Any = 7, **more: Any) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": [1, 2, 3, 4], **more}


def read_file(annotations: Path, folder: Path) -> Source:
    config = PrepareCocoConfig(annotations=str(annotations), images=str(folder), out="unused")
    return read_coco(config, ImageFolder(config.images))


def read(folder: Path, content: Any) -> Source:
    path = folder / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_file(path, folder)


def coco(images: list[Any], annotations: list[Any], categories: Any = CATEGORIES) -> dict[str, Any]:
    return {"images": images, "annotations": annotations, "categories": categories}


def test_category_indices_are_contiguous_by_rising_source_id(tmp_path: Path) -> None:
    source = read(tmp_path, coco([image()], [box(category_id=90), box(2, category_id=3)]))
    assert [(category.id, category.name) for category in source.categories] == [(3, "cat"), (7, "dog"), (90, "owl")]
    (record,) = source.images
    assert record.objects is not None
    assert record.objects.categories == [2, 0]


def test_missing_area_and_crowd_and_images_without_boxes(tmp_path: Path) -> None:
    annotations = [box(5), box(9, area=2.5, iscrowd=1), box(11, area=None, iscrowd=None), box(12, iscrowd=True)]
    source = read(tmp_path, coco([image(1), image(2, "sub/b.jpg")], annotations))
    first, second = source.images
    assert first.objects is not None and second.objects is not None
    assert first.objects.ids == [5, 9, 11, 12]
    assert first.objects.areas == [12.0, 2.5, 12.0, 12.0]
    assert first.objects.iscrowd == [False, True, False, True]
    assert second.objects.ids == []
    assert second.path == "sub/b.jpg"
    assert source.num_images == 2 and not source.findings


def test_ids_may_be_digits_or_whole_floats_and_slashes_backslashes(tmp_path: Path) -> None:
    source = read(tmp_path, coco([image("12", "x\\y.jpg", width="40", height=30.0)], [box(1, 12.0, "3")]))
    (record,) = source.images
    assert (record.image_id, record.path, record.size_hw) == (12, "x/y.jpg", (30, 40))
    assert record.objects is not None and record.objects.categories == [0]


def test_boxes_without_numbers_are_kept_for_the_count(tmp_path: Path) -> None:
    annotations = [box(1, bbox=None), box(2, bbox=[]), box(3, bbox=[1, None, 2, 3]), box(4, bbox=["1", "2", "3", "4"])]
    (record,) = read(tmp_path, coco([image()], annotations)).images
    assert record.objects is not None
    assert [math.isnan(sum(xywh)) for xywh in record.objects.boxes_xywh] == [True, True, True, False]
    assert record.objects.boxes_xywh[3] == (1.0, 2.0, 3.0, 4.0)


def test_annotations_of_unknown_images_and_categories_are_counted(tmp_path: Path) -> None:
    source = read(tmp_path, coco([image()], [box(1), box(2, image_id=99), box(3, category_id=4), box(4, image_id=98)]))
    assert sorted(source.findings.values()) == [1, 2]
    (record,) = source.images
    assert record.objects is not None and record.objects.ids == [1]


@pytest.mark.parametrize("ids", [[0, 1], [4, 4], [-1, 2], [None, 2], ["x", 2]])
def test_annotation_ids_that_evaluators_misread_are_renumbered(tmp_path: Path, ids: list[Any]) -> None:
    source = read(tmp_path, coco([image()], [box(annotation_id) for annotation_id in ids]))
    (record,) = source.images
    assert record.objects is not None and record.objects.ids == [1, 2]
    assert any("renumbered" in finding for finding in source.findings)


def test_integers_beyond_64_bits_and_lone_surrogates_are_kept_apart(tmp_path: Path) -> None:
    annotations = [box(2**70, image_id=2**65), box(5, category_id=-(2**64))]
    source = read(tmp_path, coco([image(file_name="a\ud800.jpg", serial=2**64)], annotations))
    assert [finding.detail for finding in list(source.findings.rows)[1:]] == [
        f"its image_id is {2**65}",
        f"its category_id is {-(2**64)}",
    ]
    assert [finding.annotation_id for finding in source.findings.rows] == [None, 1, 2]
    (record,) = source.images
    assert record.path == "a\\ud800.jpg" and record.refusal is not None
    assert record.extra == {"serial": str(2**64)}


def test_further_scalars_become_columns(tmp_path: Path) -> None:
    images = [
        image(1, license=3, weather="rain", exposure=1, night=True, mixed=1, tags=["x"], image="taken"),
        image(2, "b.jpg", license=4, exposure=0.5, night=None, mixed="two", path=None),
    ]
    source = read(tmp_path, coco(images, []))
    assert {field.name: field.type for field in source.extra_fields} == {
        "license": pa.int64(),
        "weather": pa.string(),
        "exposure": pa.float64(),
        "night": pa.bool_(),
        "mixed": pa.string(),
    }
    first, second = source.images
    assert first.extra == {"license": 3, "weather": "rain", "exposure": 1, "night": True, "mixed": "1"}
    assert second.extra == {"license": 4, "weather": None, "exposure": 0.5, "night": None, "mixed": "two"}


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "..\\secret.jpg", "C:\\x.jpg", "http://host/x.jpg"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    (record,) = read(tmp_path, coco([image(1, name)], [])).images
    assert record.refusal is not None and "file name" in record.refusal


def test_links_that_leave_the_folder_are_refused_and_others_followed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (folder / "out.jpg").symlink_to(tmp_path / "outside" / "x.jpg")
    (folder / "way").symlink_to(tmp_path / "outside")
    (folder / "in.jpg").symlink_to(folder / "sub" / "x.jpg")
    names = ["out.jpg", "way/x.jpg", "in.jpg", "sub/x.jpg"]
    records = read(folder, coco([image(rank, name) for rank, name in enumerate(names)], [])).images
    assert [record.refusal is None for record in records] == [False, False, True, True]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "fi', "is not JSON: .* character 55"),
        ('{"images": [], "images": []}', '"images" twice'),
        ('{"a": ' + "[" * 100_000, "is not JSON"),
        ('{"images": [{"id": 1, "file_name": "a.jpg", "seed": ' + "1" * 5000 + "}]}", "is not JSON: .*digit"),
        ('{"images": "a.jpg"}', '"images" .*got a str'),
        ("[1]", "a list"),
        ("3", "a int"),
        ({"images": [], "annotations": []}, '"categories"'),
        ({"images": [image()], "categories": CATEGORIES}, '"annotations".*prepare images'),
        (coco({"id": 1}, []), '"images" .*got a dict'),  # type: ignore[arg-type]
        (coco(["a.jpg"], []), r"images\[0\] .*got 'a.jpg'"),
        (coco([], []), "no image"),
        (coco([image()], [], []), "no class"),
        (coco([image(), image(2, None)], []), r"images\[1\]: file_name .*got None"),
        (coco([{"file_name": "a.jpg"}], []), r'images\[0\] .*"id"'),
        (coco([image("a7")], []), r"images\[0\]: id .*integer, got 'a7'"),
        (coco([image(True)], []), r"images\[0\]: id .*integer"),
        (coco([image(-1)], []), r"images\[0\]: id .*-1"),
        (coco([image(2**53)], []), r"images\[0\]: id .*2\*\*53 - 1"),
        (coco([image(), image(2), image("1")], []), r"images\[0\] and \[2\] have the same id 1"),
        (
            coco([image()], [], [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]),
            r"categories\[0\] and \[1\].*same id 1",
        ),
        (coco([image()], [], [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]), "same name 'a'"),
        (coco([image()], [], [{"id": 1}]), r"categories\[0\]: name .*string"),
        (coco([image()], [box(), {"id": 2}]), r'annotations\[1\] .*"image_id"'),
        (coco([image()], [box(category_id=None)]), r"annotations\[0\]: category_id .*got None"),
        (coco([image()], [{"id": 1, "image_id": 1, "category_id": 7}]), r'annotations\[0\] .*"bbox"'),
        (coco([image()], [box(bbox=[1, 2, 3])]), r"annotations\[0\]: bbox .*four numbers"),
        (coco([image()], [box(bbox=[1, 2, 3, "wide"])]), r"annotations\[0\]: bbox .*four numbers"),
        (coco([image()], [box(bbox={"x": 1})]), r"annotations\[0\]: bbox .*four numbers"),
        (coco([image()], [box(iscrowd=2)]), r"annotations\[0\]: iscrowd .*got 2"),
    ],
)
def test_mistakes_get_one_line_that_names_the_place(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value) and "instances.json" in str(caught.value)


def test_a_file_is_read_in_pieces_and_not_kept(tmp_path: Path) -> None:
    num_images, mask = 2_000, {"size": [480, 640], "counts": "a1b2" * 500}
    images = [image(number, f"{number}.jpg") for number in range(num_images)]
    boxes = [
        box(number + 1, number * 7919 % num_images, segmentation=mask, category_id=3)
        for number in range(10 * num_images)
    ]
    path = tmp_path / "instances.json"
    # Annotations come before the images and categories that they refer to.
    path.write_text(json.dumps({"annotations": boxes, "images": images, "categories": CATEGORIES}))
    del boxes, images
    assert path.stat().st_size > 40_000_000
    tracemalloc.start()
    source = read_file(path, tmp_path)
    found = [(record.image_id, record.objects.ids) for record in source.images if record.objects is not None]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    wanted: dict[int, list[int]] = {number: [] for number in range(num_images)}
    for number in range(10 * num_images):
        wanted[number * 7919 % num_images].append(number + 1)
    assert found == list(wanted.items())
    assert peak_bytes < 24_000_000  # five chunks and `found`


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> sqlite3.Connection:
        database = open_database()
        database.execute("PRAGMA max_page_count = 30")
        return database

    monkeypatch.setattr(coco_index, "open_database", full)
    with pytest.raises(RunError, match=r"disk is full.*TMPDIR"):
        read(tmp_path, coco([image()], [box(number) for number in range(1, 3_000)]))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json"):
        read_file(tmp_path / "none.json", tmp_path)


def test_real_coco_has_its_crowds_gaps_and_images_without_boxes(test_data: Path) -> None:
    numbers = {"train": (47, 524, 6), "val": (57, 517, 7)}
    for split, (num_images, num_boxes, num_crowds) in numbers.items():
        folder = test_data / "coco_mini"
        source = read_file(folder / f"instances_{split}.json", folder / split)
        objects = [record.objects for record in source.images if record.objects is not None]
        assert len(objects) == num_images
        assert sum(len(item.ids) for item in objects) == num_boxes
        assert sum(sum(item.iscrowd) for item in objects) == num_crowds
        assert len(source.categories) == 80
        assert (source.categories[0].name, source.categories[79].id) == ("person", 90)
        assert source.categories[11].id == 13  # COCO has no 12
