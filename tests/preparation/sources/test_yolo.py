"""YOLO data sets of all kinds become records; every image is listed, every invalid line counted."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydet.common.errors import UserError
from raydet.config import PrepareYoloConfig
from raydet.preparation.prepare import prepare_yolo
from raydet.preparation.report import PrepareReport
from raydet.preparation.sources.source import UNLABELLED, Source, SourceObjects
from raydet.preparation.sources.yolo import read_yolo
from raydet.preparation.sources.yolo_files import find_in_data_yaml, find_in_folders
from raydet.tables.table import open_table

DATA_YAML = "train: images/train\nval: images/val\nnames: [dog, cat]\n"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def picture(path: Path, size: tuple[int, int] = (40, 20), orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path, format="JPEG", exif=exif)


def read_lines(folder: Path, text: str) -> tuple[SourceObjects, dict[str, int]]:
    """Return the objects of one label file, for classes 0 and 1, and the non-zero findings."""
    write(folder, {"images/a.jpg": "", "labels/a.txt": text})
    source = read_yolo(find_in_folders(str(folder / "images"), str(folder / "labels"), ["dog", "cat"]))
    (record,) = source.images
    assert record.objects is not None and record.objects.is_normalised
    return record.objects, {finding: count for finding, count in source.findings.items() if count}


def paths(source: Source) -> list[str]:
    return [record.path for record in source.images]


def test_boxes_and_polygons_are_parts_of_the_image(tmp_path: Path) -> None:
    text = "\ufeff0 0.5 0.5 0.25 0.5\n\n1.0 .1 .2 .5 .2 .3 .6\r\n1 0.1 0.1 0.9 0.1 0.9 0.4 0.1 0.4\n"
    objects, findings = read_lines(tmp_path, text)
    assert objects.categories == [0, 1, 1] and objects.ids == [1, 2, 3]
    expected = [(0.375, 0.25, 0.25, 0.5), (0.1, 0.2, 0.4, 0.4), (0.1, 0.1, 0.8, 0.3)]
    np.testing.assert_allclose(objects.boxes_xywh, expected, atol=1e-15)
    np.testing.assert_allclose(objects.areas, [0.125, 0.16, 0.24])
    assert not findings


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 nan .5 .1 .1", "not a finite number"),
        ("0 inf .5 .1 .1", "not a finite number"),
        ("dog .5 .5 .1 .1", "not a finite number"),
        ("0 .5 .5 .1", "number of columns"),
        ("0 .5 .5 .1 .1 .9", "number of columns"),
        ("0 .5 .5 .1 .1 .9 .1 .2", "number of columns"),
        ("2 .5 .5 .1 .1", "unknown class"),
        ("-1 .5 .5 .1 .1", "unknown class"),
        ("0.5 .5 .5 .1 .1", "unknown class"),
        ("0 1.1 .5 .1 .1", "outside 0 to 1"),
        ("0 .5 .5 -.1 .1", "outside 0 to 1"),
        ("0 100 50 20 20", "outside 0 to 1"),
        ("0 .1 .1 .2 .2 .3 1.2", "outside 0 to 1"),
        ("0 .50 .5 .3 .3", "repeated"),
        ("\ufffd\ufffd", "not a finite number"),
    ],
)
def test_invalid_lines_are_dropped_and_counted(tmp_path: Path, line: str, words: str) -> None:
    objects, findings = read_lines(tmp_path, f"0 .5 .5 .3 .3\n{line}\n1 .5 .5 .2 .2\n")
    assert objects.categories == [0, 1]
    ((finding, count),) = findings.items()
    assert words in finding and count == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_label_file_is_read_in_the_encoding_that_an_editor_gave_it(tmp_path: Path, encoding: str) -> None:
    write(tmp_path, {"images/a.jpg": "", "labels/a.txt": ""})
    (tmp_path / "labels" / "a.txt").write_bytes("1 .5 .5 .1 .1\n".encode(encoding))
    source = read_yolo(find_in_folders(str(tmp_path / "images"), str(tmp_path / "labels"), ["dog", "cat"]))
    (record,) = source.images
    assert record.refusal is None and record.objects is not None and record.objects.categories == [1]
    assert not source.findings


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n", "its label file: not text in UTF-8 or UTF-16: byte 0 is invalid in UTF-8"),
        (b"0 .5 .5 .1 .1\n\0\0\0", "its label file: not text: it contains NUL characters"),
        (b"dog 1 2 3 4\n", "its label file: no usable line, only lines with a value that is not a finite number"),
        (b"0 .5 .5 .1 .1 .9\n" * 3, "its label file: no usable line, only lines with a wrong number of columns"),
        (b"0 100 50 20 20\n", "its label file: no usable line, only lines with numbers outside 0 to 1"),
    ],
)
def test_a_file_that_holds_no_labels_rejects_its_image(tmp_path: Path, content: bytes, reason: str) -> None:
    for name in "ab":
        picture(tmp_path / "images" / f"{name}.jpg")
    write(tmp_path, {"labels/b.txt": "", "labels/a.txt": ""})
    (tmp_path / "labels" / "a.txt").write_bytes(content)
    report = prepare_yolo(
        PrepareYoloConfig(
            images=str(tmp_path / "images"),
            labels=str(tmp_path / "labels"),
            classes=["dog"],
            out=str(tmp_path / "table"),
        )
    )
    # The empty file says that its image has no object.
    assert (report.found, report.accepted, report.without_boxes, report.reasons) == (2, 1, 1, {reason: 1})


def test_lines_of_other_classes_leave_an_image_without_objects(tmp_path: Path) -> None:
    objects, findings = read_lines(tmp_path, "7 .5 .5 .1 .1\n")
    assert not objects.ids and findings == {"lines of an unknown class, dropped": 1}


def test_data_yaml_and_lists_may_be_utf_16(tmp_path: Path) -> None:
    write(tmp_path, {"images/a.jpg": "", "labels/a.txt": "0 .5 .5 .1 .1\n"})
    (tmp_path / "list.txt").write_text("images/a.jpg\n", encoding="utf-16")
    (tmp_path / "data.yaml").write_text("train: list.txt\nnames: [Köter]\n", encoding="utf-16")
    source = read_yolo(find_in_data_yaml(str(tmp_path / "data.yaml"), "train"))
    assert source.categories[0].name == "Köter" and paths(source) == ["a.jpg"]
    (tmp_path / "data.yaml").write_bytes("names: [Köter]".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*data.yaml: not text in UTF-8"):
        find_in_data_yaml(str(tmp_path / "data.yaml"), "train")


def test_a_list_that_is_a_link_to_a_file_elsewhere_needs_allow_root(tmp_path: Path) -> None:
    write(tmp_path, {"set/images/a.jpg": "", "set/labels/a.txt": "0 .5 .5 .1 .1\n", "other/list.txt": "images/a.jpg\n"})
    (tmp_path / "set" / "list.txt").symlink_to(tmp_path / "other" / "list.txt")
    data = tmp_path / "set" / "data.yaml"
    data.write_text("train: list.txt\nnames: [dog]\n")
    with pytest.raises(UserError, match=r"cannot read the list of images .*outside its folder"):
        find_in_data_yaml(str(data), "train")
    assert find_in_data_yaml(str(data), "train", allow_root=[str(tmp_path / "other")]).pairs == [("a.jpg", "a.txt")]


def test_rounding_over_the_edge_is_no_cut(tmp_path: Path) -> None:
    objects, findings = read_lines(tmp_path, "0 0.500001 0.5 1.000001 1\n0 .05 .5 .2 .2\n")
    assert not findings
    left, _, width, _ = objects.boxes_xywh[0]
    assert left >= 0 and left + width <= 1 + 1e-12
    assert objects.boxes_xywh[1][0] == pytest.approx(
        -0.05
    )  # really outside: clipped and counted once the size is known


def prepare(data: Path, out: Path, **options: object) -> PrepareReport:
    return prepare_yolo(PrepareYoloConfig(data=str(data), out=str(out), **options))  # type: ignore[arg-type]


def test_boxes_are_pixels_of_the_upright_image(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "train" / "a.jpg")
    picture(tmp_path / "images" / "train" / "b.jpg", orientation=6)
    picture(tmp_path / "images" / "train" / "empty.jpg")
    (tmp_path / "images" / "train" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    line = "1 .5 .5 .5 .5\n0 .1 .5 .4 .2\n0 .5 .5 0 .1\n"
    write(tmp_path, {"data.yaml": DATA_YAML, "labels/train/a.txt": line, "labels/train/b.txt": line})
    write(tmp_path, {"labels/train/orphan.txt": line})
    report = prepare(tmp_path / "data.yaml", tmp_path / "table")
    table = open_table(str(tmp_path / "table"), "images")
    first, second, third = table.read().to_pylist()
    np.testing.assert_allclose(first["objects"]["bbox"], [[10, 5, 20, 10], [0, 8, 12, 4]], atol=1e-9)
    np.testing.assert_allclose(second["objects"]["bbox"], [[5, 10, 10, 20], [0, 16, 6, 8]], atol=1e-9)
    np.testing.assert_allclose(first["objects"]["area"], [200, 48])
    assert third["objects"]["bbox"] == [] and third["source_id"] == "empty.jpg"
    assert (report.found, report.accepted, report.rejected) == (4, 3, 1)
    assert (report.boxes, report.clipped, report.dropped, report.without_boxes) == (4, 2, 2, 1)
    assert report.findings["label files without an image"] == 1
    # The truncated image has no label file either.
    assert report.unlabelled_kept == 2 and "--unlabelled reject" in report.lines()[1]
    again = prepare(tmp_path / "data.yaml", tmp_path / "labelled", unlabelled="reject")
    assert (again.found, again.accepted, again.rejected) == (4, 2, 2) and again.reasons == {UNLABELLED: 2}
    assert again.unlabelled_kept == 0 and "--unlabelled keep" in again.lines()[1]
    assert [(category.id, category.name) for category in table.categories] == [(0, "dog"), (1, "cat")]


def test_names_may_be_a_mapping_with_gaps(tmp_path: Path) -> None:
    text = "train: images\nnames: {7: cat, 0: dog}\n"
    write(tmp_path, {"data.yaml": text, "images/a.jpg": "", "labels/a.txt": "7 .5 .5 .1 .1\n1 .5 .5 .1 .1\n"})
    source = read_yolo(find_in_data_yaml(str(tmp_path / "data.yaml"), "train"))
    assert [(category.id, category.name) for category in source.categories] == [(0, "dog"), (7, "cat")]
    (record,) = source.images
    assert record.objects is not None and record.objects.categories == [1]
    assert source.findings["lines of an unknown class, dropped"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "train: images/one",
        "path: .\ntrain: images/one",
        "path: gone\ntrain: ./images/one/",
        "path: {here}\ntrain: [images/one]",
        "train: ../images/one",
        "train: {here}/images/one",
        "train: list.txt",
        "train: lists/list.txt",
    ],
)
def test_images_are_found_however_they_are_named(tmp_path: Path, text: str) -> None:
    write(
        tmp_path,
        {
            "data.yaml": f"{text.format(here=tmp_path)}\nnames: [dog, cat]\n",
            "images/one/a.jpg": "",
            "images/one/sub/b.PNG": "",
            "labels/one/sub/b.txt": "1 .5 .5 .1 .1\n",
            "list.txt": "./images/one/a.jpg\nimages/one/sub/b.PNG\n\n",
            "lists/list.txt": f"{tmp_path}/images/one/a.jpg\nimages/one/sub/b.PNG\n".replace(
                "images/one/sub", "../images/one/sub"
            ),
        },
    )
    source = read_yolo(find_in_data_yaml(str(tmp_path / "data.yaml"), "train"))
    first, second = source.images
    assert (first.path, second.path) == ("a.jpg", "sub/b.PNG")
    assert first.objects is not None and first.objects.ids == []
    assert second.objects is not None and second.objects.categories == [1]


def test_several_folders_and_labels_beside_the_images(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "data.yaml": "val: [a/images, b/pictures]\nnames: [dog]\nnc: 1\n",
            "a/images/x.jpg": "",
            "a/labels/x.txt": "0 .5 .5 .1 .1\n",
            "b/pictures/x.jpg": "",
            "b/pictures/x.txt": "0 .5 .5 .2 .2\n",
        },
    )
    source = read_yolo(find_in_data_yaml(str(tmp_path / "data.yaml"), "val"))
    first, second = source.images
    assert (first.path, second.path) == ("a/images/x.jpg", "b/pictures/x.jpg")
    assert first.objects is not None and first.objects.areas == [pytest.approx(0.01)]
    assert second.objects is not None and second.objects.ids == [2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "must be a mapping"),
        ("names: [", "cannot read"),
        ("names: [dog]\n", "has no split `train`; it has none"),
        ("train: ////\nnames: [dog]\n", "is the root of the file system"),
        ("val: x\nnames: [dog]\n", "it has val"),
        ("train: nowhere\nnames: [dog]\n", "but there is no .*nowhere"),
        ("train: images\n", "names must list the classes"),
        ("train: images\nnames: {a: dog}\n", "must map numbers"),
        ("train: images\nnames: [dog, dog]\n", "two classes have the name 'dog'"),
        ("train: images\nnames: [dog]\nnc: 2\n", "nc is 2, but names has 1"),
        ("train: images\nnames: [dog]\nkpt_shape: [17, 3]\n", "keypoints"),
        ("train: bare\nnames: [dog]\n", "none of the 1 images"),
        ("train: void\nnames: [dog]\n", "no image file"),
        ("train: data.yaml.txt\nnames: [dog]\n", "image file extension"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, {"data.yaml": text, "images/a.jpg": "", "labels/a.txt": "", "bare/b.jpg": "", "void/x": ""})
    write(tmp_path, {"data.yaml.txt": "notes\n"})
    with pytest.raises(UserError, match=words) as caught:
        read_yolo(find_in_data_yaml(str(tmp_path / "data.yaml"), "train"))
    assert "\n" not in str(caught.value)


def test_the_folder_of_data_yaml_is_refused_with_its_path(tmp_path: Path) -> None:
    write(tmp_path, {"data.yaml": DATA_YAML})
    with pytest.raises(UserError, match=r"is a folder; did you mean --data .*/data.yaml\?"):
        find_in_data_yaml(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("images", "labels", "facts"),
    [
        ("images", "labels/train", ["images/train (", "holds test/, train/ and val/", "use these folders"]),
        ("images/train", "labels", ["label files in {0}/labels/train", "labels holds train/"]),
        ("images/train", "images", ["no .txt files and 3 others", "prepare images"]),
        ("images/test", "labels/train", ["first .txt file there is a.txt"]),
    ],
)
def test_folders_that_do_not_match_are_refused_with_a_suggestion(
    tmp_path: Path, images: str, labels: str, facts: list[str]
) -> None:
    write(tmp_path, dict.fromkeys(("images/train/a.jpg", "images/val/b.jpg", "images/test/c.jpg"), ""))
    write(tmp_path, {"labels/train/a.txt": "0 .5 .5 .1 .1\n"})
    with pytest.raises(UserError, match="has a label file") as caught:
        read_yolo(find_in_folders(str(tmp_path / images), str(tmp_path / labels), ["dog"]))
    assert all(fact.format(tmp_path) in str(caught.value) for fact in facts), caught.value
    assert "\n" not in str(caught.value)


def test_data_or_folders_but_not_both() -> None:
    for options in ({}, {"data": "data.yaml", "classes": ["dog"]}, {"images": "x", "labels": "y"}):
        with pytest.raises(UserError, match="either --data"):
            PrepareYoloConfig(out="table", **options)
