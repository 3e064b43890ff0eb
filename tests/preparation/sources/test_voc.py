"""Pascal VOC files of all kinds become records; every image and XML file is accounted for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydet.common.errors import UserError
from raydet.config import PrepareVocConfig
from raydet.config.preparing import Unlabelled
from raydet.images.files import ImageFolder
from raydet.preparation.prepare import prepare_voc
from raydet.preparation.report import PrepareReport
from raydet.preparation.sources.source import UNLABELLED, UNLABELLED_KEPT, Source, SourceImage
from raydet.preparation.sources.voc import read_voc
from raydet.tables.table import open_table


def xml(*objects: str, file_name: str = "", size: str = "") -> str:
    return f"<annotation><filename>{file_name}</filename>{size}{''.join(objects)}</annotation>"


def item(name: str = "dog", corners: tuple[object, ...] = (1, 2, 10, 12), more: str = "") -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def picture(path: Path, size: tuple[int, int] = (20, 16), orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path, format="JPEG", exif=exif)


def read(
    folder: Path,
    split: str | None = None,
    classes: list[str] | None = None,
    zero_based: bool = False,
    unlabelled: Unlabelled = "reject",
) -> Source:
    for name in ("xml", "img"):
        (folder / name).mkdir(exist_ok=True)
    config = PrepareVocConfig(
        annotations=str(folder / "xml"),
        images=str(folder / "img"),
        out="unused",
        split=split,
        classes=classes,
        zero_based=zero_based,
        unlabelled=unlabelled,
    )
    return read_voc(config, ImageFolder(config.images))


def records(source: Source) -> dict[str, SourceImage]:
    return {record.path: record for record in source.images}


def test_first_pixel_is_1_or_0(tmp_path: Path) -> None:
    write(
        tmp_path, {"xml/a.xml": xml(item(corners=(1, 2, 10, 12)), item(corners=(0, 1.25, 5.5, 7))), "img/a.jpg": b"x"}
    )
    (record,) = read(tmp_path).images
    assert record.objects is not None
    assert record.objects.boxes_xywh == [(0, 1, 10, 11), (-1, 0.25, 6.5, 6.75)]
    assert record.objects.areas == [110, 6.5 * 6.75]
    source = read(tmp_path, zero_based=True)
    (record,) = source.images
    assert record.objects is not None
    assert record.objects.boxes_xywh == [(1, 2, 9, 10), (0, 1.25, 5.5, 5.75)]
    assert not sum(source.findings.values())
    before_first = [count for text, count in read(tmp_path).findings.items() if "before pixel 1" in text]
    assert before_first == [1]


def test_every_image_and_xml_file_is_named_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "xml/a.xml": xml(item(), file_name="other.png"),
            "img/a.JPEG": b"x",
            "img/sub/b.png": b"x",
            "xml/sub/b.XML": xml(item("cat")),
            "img/none.jpg": b"x",
            "xml/lonely.xml": xml(item()),
            "xml/broken.xml": "<annotation><object>",
            "img/broken.jpg": b"x",
            "img/notes.txt": b"x",
        },
    )
    source = read(tmp_path, unlabelled="keep")
    found = records(source)
    assert source.num_images == len(found) == 5
    assert [(category.id, category.name) for category in source.categories] == [(1, "cat"), (2, "dog")]
    assert [record.image_id for record in found.values()] == list(range(5))
    assert list(found) == sorted(found)
    refusals = {path: record.refusal for path, record in found.items() if record.refusal}
    assert refusals.keys() == {"lonely.xml", "broken.jpg"}
    assert "no such file" in str(refusals["lonely.xml"]) and "broken XML" in str(refusals["broken.jpg"])
    without = found["none.jpg"].objects
    assert without is not None and without.ids == []
    assert found["sub/b.png"].extra == {"source_id": "sub/b"}
    ids = [id_ for record in found.values() if record.objects for id_ in record.objects.ids]
    assert sorted(ids) == list(range(1, len(ids) + 1))
    assert source.findings["`filename` tags that name another image"] == 1
    assert source.findings[UNLABELLED_KEPT] == 1
    rejected = records(read(tmp_path, unlabelled="reject"))
    assert list(rejected) == list(found) and rejected["none.jpg"].refusal == UNLABELLED


def test_a_split_takes_its_images_only_but_all_classes(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "xml/a.xml": xml(item("owl")),
            "xml/b 1.xml": xml(item("dog")),
            "xml/c.xml": xml(item("cat")),
            "img/a.jpg": b"x",
            "img/b 1.jpg": b"x",
            "img/c.jpg": b"x",
            "train.txt": "\ufeffb 1\na  -1\n\nmissing 1\na\n",
        },
    )
    source = read(tmp_path, split=str(tmp_path / "train.txt"))
    found = records(source)
    assert list(found) == ["a.jpg", "b 1.jpg", "missing"]
    assert "no such file" in str(found["missing"].refusal)
    assert [category.name for category in source.categories] == ["cat", "dog", "owl"]
    assert source.findings["repeated lines in the split file, skipped"] == 1


def test_given_classes_keep_their_order_and_others_are_counted(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "xml/a.xml": xml(item("owl"), item("dog"), item("cat")),
            "img/a.jpg": b"x",
            "names.txt": "owl\ncat\n",
        },
    )
    for classes in (["owl", "cat"], [str(tmp_path / "names.txt")]):
        source = read(tmp_path, classes=classes)
        (record,) = source.images
        assert [category.name for category in source.categories] == ["owl", "cat"]
        assert record.objects is not None and record.objects.categories == [0, 1]
        assert source.findings["objects of classes that are not in --classes, dropped"] == 1
    with pytest.raises(UserError, match="distinct names, got 'cat'"):
        read(tmp_path, classes=["cat", "cat"])


def test_difficult_is_crowd_and_parts_are_no_objects(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    objects = (
        item(more="<difficult>1</difficult>"),
        item(more=part),
        item(more="<difficult> 0 </difficult>"),
        item(more="<difficult>yes</difficult>"),
        item(corners=("nan", 1, 2, 3)),
        item(corners=("", 1, 2, 3)),
        item(name=""),
        "<object><name>dog</name></object>",
    )
    write(tmp_path, {"xml/a.xml": xml(*objects), "img/a.jpg": b"x"})
    source = read(tmp_path)
    (record,) = source.images
    assert record.objects is not None
    assert record.objects.iscrowd == [True, False, False, False]
    assert [category.name for category in source.categories] == ["dog"]
    assert sorted(count for count in source.findings.values() if count) == [1, 4]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>', "DOCTYPE"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "DOCTYPE"),
        ("", "broken XML"),
        ("\0\1", "broken XML"),
        ("<html/>", "its root is <html>"),
        ('<?xml version="1.0" encoding="gb2312"?><annotation/>', "broken XML"),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', "broken XML"),
        ("<annotation>&unknown;</annotation>", "broken XML"),
        ("<annotation>" * 50_000, "broken XML"),
    ],
)
def test_broken_and_dangerous_xml_is_refused_with_a_reason(tmp_path: Path, content: str, words: str) -> None:
    write(tmp_path, {"xml/a.xml": content, "img/a.jpg": b"x"})
    (record,) = read(tmp_path, classes=["dog"]).images
    assert record.refusal is not None and words in record.refusal and "\n" not in record.refusal


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("is_declared", [True, False])
def test_xml_is_read_in_the_encoding_that_an_editor_gave_it(tmp_path: Path, encoding: str, is_declared: bool) -> None:
    declared = "latin-1" if encoding == "latin-1" else "utf-8"  # editors leave the declaration as it was
    text = f"<?xml version='1.0' encoding='{declared}'?>" * is_declared + xml(item("Köter"))
    write(tmp_path, {"xml/a.xml": text.encode(encoding), "img/a.jpg": b"x", "xml/b.xml": xml(item()), "img/b.jpg": b""})
    source = read(tmp_path)
    record = records(source)["a.jpg"]
    if encoding == "latin-1" and not is_declared:
        assert record.refusal is not None and record.refusal.startswith("broken XML")
    else:
        assert record.refusal is None and [category.name for category in source.categories] == ["Köter", "dog"]


def test_objects_without_a_usable_box_reject_their_image(tmp_path: Path) -> None:
    bad = "<object><name>dog</name><bndbox><x>1</x></bndbox></object>"
    write(tmp_path, {"xml/a.xml": xml(bad), "xml/b.xml": xml(bad, item()), "xml/c.xml": xml()})
    write(tmp_path, {f"img/{name}.jpg": b"" for name in "abc"})
    found = records(read(tmp_path))
    assert found["a.jpg"].refusal == "its XML file: none of its objects has a name and a box of four numbers"
    assert found["b.jpg"].refusal is None and found["c.jpg"].refusal is None


def test_of_two_images_of_one_name_the_tag_decides(tmp_path: Path) -> None:
    write(tmp_path, {"img/a.jpg": b"x", "img/a.png": b"x", "xml/a.xml": xml(item(), file_name="a.png")})
    found = records(read(tmp_path))
    assert found["a.png"].refusal is None and "another image" in str(found["a.jpg"].refusal)
    write(tmp_path, {"xml/a.xml": xml(item(), file_name="else.png")})
    assert all(record.refusal for record in read(tmp_path).images)


def prepare(folder: Path, **options: object) -> PrepareReport:
    return prepare_voc(
        PrepareVocConfig(
            annotations=str(folder / "xml"),
            images=str(folder / "img"),
            out=str(folder / "table"),
            **options,  # type: ignore[arg-type]
        )
    )


def test_boxes_of_the_unturned_image_are_turned_with_it(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg", size=(20, 16), orientation=6)
    picture(tmp_path / "img" / "b.jpg", size=(20, 16), orientation=6)
    unturned = "<size><width>20</width><height>16</height></size>"
    write(tmp_path, {"xml/a.xml": xml(item(corners=(1, 2, 10, 12)), size=unturned), "xml/b.xml": xml(item())})
    report = prepare(tmp_path)
    turned, upright = open_table(str(tmp_path / "table"), "images").read().to_pylist()
    assert (turned["width"], turned["height"]) == (16, 20)
    assert turned["objects"]["bbox"] == [[16 - 1 - 11, 0, 11, 10]]
    assert upright["objects"]["bbox"] == [[0, 1, 10, 11]]
    assert report.rotated == 1 and report.size_mismatches == 0


def test_the_report_adds_up(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg")
    picture(tmp_path / "img" / "b.jpg")
    wrong_size = "<size><width>500</width><height>500</height></size>"
    write(
        tmp_path,
        {
            "xml/a.xml": xml(item(corners=(5, 5, 40, 10)), item(corners=(9, 9, 3, 3)), item(), size=wrong_size),
            "img/torn.jpg": b"\xff\xd8\xff",
            "xml/lonely.xml": xml(item()),
        },
    )
    report = prepare(tmp_path, unlabelled="keep")
    assert (report.found, report.accepted, report.rejected) == (4, 2, 2)
    assert (report.boxes, report.clipped, report.dropped, report.size_mismatches) == (2, 1, 1, 1)
    assert report.without_boxes == 1 and report.boxes_by_class == {"dog": 2}
    # The truncated image has no XML file either.
    assert report.unlabelled_kept == 2 and "2 without labels" in report.lines()[1]
    assert prepare(tmp_path, unlabelled="keep").already_done


def test_a_stated_size_that_no_image_has_is_ignored(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg", size=(20, 16))
    impossible = "<size><width>1e300</width><height>16</height></size>"
    write(tmp_path, {"xml/a.xml": xml(item(corners=(1, 2, 10, 12)), size=impossible)})
    assert prepare(tmp_path).accepted == 1
    (row,) = open_table(str(tmp_path / "table"), "images").read().to_pylist()
    assert (row["width"], row["height"]) == (20, 16) and row["objects"]["bbox"] == [[0, 1, 10, 11]]


def test_images_without_an_xml_file_are_rejected_unless_kept(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg")
    picture(tmp_path / "img" / "b.jpg")
    picture(tmp_path / "img" / "c.jpg")
    write(tmp_path, {"xml/a.xml": xml(item()), "xml/c.xml": xml()})
    report = prepare(tmp_path)
    assert (report.found, report.accepted, report.rejected, report.without_boxes) == (3, 2, 1, 1)
    assert report.reasons == {UNLABELLED: 1} and report.unlabelled_kept == 0
    assert "--unlabelled keep" in report.lines()[1]
    paths = open_table(str(tmp_path / "table"), "images").read(["source_id"]).column("source_id").to_pylist()
    assert paths == ["a", "c"]


def test_every_image_with_an_xml_file_needs_no_word_about_labels(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg")
    write(tmp_path, {"xml/a.xml": xml(item())})
    assert not any("label file" in line for line in prepare(tmp_path).lines())


@pytest.mark.parametrize(
    ("annotations", "images", "facts"),
    [
        ("img", "img", ["--annotations", "no XML files, but 2 others"]),
        ("img/val", "all", ["no XML files", "--images", "all holds 2"]),
        ("all", "all", ["--annotations {0}/all/xml --images {0}/all/img"]),
        ("all", "all/img", ["--annotations holds xml/", "did you mean --annotations {0}/all/xml?"]),
        ("flat", "img", ["--images holds train/ and val/", "--images {0}/img/train?"]),
        ("other", "img/train", ["z.xml and a.jpg", "prepare images"]),
        ("all", "none", ["no image file"]),
    ],
)
def test_folders_that_do_not_match_are_refused_with_a_suggestion(
    tmp_path: Path, annotations: str, images: str, facts: list[str]
) -> None:
    for path in ("img/train/a.jpg", "img/val/b.jpg", "all/img/a.jpg"):
        picture(tmp_path / path)
    write(tmp_path, dict.fromkeys(("all/xml/a.xml", "all/xml/b.xml", "flat/a.xml", "other/z.xml"), xml(item())))
    (tmp_path / "none").mkdir()
    config = PrepareVocConfig(
        annotations=str(tmp_path / annotations), images=str(tmp_path / images), out=str(tmp_path / "table")
    )
    with pytest.raises(UserError) as caught:
        prepare_voc(config)
    assert all(fact.format(tmp_path) in str(caught.value) for fact in facts), caught.value
    assert "\n" not in str(caught.value) and not (tmp_path / "table").exists()


def test_a_split_without_labels_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"xml/a.xml": xml(item()), "img/a.jpg": b"x", "img/b.jpg": b"x", "val.txt": "b\nc\n"})
    with pytest.raises(UserError, match=r"val.txt names 2 images, none of which"):
        read(tmp_path, split=str(tmp_path / "val.txt"))


def test_a_folder_of_links_is_refused_for_what_it_is(tmp_path: Path) -> None:
    write(tmp_path, {"blobs/1": xml(item()), "img/a.jpg": b"x"})
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "a.xml").symlink_to("../blobs/1")
    with pytest.raises(UserError, match=r"all 1 XML files .*symbolic links that lead out.*--allow-root .*/blobs"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "no.txt"}, "no such split file"),
        ({"annotations": "no"}, "no such annotation folder"),
        ({"annotations": "bare"}, "no object in any XML file"),
        ({"images": "xml/a.xml"}, "images must name the folder"),
        ({"split": "empty.txt"}, "names no image"),
        ({"classes": ["none.txt"]}, "cannot read the classes"),
    ],
)
def test_mistakes_get_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"xml/a.xml": xml(item()), "bare/a.xml": xml(), "empty.txt": "\n"})
    picture(tmp_path / "img" / "a.jpg")
    settings = {"annotations": "xml", "images": "img", "out": "table", **options}
    with pytest.raises(UserError, match=words) as caught:
        prepare_voc(PrepareVocConfig(**settings))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and not (tmp_path / "table").exists()
