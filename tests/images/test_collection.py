import csv
import gzip
import io
import itertools
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.common.errors import UserError
from raydet.images.collection import INDEX_GROUP_ROWS, Collection, ImageRow, TableCollection, open_collection
from raydet.images.listing import is_pattern
from raydet.images.tars import Member, image_members
from raydet.tables import storage
from raydet.tables.layout import groups_of
from raydet.tables.schema import build_schema
from raydet.tables.table import TableWriter, read_footers, write_manifest

NO_OBJECTS: dict[str, list[float]] = {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}


def all_rows(images: Collection) -> list[ImageRow]:
    return list(images.read(0, images.num_rows))


def write_files(folder: Path, *names: str) -> dict[str, bytes]:
    """Write files whose content is derived from their name; collections do not decode images."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"picture {name}".encode())
    return {name: f"picture {name}".encode() for name in names}


def write_tar(path: Path, members: dict[str, bytes], file_format: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=file_format) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def write_table(folder: Path, rows: Sequence[tuple[bytes | None, str | None]], *, rows_per_file: int = 4) -> None:
    """Write an images table with row groups of two rows."""
    schema = build_schema("images")
    with TableWriter(str(folder), schema, config_hash="x", file_bytes=1) as writer:
        for start in range(0, len(rows), rows_per_file):
            # A separate file per batch, since any byte exceeds the file size limit.
            writer.write_rows(
                [
                    {
                        "image_id": 100 + number,
                        "image": {"bytes": data, "path": path},
                        "width": 40,
                        "height": 30 if number else 0,
                        "objects": NO_OBJECTS,
                    }
                    for number, (data, path) in enumerate(rows[start : start + rows_per_file], start)
                ]
            )
            writer.flush()
    names = sorted(file.name for file in folder.glob("*.parquet"))
    for name in names:
        pq.write_table(pq.read_table(folder / name), folder / name, row_group_size=2)
    groups = map(groups_of, read_footers(str(folder), names))
    write_manifest(str(folder), dict(zip(names, groups, strict=True)), config_hash="x")


def upload(bucket: str, files: dict[str, bytes]) -> None:
    import boto3

    client = boto3.client("s3")
    for name, data in files.items():
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=name, Body=data)


def test_every_awkward_picture_has_its_row_in_folder_tar_and_list(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "awkward"
    with (folder / "MANIFEST.csv").open() as manifest:
        names = sorted(row["file"] for row in csv.DictReader(manifest))
    write_tar(tmp_path / "all.tar", {name: (folder / name).read_bytes() for name in names})
    (tmp_path / "all.txt").write_text("".join(f"{folder / name}\n" for name in names))
    for data, kind in [(folder, "folder"), (tmp_path / "all.tar", "tar"), (tmp_path / "all.txt", "list")]:
        images = open_collection(str(data), index_uri=None)
        assert (images.kind, images.num_rows) == (kind, 29)
        for number, (row, name) in enumerate(zip(all_rows(images), names, strict=True)):
            assert (row.image_id, row.path.rpartition("/")[2], row.error) == (number, name, None)
            assert row.data == (folder / name).read_bytes()


def test_a_folder_is_listed_by_sorted_path_with_its_subfolders(tmp_path: Path) -> None:
    files = write_files(tmp_path, "b/2.JPG", "b/10.png", "a.webp", "c ä #?%41.jpg")
    write_files(tmp_path, "notes.txt", "b/2.json")
    images = open_collection(str(tmp_path), index_uri=None)
    rows = all_rows(images)
    assert [row.path for row in rows] == ["a.webp", "b/10.png", "b/2.JPG", "c ä #?%41.jpg"]
    assert [row.image_id for row in rows] == [0, 1, 2, 3]
    assert {row.path: row.data for row in rows} == files
    assert all(row.size_hw is None and row.error is None for row in rows)
    assert list(images.read(1, 3)) == rows[1:3]
    assert list(images.read(3, 99)) == rows[3:]
    assert list(images.read(2, 2)) == []


def test_what_cannot_be_read_is_a_row_with_its_reason(tmp_path: Path) -> None:
    write_files(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "4.jpg").symlink_to(tmp_path / "nowhere")
    with open(os.fsencode(tmp_path) + b"/5\xff.jpg", "wb") as file:  # noqa: PTH123 - the name is not valid text
        file.write(b"x")
    images = open_collection(str(tmp_path), index_uri=None)
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "3.jpg").unlink()
    (tmp_path / "3.jpg").mkdir()
    rows = all_rows(images)
    assert [row.path for row in rows] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5\\udcff.jpg"]
    assert [row.data is None for row in rows] == [False, True, True, True, True]
    assert [row.error for row in rows[:2]] == [None, "the file no longer exists"]
    assert rows[2].error is not None and "directory" in rows[2].error
    assert rows[3].error == "the file no longer exists"
    assert rows[4].error is not None and "not valid text" in rows[4].error


def test_a_list_says_which_and_in_which_order(tmp_path: Path) -> None:
    files = write_files(tmp_path, "z.jpg", "mit Leerzeichen und ß.jpg", "sub/日本.png", "x=1&y#2.jpg")
    elsewhere = write_files(tmp_path.parent / f"{tmp_path.name}-other", "o.jpg")
    other = tmp_path.parent / f"{tmp_path.name}-other" / "o.jpg"
    lines = [
        "\ufeffz.jpg",
        "# a comment",
        "",
        "  mit Leerzeichen und ß.jpg  ",
        "sub/日本.png\r",
        "\t",
        str(other),
        f"../{tmp_path.name}-other/o.jpg",
        f"file://{other}",
        "x=1&y#2.jpg",
        "gone.jpg",
        "z.jpg",
    ]
    (tmp_path / "list.lst").write_bytes("\n".join(lines).encode())
    images = open_collection(str(tmp_path / "list.lst"), index_uri=None)
    rows = all_rows(images)
    named = [line.strip("\ufeff \r\t") for line in lines]
    assert [row.path for row in rows] == [line for line in named if line and line[0] != "#"]
    assert [row.image_id for row in rows] == list(range(9))
    assert [row.data for row in rows] == [
        files["z.jpg"],
        files["mit Leerzeichen und ß.jpg"],
        files["sub/日本.png"],
        *[elsewhere["o.jpg"]] * 3,
        files["x=1&y#2.jpg"],
        None,
        files["z.jpg"],
    ]
    assert [row.error for row in rows if row.error] == ["no such file"]


def test_a_table_is_read_by_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "t", [(f"picture {number}".encode(), f"{number}.jpg") for number in range(11)])
    write_files(tmp_path / "t", "not_in_the_table.jpg")
    images = open_collection(str(tmp_path / "t"), index_uri=str(tmp_path / "index"))
    assert isinstance(images, TableCollection) and images.table.kind == "images"
    assert (images.kind, images.num_rows) == ("table", 11)
    assert not (tmp_path / "index").exists()
    rows = all_rows(images)
    assert [row.image_id for row in rows] == list(range(100, 111))
    assert [row.data for row in rows] == [f"picture {number}".encode() for number in range(11)]
    assert [row.size_hw for row in rows] == [None] + [(30, 40)] * 10
    for start, stop in itertools.combinations(range(12), 2):
        assert list(images.read(start, stop)) == rows[start:stop]
    loaded: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group

    def spy(file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        assert "objects" not in columns
        loaded.append(group)
        return read_row_group(file, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    reading = images.read(3, 7)
    next(reading)
    assert loaded == [1]
    assert len(list(reading)) == 3
    assert loaded == [1, 0, 1]
    (tmp_path / "t" / "part-00000.parquet").unlink()
    assert list(images.read(4, 11)) == rows[4:]  # the file with the first four rows is not opened


def test_a_table_by_reference_keeps_its_order_and_names_what_is_missing(tmp_path: Path) -> None:
    names = [f"{number:03d}.jpg" for number in range(90)]
    files = write_files(tmp_path / "pictures", *names)
    stored: list[tuple[bytes | None, str | None]] = [(None, str(tmp_path / "pictures" / name)) for name in names]
    stored[7], stored[8] = (b"inline", "x.jpg"), (None, None)
    write_table(tmp_path / "t", stored, rows_per_file=60)
    (tmp_path / "pictures" / names[70]).unlink()
    rows = all_rows(open_collection(str(tmp_path / "t"), index_uri=None))
    wanted: list[bytes | None] = [files[name] for name in names]
    wanted[7], wanted[8], wanted[70] = b"inline", None, None
    assert [row.data for row in rows] == wanted
    assert {number: row.error for number, row in enumerate(rows) if row.error} == {
        8: "the table has neither bytes nor a path for this image",
        70: "the file no longer exists",
    }


def test_the_fingerprint_changes_with_the_collection(tmp_path: Path) -> None:
    found = []
    for version, names in enumerate((["a.jpg"], ["b.jpg"], ["b.jpg", "c.jpg"])):
        write_files(tmp_path / "folder", *names)
        write_table(tmp_path / f"t{version}", [(b"x", name) for name in names] * (version + 1))
        write_tar(tmp_path / "x.tar", dict.fromkeys(names, b"x"))
        (tmp_path / "x.txt").write_text("\n".join(["folder/a.jpg", *names]))
        for data in ("folder", f"t{version}", "x.tar", "x.txt"):
            images = open_collection(str(tmp_path / data), index_uri=None)
            assert images.fingerprint == open_collection(str(tmp_path / data), index_uri=None).fingerprint
            assert len(images.fingerprint) == 16
            found.append(images.fingerprint)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("file_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_images_in_a_tar_are_found_whatever_its_format(tmp_path: Path, file_format: int) -> None:
    long = "/".join(["a folder with a long name"] * 4 + ["1.jpg"])
    if file_format != tarfile.USTAR_FORMAT:
        long = "ä" * 120 + "/" + "b" * 130 + ".jpg"
    members = {"./0.jpg": b"zero", long: b"x" * 1000, "empty.png": b"", "0.cls": b"3", "日本.JPEG": os.urandom(513)}
    with tarfile.open(tmp_path / "x.tar", "w", format=file_format) as tar:
        for kind, name in [(tarfile.DIRTYPE, "folder.jpg"), (tarfile.SYMTYPE, "s.jpg"), (tarfile.LNKTYPE, "h.jpg")]:
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "0.jpg"
            tar.addfile(header)
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    images = open_collection(str(tmp_path / "x.tar"), index_uri=None)
    rows = all_rows(images)
    assert images.kind == "tar"
    assert [row.path for row in rows] == ["x.tar/0.jpg", f"x.tar/{long}", "x.tar/empty.png", "x.tar/日本.JPEG"]
    assert [row.data for row in rows] == [data for name, data in members.items() if name != "0.cls"]


def test_sparse_members_are_left_out_and_what_follows_them_is_not(tmp_path: Path) -> None:
    with (tmp_path / "hole.jpg").open("wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(b"x" * 4096)
    (tmp_path / "whole.jpg").write_bytes(b"whole")
    for file_format in ("gnu", "pax"):
        command = ["tar", "--sparse", f"--format={file_format}", "-cf", "x.tar", "hole.jpg", "whole.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=30)
        assert (tmp_path / "x.tar").stat().st_size < 2**19
        rows = all_rows(open_collection(str(tmp_path / "x.tar"), index_uri=None))
        assert [(row.path, row.data) for row in rows] == [("x.tar/whole.jpg", b"whole")]


def test_shards_come_in_order_by_folder_glob_and_braces(tmp_path: Path) -> None:
    for shard in (8, 9, 10, 11):
        members = {f"{name}.jpg": f"{shard} {name}".encode() for name in "ba"}
        write_tar(tmp_path / f"train/s-{shard:03d}.tar", members)
    write_tar(tmp_path / "val/s-000.tar", {"v.jpg": b"v"})
    (tmp_path / "train" / "README").write_text("no image")
    everything = [f"s-{shard:03d}.tar/{name}.jpg" for shard in (8, 9, 10, 11) for name in "ba"]
    for data, wanted in [
        ("train", everything),
        ("train/", everything),
        ("train/*.tar", everything),
        ("train/s-{008..011}.tar", everything),
        ("train/s-0{08,11}.tar", everything[:2] + everything[6:]),
        ("train/s-01?.tar", everything[4:]),
        ("train/s-00[89].tar", everything[:4]),
        (
            "{val,train}/s-0?{0..8}.tar",
            ["val/s-000.tar/v.jpg", *(f"train/{everything[at]}" for at in (4, 5, 6, 7, 0, 1))],
        ),
        ("*/s-0[01]0.tar", [f"train/{everything[4]}", f"train/{everything[5]}", "val/s-000.tar/v.jpg"]),
    ]:
        images = open_collection(f"{tmp_path}/{data}", index_uri=None)
        assert [row.path for row in all_rows(images)] == wanted, data
        assert images.kind == "tar"
    [*_, row] = all_rows(open_collection(f"{tmp_path}/train", index_uri=None))
    assert row.data == b"11 a"


def test_only_the_headers_of_a_tar_are_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {f"{number}.jpg": bytes(2**20) for number in range(20)})
    counted = {"bytes": 0}

    class Counting(io.FileIO):
        def readinto(self, buffer: bytearray) -> int | None:  # type: ignore[override]
            num_bytes = super().readinto(buffer)
            counted["bytes"] += num_bytes or 0
            return num_bytes

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            counted["bytes"] += len(data or b"")
            return data or b""

    with pa.PythonFile(Counting(tmp_path / "x.tar", "rb"), mode="r") as file:
        assert len(image_members(file, "x.tar")) == 20
    assert 20 * 512 <= counted["bytes"] < 2**20 + 10_240


def _members(data: bytes) -> list[Member] | str:
    try:
        return image_members(pa.BufferReader(data), "x.tar")
    except UserError as error:
        return str(error)


def _small_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(4):
            header = tarfile.TarInfo(f"{number}.jpg")
            header.size = 700 * number
            tar.addfile(header, io.BytesIO(b"\xff" * header.size))
    return stream.getvalue()


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, 10_240), place=st.integers(0, 7000), value=st.integers(0, 255), cuts=st.booleans())
def test_a_damaged_tar_never_loses_an_image_silently(cut: int, place: int, value: int, cuts: bool) -> None:
    whole = _small_tar()
    expected = _members(whole)
    assert isinstance(expected, list) and len(expected) == 4
    changed = whole[:cut] if cuts else whole[:place] + bytes([value]) + whole[place + 1 :]
    result = _members(changed)
    if isinstance(result, str):
        assert result.startswith("x.tar ") and "\n" not in result
    else:
        assert result == expected


def test_data_that_give_no_images_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = _small_tar()
    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "texts", "a.csv", "b.csv")
    write_files(tmp_path / "packed", "s-0.tar.gz", "s-1.TGZ")
    write_files(tmp_path, "a.jpg", "x.parquet")
    (tmp_path / "many").mkdir()
    for number in range(3):
        (tmp_path / "many" / f"{number}.tar").write_bytes(whole if number != 1 else whole[:2000])
    contents = {
        "cut.tar": whole[:6144],
        "twice.tar": whole + whole,
        "zip.tar": gzip.compress(whole),
        "text.tar": b"what is this",
        "zero.tar": b"",
        "none.tar": bytes(10_240),
        "flipped.tar": whole[:2100] + b"\x07" + whole[2101:],
        "blank.txt": b"\n# only this\n\n",
        "folder.txt": b"a.jpg\nempty\n",
        "slash.txt": b"a.jpg\ns3://b/c/\n",
        "lost.txt": b"images/1.jpg\nimages/2.jpg\n",
        "latin.txt": "ä.jpg".encode("latin-1"),
        "scheme.txt": b"a.jpg\nfoo://x/y.jpg\n",
        "web.txt": b"a.jpg\nhttps://example.com/y.jpg\n",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    pq.write_table(build_schema("images").empty_table(), tmp_path / "empty" / "part-00000.parquet")
    write_table(tmp_path / "no_rows", [])
    for path, words in {
        "nowhere": f"{tmp_path}/nowhere",
        "empty": "no .manifest.json",
        "no_rows": "has no rows",
        "texts": "no image file",
        "packed": "packed/s-0.tar.gz is a compressed tar",
        "packed/s-0.tar.gz": "s-0.tar.gz is a compressed tar",
        "packed/*": "s-0.tar.gz is a compressed tar",
        "many": "many/1.tar is truncated",
        "many/{0..4}.tar": "many/1.tar is truncated",
        "many/{2..4}.tar": f"{tmp_path}/many/3.tar",
        "many/{2}.tar": "{2} in",
        "many/{4..2}.tar": "upwards",
        "many/{0..999}-{0..9999}.tar": "10,000,000 files",
        "many/x*.tar": "no file matches",
        "*.jpg": "a.jpg, which is not a .tar file",
        "a.jpg": "a.jpg is a file",
        "x.parquet": "x.parquet is a file",
        "cut.tar": "cut.tar is ",
        "twice.tar": "twice.tar continues after its end marker",
        "zip.tar": "zip.tar is a compressed tar",
        "text.tar": "text.tar is damaged",
        "zero.tar": "zero.tar is damaged",
        "none.tar": "no image in",
        "flipped.tar": "at byte 2,048",
        "blank.txt": "blank.txt is an empty list",
        "folder.txt": "line 2 of",
        "slash.txt": "line 2 of",
        "lost.txt": f"such as {tmp_path}/images/1.jpg",
        "latin.txt": "UTF-8",
        "scheme.txt": "cannot open foo://x",
        "web.txt": "line 2 of",
    }.items():
        with pytest.raises(UserError) as caught:
            open_collection(f"{tmp_path}/{path}", index_uri=str(tmp_path / "out" / "index"))
        assert words in str(caught.value), path
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_images_stays_one_whatever_else_is_in_it(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "b.parquet", "c.tar", "[old] {x}*/d.jpg")
    assert [row.path for row in all_rows(open_collection(str(tmp_path), index_uri=None))] == [
        "[old] {x}*/d.jpg",
        "a.jpg",
    ]
    assert open_collection(f"{tmp_path}/[old] {{x}}*", index_uri=None).num_rows == 1


def test_a_run_that_is_gone_on_with_sees_the_same_images(tmp_path: Path) -> None:
    index = str(tmp_path / "out" / "index.parquet")
    write_files(tmp_path / "images", "b.jpg", "d.jpg")
    images = open_collection(str(tmp_path / "images"), index_uri=index)
    rows = all_rows(images)
    write_files(tmp_path / "images", "a.jpg", "c.jpg")
    again = open_collection(f"{tmp_path}/images/", index_uri=index)
    assert again == images
    assert all_rows(again) == rows
    assert open_collection(str(tmp_path / "images"), index_uri=None).num_rows == 4
    assert len(pickle.dumps(again)) < 1000
    assert all_rows(pickle.loads(pickle.dumps(again))) == rows
    write_files(tmp_path / "others", "a.jpg")
    with pytest.raises(UserError, match=r"index.parquet .*/images, .*/others"):
        open_collection(str(tmp_path / "others"), index_uri=index)
    Path(index).write_bytes(Path(index).read_bytes()[:-10])
    with pytest.raises(UserError, match=r"index.parquet .*damaged"):
        open_collection(str(tmp_path / "images"), index_uri=index)


def test_a_long_index_is_read_in_parts(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg")
    num_rows = INDEX_GROUP_ROWS + 1000
    (tmp_path / "x.txt").write_text("a.jpg\n" + "".join(f"{number}.jpg\n" for number in range(1, num_rows)))
    index = tmp_path / "index"
    images = open_collection(str(tmp_path / "x.txt"), index_uri=str(index))
    metadata = pq.read_metadata(index)
    assert images.num_rows == num_rows
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [INDEX_GROUP_ROWS, 1000]
    rows = list(images.read(INDEX_GROUP_ROWS - 2, INDEX_GROUP_ROWS + 2))
    assert [row.image_id for row in rows] == [INDEX_GROUP_ROWS + step for step in (-2, -1, 0, 1)]
    assert [row.path for row in rows] == [f"{row.image_id}.jpg" for row in rows]


def test_a_tar_that_has_changed_since_is_noticed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": b"one", "2.jpg": b"two"})
    images = open_collection(f"{tmp_path}/*.tar", index_uri=None)
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(1537)
    first, second = all_rows(images)
    assert (first.data, second.error) == (b"one", "the tar file is shorter than when it was listed")
    (tmp_path / "a.tar").unlink()
    assert [row.error for row in all_rows(images)] == ["the file no longer exists"] * 2


def test_object_storage_is_as_good_as_a_disk(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x.tar", {"1.jpg": b"tar one", "2.png": b"tar two"})
    upload(
        bucket,
        {
            "images/b.jpg": b"b",
            "images/sub/a ä%41 #1.jpg": b"odd",
            "images/notes.md": b"no",
            "shards/s-00.tar": (tmp_path / "x.tar").read_bytes(),
            "shards/s-01.tar": (tmp_path / "x.tar").read_bytes(),
            "bad/s-00.tar": (tmp_path / "x.tar").read_bytes()[:700],
            "lists/x.txt": b"../images/b.jpg\ns3://runs/images/sub/a \xc3\xa4%41 #1.jpg\ns3://runs/gone.jpg\nc.jpg\n",
            "lists/c.jpg": b"c",
        },
    )
    shards = ["s-00.tar/1.jpg", "s-00.tar/2.png", "s-01.tar/1.jpg", "s-01.tar/2.png"]
    tars = [b"tar one", b"tar two"] * 2
    for number, (data, paths, contents) in enumerate(
        [
            ("images", ["b.jpg", "sub/a ä%41 #1.jpg"], [b"b", b"odd"]),
            ("shards", shards, tars),
            ("shards/*.tar", shards, tars),
            ("shards/s-{00..01}.tar", shards, tars),
            ("shards/s-00.tar", shards[:2], tars[:2]),
            (
                "lists/x.txt",
                ["../images/b.jpg", "s3://runs/images/sub/a ä%41 #1.jpg", "s3://runs/gone.jpg", "c.jpg"],
                [b"b", b"odd", None, b"c"],
            ),
        ]
    ):
        index = f"{bucket}/out-{number}/index.parquet"
        images = open_collection(f"{bucket}/{data}", index_uri=index)
        rows = all_rows(images)
        assert [row.path for row in rows] == paths
        assert [row.data for row in rows] == contents
        assert [row.error for row in rows] == [None if content else "no such file" for content in contents]
        assert open_collection(f"{bucket}/{data}", index_uri=index) == images
    write_table(tmp_path / "t", [(None, f"{bucket}/images/sub/a ä%41 #1.jpg"), (None, f"{bucket}/images/gone.jpg")])
    storage.publish_folder(str(tmp_path / "t"), f"{bucket}/t")
    table = open_collection(f"{bucket}/t", index_uri=None)
    assert [(row.data, row.error) for row in all_rows(table)] == [
        (b"odd", None),
        (None, "the file no longer exists"),
    ]
    for data, words in [
        ("nothing", "runs/nothing"),
        ("bad", "s3://runs/bad/s-00.tar is"),
        ("shards/s-{01..02}.tar", "s3://runs/shards/s-02.tar"),
        ("none/*.tar", "no file matches"),
    ]:
        with pytest.raises(UserError, match=words):
            open_collection(f"{bucket}/{data}", index_uri=f"{bucket}/refused")
    assert not storage.exists(f"{bucket}/refused")
    # Unreachable storage is not reported as an error of single images.
    local = open_collection(f"{bucket}/images", index_uri=str(tmp_path / "index"))
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"(?i)connect|curl"):
        list(local.read(0, 2))


def test_reading_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg")
    script = """
import sys
from raydet.images.collection import open_collection
images = open_collection(sys.argv[1], index_uri=None)
assert [row.data for row in images.read(0, 1)] == [b"picture a.jpg"]
heavy = {"torch", "torchvision", "ray", "transformers", "albumentations", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/table", False),
        ("s3://key:secret@bucket/table?endpoint_override=127.0.0.1%3A9000&scheme=http", False),
        ("s3://bucket/s-?.tar", True),
        ("s3://bucket/s-*.tar?region=eu-west-1", True),
        ("s3://bucket/{000..012}.tar", True),
        ("/no/such/table?a=b", True),
    ],
)
def test_options_of_a_uri_are_no_pattern(uri: str, expected: bool) -> None:
    assert is_pattern(uri) == expected
