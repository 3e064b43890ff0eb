"""Label Studio's JSON becomes records; what it cannot say is refused, counted or rejected."""

import json
from pathlib import Path
from typing import Any

import pytest

from raydet.common.errors import UserError
from raydet.config import PrepareLabelStudioConfig
from raydet.images.files import ImageFolder
from raydet.preparation.prepare import prepare_label_studio
from raydet.preparation.sources.source import UNLABELLED, Source
from raydet.preparation.sources.tools.label_studio import read_label_studio
from tests.small_sets import rows_of, save_image


def region(
    label: str | None = "dog", sides: Any = (10, 25, 50, 50), region_id: str = "x1", **more: Any
) -> dict[str, Any]:
    value = dict(zip(("x", "y", "width", "height"), sides, strict=True)) | {"rotation": more.pop("rotation", 0)}
    value |= {"rectanglelabels": [label]} if label else {}
    size = {"original_width": 20, "original_height": 16, "image_rotation": 0}
    return {"id": region_id, "type": "rectanglelabels", "value": value, **size, **more}


def task(address: str, *results: dict[str, Any], task_id: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": task_id, "data": {"image": address}, "annotations": [{"result": list(results)}], **more}


def read(folder: Path, content: Any, files: tuple[str, ...] = ("a.jpg",), **options: Any) -> Source:
    for name in files:
        (folder / "img" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "img" / name).write_bytes(b"x")
    (folder / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    config = PrepareLabelStudioConfig(
        annotations=str(folder / "a.json"), images=str(folder / "img"), out="unused", **options
    )
    return read_label_studio(config, ImageFolder(config.images))


def test_percentages_become_pixels(tmp_path: Path) -> None:
    crowd = {"id": "x2", "type": "choices", "value": {"choices": ["crowd"]}}
    regions = (region(), region("cat", (0, 0, 100, 100), "x2"), crowd)
    source = read(tmp_path, [task("a.jpg", *regions, task_id=7)])
    (record,) = source.images
    assert (record.image_id, record.path, record.size_hw) == (7, "a.jpg", (16, 20))
    assert [(category.id, category.name) for category in source.categories] == [(1, "cat"), (2, "dog")]
    assert record.objects is not None
    assert record.objects.boxes_xywh == [(2, 4, 10, 8), (0, 0, 20, 16)] and record.objects.areas == [80, 320]
    assert (record.objects.ids, record.objects.categories, record.objects.iscrowd) == ([1, 2], [1, 0], [False, True])
    assert not source.findings and list(source.images) == [record]
    (record,) = read(tmp_path, [task("a.jpg", region(original_width=None))]).images
    assert record.objects is not None and record.objects.is_normalised and record.size_hw is None
    assert record.objects.boxes_xywh == [(0.1, 0.25, 0.5, 0.5)]


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("/data/upload/3/0123abcd-a.jpg", "a.jpg"),
        ("/data/upload/3/89abcdef-b%20c.jpg", "upload/3/89abcdef-b c.jpg"),
        ("/data/local-files/?d=photos/sub/d.png", "sub/d.png"),
        ("s3://bucket/photos/sub/d.png", "sub/d.png"),
        ("https://host/photos/sub/d.png?key=1", "sub/d.png"),
        ("x/a.jpg", "a.jpg"),
    ],
)
def test_images_are_found_by_the_end_of_their_address(tmp_path: Path, address: str, path: str) -> None:
    files = ("a.jpg", "upload/3/89abcdef-b c.jpg", "sub/d.png", "d.png")
    (record,) = read(tmp_path, [task(address, region())], files).images
    assert (record.path, record.refusal) == (path, None)


def test_ids_of_the_export_come_first(tmp_path: Path) -> None:
    tasks = [task("a.jpg", region(region_id=str(17 - rank)), task_id=rank) for rank in range(2)]
    for rank, item in enumerate(tasks):
        item["data"]["image_id"] = 40 + rank
    source = read(tmp_path, tasks)
    assert [record.image_id for record in source.images] == [40, 41]
    assert [record.objects.ids for record in source.images if record.objects] == [[17], [16]]
    tasks[1]["data"]["image_id"] = 40
    assert [record.image_id for record in read(tmp_path, tasks).images] == [0, 1]
    tasks[1]["id"] = None
    tasks[1]["annotations"][0]["result"][0]["id"] = "17"
    source = read(tmp_path, tasks)
    assert [record.image_id for record in source.images] == [0, 1] and len(source.findings) == 1
    assert [record.objects.ids for record in source.images if record.objects] == [[1], [2]]


