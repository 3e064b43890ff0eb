"""CVAT's XML becomes records; what it cannot say or must not do is refused, counted or rejected."""

from pathlib import Path

import pytest

from raydet.common.errors import UserError
from raydet.config import PrepareCvatConfig
from raydet.images.files import ImageFolder
from raydet.preparation.prepare import prepare_cvat
from raydet.preparation.sources.source import Source
from raydet.preparation.sources.tools import cvat
from raydet.preparation.sources.tools.cvat import read_cvat
from tests.small_sets import rows_of, save_image

LABELS = (
    "<label><name>dog</name><type>rectangle</type><attributes><attribute><name>is_crowd</name></attribute></attributes>"
    "</label><label><name>black &amp; white cat</name></label>"
)


def xml(*images: str, labels: str = LABELS) -> str:
    meta = f"<meta><task><id>3</id><name>the task</name><labels>{labels}</labels></task></meta>"
    head = '<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>'
    return f"{head}{meta}{''.join(images)}</annotations>"


def image(name: str, *shapes: str, image_id: object = 0, size: str = 'width="20" height="16"') -> str:
    return f'<image id="{image_id}" name="{name}" {size}>{"".join(shapes)}</image>'


def box(label: str = "dog", corners: tuple[object, ...] = (1, 2, 9, 12), more: str = "", attributes: str = "") -> str:
    sides = " ".join(f'{side}="{value}"' for side, value in zip(("xtl", "ytl", "xbr", "ybr"), corners, strict=True))
    return f'<box label="{label}" source="manual" occluded="0" {sides} {more}>{attributes}</box>'


def read(folder: Path, text: str | bytes) -> Source:
    (folder / "img").mkdir(exist_ok=True)
    (folder / "a.xml").write_bytes(text.encode() if isinstance(text, str) else text)
    config = PrepareCvatConfig(annotations=str(folder / "a.xml"), images=str(folder / "img"), out="unused")
    return read_cvat(config, ImageFolder(config.images))


def test_boxes_crowds_and_ids_are_kept(tmp_path: Path) -> None:
    crowd = '<attribute name="is_crowd">true</attribute><attribute name="breed">husky</attribute>'
    source = read(
        tmp_path,
        xml(
            image("sub\\a.jpg", box(), box("black &amp; white cat", (0.5, 1, 4.75, 3), attributes=crowd), image_id=7),
            image("b.jpg", image_id=3, size=""),
        ),
    )
    assert [(category.id, category.name) for category in source.categories] == [(1, "dog"), (2, "black & white cat")]
    first, second = source.images
    assert (first.image_id, first.path, first.size_hw) == (7, "sub/a.jpg", (16, 20))
    assert (second.image_id, second.path, second.size_hw) == (3, "b.jpg", None)
    assert first.objects is not None and second.objects is not None
    assert first.objects.boxes_xywh == [(1, 2, 8, 10), (0.5, 1, 4.25, 2)]
    assert (first.objects.ids, first.objects.categories, first.objects.iscrowd) == ([1, 2], [0, 1], [False, True])
    assert first.objects.areas == [80, 8.5] and second.objects.ids == []
    assert list(source.images) == [first, second] and not source.findings


def test_what_is_no_box_is_counted(tmp_path: Path) -> None:
    shapes = (
        '<polygon label="dog" points="1,1;2,2;3,1"><attribute name="is_crowd">true</attribute></polygon>',
        '<mask label="dog" rle="1, 2" left="1" top="1" width="2" height="2"/>',
        '<skeleton label="dog"><points label="nose" points="1,1"/></skeleton>',
        box(corners=("x", 1, 2, 3), attributes='<attribute name="is_crowd">true</attribute>'),
        box("", (1, 1, 2, 2)),
        box(corners=("1e400", 1, 2, 3)),
    )
    source = read(tmp_path, xml(image("a.jpg", box(), *shapes)))
    (record,) = source.images
    assert record.objects is not None and record.objects.iscrowd == [False]
    assert dict(source.findings) == {
        "shapes other than boxes, dropped: polygon": 1,
        "shapes other than boxes, dropped: mask": 1,
        "shapes other than boxes, dropped: skeleton": 1,
        "boxes without a label or four numbers, dropped": 3,
    }


