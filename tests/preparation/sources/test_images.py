import os
from pathlib import Path

import pytest

from raydet import PrepareShapesConfig, prepare_shapes
from raydet.common.errors import UserError
from raydet.images.files import ImageFolder, ReadError
from raydet.preparation.sources.images import read_images


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def test_images_are_sorted_by_relative_path_and_ranked(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/z.JPeG", "a.jpg", "a/notes.txt", "c.heic", "jpg", ".jpg", "d.tif.bak"):
        touch(tmp_path / name)
    source = read_images(ImageFolder(str(tmp_path)))
    records = list(source.images)
    assert [record.path for record in records] == ["a.jpg", "a/z.JPeG", "b.PNG", "c.heic"]
    assert [record.image_id for record in records] == [0, 1, 2, 3]
    assert [record.extra["source_id"] for record in records] == [record.path for record in records]
    assert source.num_images == 4 and source.categories == ()


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "sub" / "a.jpg")
    touch(tmp_path / "elsewhere" / "b.jpg")
    (tmp_path / "images" / "sub" / "back").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    folder = ImageFolder(str(tmp_path / "images"))
    assert [record.path for record in read_images(folder).images] == ["dangling.jpg", "more", "sub/a.jpg"]
    with pytest.raises(ReadError, match="no such file"):
        folder.read("dangling.jpg")
    with pytest.raises(ReadError, match="symbolic link; --allow-root"):
        folder.read("more/b.jpg")
    folder = ImageFolder(str(tmp_path / "images"), allow_root=[str(tmp_path / "elsewhere")])
    assert [record.path for record in read_images(folder).images] == ["dangling.jpg", "more/b.jpg", "sub/a.jpg"]
    assert folder.read("more/b.jpg") == b"x"


def test_names_that_are_no_text_are_refused_not_lost(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"x")
    first, second = read_images(ImageFolder(str(tmp_path))).images
    assert first.refusal is None
    assert second.refusal == "the file name is not valid text"
    assert second.path.isprintable()


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such image folder: .*/none"):
        ImageFolder(str(tmp_path / "none"))
    touch(tmp_path / "file.jpg")
    with pytest.raises(UserError, match="is a file"):
        ImageFolder(str(tmp_path / "file.jpg"))
    touch(tmp_path / "docs" / "notes.txt")
    with pytest.raises(UserError, match=r"no image file below .*/docs \(1 other"):
        read_images(ImageFolder(str(tmp_path / "docs")))


def test_tables_are_not_taken_for_folders_of_images(tmp_path: Path) -> None:
    prepare_shapes(PrepareShapesConfig(out=str(tmp_path / "shapes"), num_train=1, num_val=1, image_size=32))
    with pytest.raises(UserError, match=r"/shapes: it holds images tables \(train\); commands that take images"):
        read_images(ImageFolder(str(tmp_path / "shapes")))
    with pytest.raises(UserError, match=r"/shapes/val: it is a table already; commands that take images"):
        read_images(ImageFolder(str(tmp_path / "shapes" / "val")))


def test_file_uris_and_odd_characters_are_read(tmp_path: Path) -> None:
    touch(tmp_path / "with space" / "50%#?.jpg")
    folder = ImageFolder((tmp_path / "with space").as_uri())
    (record,) = read_images(folder).images
    assert folder.read(record.path) == b"x"
    assert folder.uri_of(record.path) == str(tmp_path / "with space" / "50%#?.jpg")


def test_what_cannot_be_read_gets_a_reason(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    touch(tmp_path / "file.jpg")
    folder = ImageFolder(str(tmp_path))
    for name in ("folder.jpg", "file.jpg/inner.jpg", "none.jpg"):
        with pytest.raises(ReadError) as caught:
            folder.read(name)
        assert str(caught.value) and "\n" not in str(caught.value)