def test_the_right_annotation_is_used(tmp_path: Path) -> None:
    skipped = {"result": [region("skipped")], "was_cancelled": True}
    several = [{"result": [region("old")]}, {"result": [region("new")]}, skipped]
    decided = [{"result": [region("true")], "ground_truth": True}, {"result": [region("new")]}]
    tasks = [task("a.jpg", task_id=rank) for rank in range(4)]
    for item, annotations in zip(tasks, (several, decided, [skipped], [{"result": []}]), strict=True):
        item["annotations"] = annotations
    source = read(tmp_path, tasks)
    names = [category.name for category in source.categories]
    records = list(source.images)
    used = [[names[category] for category in record.objects.categories] for record in records if record.objects]
    assert used == [["new"], ["true"], [], []]
    assert [record.refusal for record in records] == [None, None, UNLABELLED, None]
    assert list(source.findings.values()) == [2]
    kept = read(tmp_path, tasks, unlabelled="keep")
    assert [record.refusal for record in kept.images] == [None] * 4 and sum(kept.findings.values()) == 3


def test_predictions_can_be_labels(tmp_path: Path) -> None:
    results = [region(score=0.9), region(score=0.25), region("cat")]
    tasks = [task("a.jpg", predictions=[{"result": results, "score": 0.5}]), task("a.jpg", task_id=2)]
    source = read(tmp_path, tasks, labels="predictions", score_threshold=0.25, classes=["cat", "dog"])
    first, second = source.images
    assert first.objects is not None and first.objects.categories == [1, 0] and second.refusal == UNLABELLED
    assert list(source.findings) == ["predictions at or below --score-threshold, dropped"]


def test_what_is_no_box_is_counted(tmp_path: Path) -> None:
    regions = (
        region(),
        region(None),
        region(sides=(1, 2, None, 4)),
        region(sides=(1, 2, 1e999, 4)),
        {"id": "p", "type": "polygonlabels", "value": {"points": [[1, 1]], "polygonlabels": ["dog"]}},
        {"id": "q", "type": "rectangle", "value": {"x": 1, "y": 1, "width": 1, "height": 1}},
        {"id": "t", "type": "textarea", "value": {"text": ["x"]}},
        region("bird"),
        region(rotation=90, sides=(50, 50, 20, 25)),
    )
    source = read(tmp_path, [task("a.jpg", *regions)], classes=["dog"])
    (record,) = source.images
    assert record.objects is not None and record.objects.boxes_xywh[1] == pytest.approx((6, 8, 4, 4))
    assert dict(source.findings) == {
        "regions other than labelled rectangles, dropped": 5,
        "objects of classes that are not in --classes, dropped": 1,
        "rotated rectangles, replaced by the upright box around them": 1,
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "list of tasks"),
        ("[", "not JSON"),
        ("[] x", "extra data"),
        ([], "no tasks"),
        ([3], "must be an object"),
        ([{"image": "a.jpg", "label": []}], "JSON-MIN"),
        ([{"data": {"text": 3}}], "no image address"),
        ([task("a.jpg")], "no labelled rectangle"),
    ],
)
def test_foreign_files_are_one_line(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_texts_and_numbers_that_no_table_can_hold_do_no_harm(tmp_path: Path) -> None:
    strange = region("a\ud800", region_id="9" * 20, original_width=2**70)
    source = read(tmp_path, [task("b\ud800.jpg", strange, task_id=2**70), task("/".join("a" * 200) + "/a.jpg")])
    first, second = source.images
    assert first.objects is not None and first.objects.ids == [1] and first.refusal is not None
    assert (first.path, second.path, second.refusal) == ("b\\ud800.jpg", "a.jpg", None)
    assert [category.name for category in source.categories] == ["a\\ud800"]


def test_images_that_cannot_be_used_are_rejected(tmp_path: Path) -> None:
    save_image(tmp_path / "img/a.jpg", (20, 16))
    save_image(tmp_path / "img/turned.jpg", (20, 16), orientation=6)
    (tmp_path / "img/link.jpg").symlink_to("/etc/hostname")
    tasks = [
        task("a.jpg", region(), task_id=0),
        task("../none.jpg", region(), task_id=1),
        task("link.jpg", region(), task_id=2),
        task("a.jpg", region(image_rotation=90), task_id=3),
        task("turned.jpg", region(original_width=16, original_height=20), task_id=4),
        {"id": 5, "data": {"image": "a.jpg"}},
    ]
    (tmp_path / "a.json").write_text(json.dumps(tasks))
    config = {"annotations": str(tmp_path / "a.json"), "images": str(tmp_path / "img"), "out": str(tmp_path / "out")}
    report = prepare_label_studio(PrepareLabelStudioConfig(**config))  # type: ignore[arg-type]
    assert (report.found, report.accepted, report.rejected, report.size_mismatches) == (6, 2, 4, 0)
    assert UNLABELLED in report.reasons and len(report.reasons) == 4
    rows = rows_of(tmp_path / "out")
    assert [row["image_id"] for row in rows] == [0, 4] and rows[1]["objects"]["bbox"] == [[1.6, 5, 8, 10]]
