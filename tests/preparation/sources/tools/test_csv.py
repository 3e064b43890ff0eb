"""CSV files of VoTT, TensorFlow and RetinaNet become records; every image is named, every unusable row counted."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raydet.common.errors import UserError
from raydet.config import PrepareCsvConfig
from raydet.images.files import ImageFolder
from raydet.preparation.prepare import prepare_csv
from raydet.preparation.report import PrepareReport
from raydet.preparation.sources.source import Source
from raydet.preparation.sources.tools import csv_labels
from raydet.preparation.sources.tools.csv_labels import read_csv
from raydet.tables.table import open_table

VOTT = '"image","xmin","ymin","xmax","ymax","label"\n"a.jpg",1.5,2,11.5,8,"dog"\n"b.jpg",0,0,4,4,"cat"\n'
TENSORFLOW = "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,40,20,dog,1.5,2,11.5,8\nb.jpg,40,20,cat,0,0,4,4\n"
RETINANET = "/data/imgs/a.jpg,1.5,2,11.5,8,dog\n/data/imgs/b.jpg,0,0,4,4,cat\n"
OTHER = "name;left;top;w;h;file\ndog;1.5;2;10;6;a.jpg\ncat;0;0;4;4;b.jpg\n"


def write(folder: Path, text: str | bytes, images: str = "a b c") -> None:
    (folder / "img").mkdir(exist_ok=True)
    for name in images.split():
        Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(folder / "img" / f"{name}.jpg")
    (folder / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())


def read(folder: Path, text: str | bytes, images: str = "a b c", **options: object) -> Source:
    write(folder, text, images)
    return read_file(folder / "labels.csv", folder / "img", **options)


def read_file(annotations: Path, images: Path, **options: Any) -> Source:
    config = PrepareCsvConfig(annotations=str(annotations), images=str(images), out="unused", **options)
    return read_csv(config, ImageFolder(config.images))


def prepare(folder: Path, text: str, **options: object) -> PrepareReport:
    write(folder, text)
    paths = {"annotations": str(folder / "labels.csv"), "images": str(folder / "img"), "out": str(folder / "table")}
    return prepare_csv(PrepareCsvConfig(**paths, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        (VOTT, None),
        (TENSORFLOW, None),
        (RETINANET, None),
        (VOTT.replace(",", "\t"), None),
        (VOTT.replace(",", ";").replace("\n", "\r\n"), None),
        (OTHER, {"image": "file", "class": "Name", "x": "left", "y": "top", "w": "w", "h": "h"}),
        (RETINANET, {"image": 1, "class": 6, "xmin": 2, "ymin": 3, "xmax": 4, "ymax": 5}),
    ],
)
def test_the_common_columns_are_recognised(tmp_path: Path, text: str, columns: dict[str, str | int] | None) -> None:
    source = read(tmp_path, text, columns=columns)
    first, second = source.images
    assert [category.name for category in source.categories] == ["cat", "dog"]
    assert [category.id for category in source.categories] == [1, 2]
    assert (first.path, second.path) == ("a.jpg", "b.jpg") and first.refusal is None
    assert first.objects is not None and second.objects is not None
    assert (first.objects.ids, second.objects.ids) == ([1], [2])
    assert first.objects.boxes_xywh == [(1.5, 2, 10, 6)] and first.objects.areas == [60]
    assert (first.objects.categories, second.objects.categories) == ([1], [0])
    assert first.size_hw == ((20, 40) if text == TENSORFLOW else None)
    assert source.findings == {"images that the file does not list, left out": 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_the_encodings_of_spreadsheets_are_read(tmp_path: Path, encoding: str) -> None:
    source = read(tmp_path, VOTT.replace("dog", "Köter").encode(encoding))
    assert [category.name for category in source.categories] == ["Köter", "cat"]


def test_a_table_holds_what_the_file_says(tmp_path: Path) -> None:
    text = (
        "img/a.jpg,1,2,11,8,dog\nimg/c.jpg,,,,,\nimg/b.jpg,5,5,80,15,dog\nimg/a.jpg,0,0,4,4,cat\n"
        "img/gone.jpg,0,0,4,4,cat\nimg/a.jpg,x,0,4,4,cat\n,1,1,2,2,cat\n\n"
    )
    report = prepare(tmp_path, text)
    assert (report.found, report.accepted, report.boxes, report.without_boxes, report.clipped) == (4, 3, 3, 1, 1)
    assert report.reasons == {"no such file: no image path matches the end of its path": 1}
    assert report.findings == {
        "rows without a class or four finite numbers, dropped": 1,
        "rows without an image, dropped": 1,
        "boxes of rejected images, dropped": 1,
    }
    rows = open_table(str(tmp_path / "table"), "images").read().to_pylist()
    assert [(row["image_id"], row["source_id"]) for row in rows] == [
        (0, "img/a.jpg"),
        (1, "img/c.jpg"),
        (2, "img/b.jpg"),
    ]
    # The boxes of an image need not follow each other.
    assert rows[0]["objects"]["bbox"] == [[1, 2, 10, 6], [0, 0, 4, 4]] and rows[0]["objects"]["id"] == [1, 3]
    assert rows[2]["objects"]["bbox"] == [[5, 5, 35, 10]]


def test_an_image_of_unusable_rows_is_rejected(tmp_path: Path) -> None:
    source = read(tmp_path, VOTT + "c.jpg,1,1,5,,dog\n")
    assert [record.refusal for record in source.images] == [None, None, csv_labels._ONLY_BAD_ROWS]


def test_paths_that_lead_to_one_image_are_not_mixed_up(tmp_path: Path) -> None:
    text = "one/a.jpg,0,0,4,4,dog\ntwo/a.jpg,0,0,9,9,dog\n"
    first, second = read(tmp_path, text).images
    assert first.refusal is None and second.refusal == csv_labels._SAME_FILE
    (tmp_path / "img" / "two").mkdir()
    (tmp_path / "img" / "a.jpg").rename(tmp_path / "img" / "two" / "a.jpg")
    first, second = read(tmp_path, text, images="").images
    assert (first.refusal, second.path) == (csv_labels._NO_FILE, "two/a.jpg") and second.refusal is None


def test_given_classes_keep_their_order_and_others_are_counted(tmp_path: Path) -> None:
    source = read(tmp_path, VOTT, classes=["fox", "dog"])
    first, second = source.images
    assert [category.name for category in source.categories] == ["fox", "dog"]
    assert first.objects is not None and first.objects.categories == [1]
    assert second.objects is not None and second.objects.ids == []
    assert source.findings["objects of classes that are not in --classes, dropped"] == 1


def test_fractions_need_a_word(tmp_path: Path) -> None:
    text = "a.jpg,0.25,0.5,0.5,1,dog\n"
    with pytest.raises(UserError, match=r"no coordinate is above 1, .* pass --fractions true"):
        read(tmp_path, text)
    report = prepare(tmp_path, text, fractions=True)
    (row,) = open_table(report.out, "images").read().to_pylist()
    assert row["objects"]["bbox"] == [[10, 10, 10, 10]]
    with pytest.raises(UserError, match=r"the coordinate 11.5, which is no fraction"):
        read(tmp_path, VOTT, fractions=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; expected the columns of VoTT"),
        ("a,b,c\n1,2,3\n", "begins with a, b, c; expected .* or name the columns, such as --columns"),
        ("image,x,y,width,height,label\n", "begins with image, x, y"),
        ('image,"x\ny",width\n', "begins with image, x y, width; "),
        (VOTT.split("\n")[0], "names no images"),
        ("a.jpg,,,,,\n", "has no box; for images without labels"),
        ("image;xmin;ymin;xmax;ymax;label\na.jpg;1,5;2;11;8;dog\n", "line 2 has the number 1,5 with a decimal comma"),
        ("a.jpg;1,5;2;11;8;dog\n", "line 1 has the number 1,5 with a decimal comma; write decimal points, as 1.5"),
        (VOTT.encode() + b"\xff", "is not text in UTF-8 or UTF-16"),
        (VOTT + "\0", "is not text: it contains NUL"),
        (VOTT + '"' + "x" * 200_000, "is not a CSV file: field larger than field limit"),
        (VOTT + "x" * 2**20, "a line of more than 1,048,576 characters"),
        ("a.jpg,1,2,3,4," + "\na.jpg,1,2,3,4,".join(map(str, range(10_001))), "more than 10,000 classes"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value) and "labels.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"file": 1}, "has the key 'file'; must be one of image, class"),
        ({"image": "image"}, "must have image, class, and either"),
        (
            {"image": "pic", "class": "label", "x": "x", "y": "y", "w": "w", "h": "h"},
            "image: pic: there is no such column",
        ),
        ({"image": 9, "class": 1, "x": 2, "y": 3, "w": 4, "h": 5}, "image: 9: there is no such column"),
    ],
)
def test_columns_that_do_not_exist_get_one_line(tmp_path: Path, columns: dict[str, str | int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(tmp_path, "image,x,y,w,h,label\na.jpg,1,2,3,4,dog\n", columns=columns)


def test_a_folder_or_nothing_instead_of_a_file_gets_one_line(tmp_path: Path) -> None:
    read(tmp_path, VOTT)
    for uri, words in ((tmp_path, "is a folder"), (tmp_path / "gone.csv", "no such annotations file")):
        with pytest.raises(UserError, match=words):
            read_file(uri, tmp_path / "img")


def test_a_large_file_is_read_in_chunks(tmp_path: Path) -> None:
    rows = "".join(f"img/{number % 1000:05d}.jpg,{number % 7},2,30,40,class{number % 5}\n" for number in range(30_000))
    source = read(tmp_path, rows)
    records = list(source.images)
    assert len(records) == 1000
    assert sum(len(record.objects.ids) for record in records if record.objects is not None) == 30_000


@settings(max_examples=200, deadline=None)
@given(
    head=st.sampled_from([VOTT, TENSORFLOW, RETINANET, OTHER, ""]),
    rest=st.text(alphabet="ab.jpg/,;\"'\n\r\t01-einf\0é\ud800", max_size=120) | st.binary(max_size=40),
)
def test_any_text_is_read_or_refused(head: str, rest: str | bytes) -> None:
    data = head.encode() + (rest if isinstance(rest, bytes) else rest.encode(errors="surrogatepass"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = read(Path(folder), data, images="a b")
        except UserError:
            return
        records = list(source.images)
    assert len(records) == source.num_images == len({record.image_id for record in records})
    for record in records:
        assert record.objects is not None and len(record.objects.ids) == len(record.objects.boxes_xywh)
        assert all(0 <= category < len(source.categories) for category in record.objects.categories)