def test_a_rotated_box_becomes_the_box_around_it(tmp_path: Path) -> None:
    source = read(tmp_path, xml(image("a.jpg", box(corners=(4, 6, 12, 10), more='rotation="90.0"'))))
    (record,) = source.images
    assert record.objects is not None
    assert record.objects.boxes_xywh[0] == pytest.approx((6, 4, 4, 8)) and record.objects.areas == [32]
    assert list(source.findings) == ["rotated boxes, replaced by the upright box around them"]


@pytest.mark.parametrize("ids", [(0, 0), (1, ""), (1, -1), (1, 2**53)])
def test_ids_that_cannot_be_kept_are_numbered(tmp_path: Path, ids: tuple[object, object]) -> None:
    source = read(tmp_path, xml(*(image(f"{rank}.jpg", image_id=id_) for rank, id_ in enumerate(ids))))
    assert [record.image_id for record in source.images] == [0, 1]
    assert list(source.findings) == ["image ids that are missing or repeated, so all are renumbered"]


def test_a_class_missing_from_the_labels_is_added(tmp_path: Path) -> None:
    source = read(tmp_path, xml(image("a.jpg", box("bird"), box())))
    assert [category.name for category in source.categories] == ["dog", "black & white cat", "bird"]
    assert [finding.detail for finding in source.findings.rows] == ["bird"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('<!DOCTYPE a [<!ENTITY x "y">]>' + xml(image("&x;")).partition("?>")[2], "DOCTYPE"),
        (xml(image("&x;")), "undefined entity"),
        (xml("<track/>"), "CVAT for video"),
        (xml(), "no images"),
        (xml(image("a.jpg"), labels=""), "no classes"),
        (xml(image("")), "image 1 has no name"),
        ("<annotation/>", "its root is <annotation>"),
        (xml(image("a.jpg"))[:-5], "not XML"),
        ("", "not XML"),
        (b"\xff\xfe\x00", "not XML"),
        (xml("<x>" * 40), "deep"),
        (xml("".join(f"<x{number}/>" for number in range(1001))), "different names"),
    ],
)
def test_hostile_and_foreign_files_are_one_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [xml(image("a" * 5_000_000)), xml(f"<!--{'a' * 5_000_000}-->")])
def test_endless_texts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(cvat, "MAX_SILENT_BYTES", 2**20)
    with pytest.raises(UserError, match="endless"):
        read(tmp_path, text)


def test_too_many_boxes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvat, "MAX_BOXES", 2)
    with pytest.raises(UserError, match="image 2 has more than 2 boxes"):
        read(tmp_path, xml(image("a.jpg", box(), box()), image("b.jpg", box(), box(), box())))


def test_images_that_cannot_be_used_are_rejected(tmp_path: Path) -> None:
    save_image(tmp_path / "img/a.jpg", (20, 16))
    save_image(tmp_path / "img/turned.jpg", (20, 16), orientation=6)
    (tmp_path / "a.xml").write_text(
        xml(
            image("a.jpg", box(), image_id=0),
            image("../a.jpg", box(), image_id=1),
            image("none.jpg", image_id=2),
            image("turned.jpg", box(corners=(0, 0, 8, 4)), image_id=3),
        )
    )
    config = {"annotations": str(tmp_path / "a.xml"), "images": str(tmp_path / "img"), "out": str(tmp_path / "out")}
    report = prepare_cvat(PrepareCvatConfig(**config))  # type: ignore[arg-type]
    assert (report.found, report.accepted, report.rejected, report.rotated) == (4, 2, 2, 1)
    assert sorted(report.reasons) == ["no such file", "the file name leaves the image folder through `..`"]
    rows = rows_of(tmp_path / "out")
    assert [(row["image_id"], row["width"], row["height"]) for row in rows] == [(0, 20, 16), (3, 16, 20)]
    assert rows[1]["objects"]["bbox"] == [[12, 0, 4, 8]]
