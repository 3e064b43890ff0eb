"""Tables: complete or refused, with classes and version."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydet.common.errors import UserError
from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME, groups_of
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, is_table, open_table

CATEGORIES = (Category(3, "cat"), Category(7, "dog"))


def _row(image_id: int, size: int = 10) -> dict[str, object]:
    return {
        "image_id": image_id,
        "image": {"bytes": bytes(size), "path": f"{image_id}.jpg"},
        "width": 4,
        "height": 3,
        "objects": {"id": [1], "bbox": [[0.0, 0.5, 1.0, 2.0]], "category": [1], "area": [2.0], "iscrowd": [False]},
    }


def _write(path: Path, num_rows: int = 3) -> str:
    uri = str(path)
    with TableWriter(uri, build_schema("images", CATEGORIES), config_hash="abc") as writer:
        writer.write_rows([_row(image_id) for image_id in range(num_rows)])
    return uri


def test_what_is_written_is_read(tmp_path: Path) -> None:
    table = open_table(_write(tmp_path / "t"), "images")
    assert table.categories == CATEGORIES
    assert table.num_rows == 3
    assert table.read().to_pylist() == [_row(image_id) for image_id in range(3)]


def test_large_rows_make_several_row_groups_and_files(tmp_path: Path) -> None:
    with TableWriter(
        str(tmp_path / "t"), build_schema("images", CATEGORIES), config_hash="abc", file_bytes=40 * 2**20
    ) as writer:
        for image_id in range(12):
            writer.write_rows([_row(image_id, size=9 * 2**20)])
    table = open_table(str(tmp_path / "t"), "images")
    groups = table.row_groups()
    assert len(table.files) >= 2 and len(groups) == 6 and sum(group.num_rows for group in groups) == 12
    ids = [
        image_id for group in groups for image_id in table.read_row_group(group, ["image_id"])["image_id"].to_pylist()
    ]
    assert ids == list(range(12))
    footers = [pq.read_metadata(f"{tmp_path}/t/{name}") for name in table.files]
    stated = [(group.file, group.index, group.num_rows, group.num_bytes) for group in groups]
    assert stated == [
        (name, index, *group)
        for name, footer in zip(table.files, footers, strict=True)
        for index, group in enumerate(groups_of(footer))
    ]
    for first in (0, 1, 5, 11):
        for stop in range(first + 1, 13):
            found = table.row_groups(first, stop)
            assert found == tuple(
                group for group in groups if group.first_row < stop and first < group.first_row + group.num_rows
            )
    rows = [(position, row["image_id"].as_py()) for position, row in table.rows_at([11, 3, 4])]
    assert rows == [(3, 3), (4, 4), (11, 11)]


def test_planning_opens_no_file(tmp_path: Path) -> None:
    uri = _write(tmp_path / "t")
    table = open_table(uri, "images")
    (tmp_path / "t" / "part-00000.parquet").unlink()
    (group,) = table.row_groups()
    assert table.num_rows == group.num_rows == 3
    with pytest.raises(UserError, match=r"lacks the file part-00000\.parquet"):
        table.read_row_group(group)


def test_files_that_differ_from_the_manifest_are_refused(tmp_path: Path) -> None:
    table = open_table(_write(tmp_path / "t"), "images")
    other = Path(_write(tmp_path / "other", num_rows=2), "part-00000.parquet")
    other.replace(tmp_path / "t" / "part-00000.parquet")
    match = r"damaged: part-00000\.parquet has 2 rows .* states 3 rows"
    for read in (
        lambda: table.read_row_group(table.row_groups()[0]),
        lambda: list(table.iter_batches()),
        lambda: list(table.rows_at([1])),
    ):
        with pytest.raises(UserError, match=match):
            read()


@pytest.mark.parametrize(
    "files",
    [
        *(5, None, "a", ["a"], {"a": 5}, {"a": [5]}, {"a": [[5]]}, {"a": [[1, 2, 3]]}, {"a": {"b": 1}}),
        *({"a": [[1, 2], [3]]}, {"a": [["x", 1]]}, {"a": [[1, -1]]}, {"a": [[2**70, 1]]}),
    ],
    ids=json.dumps,
)
def test_manifests_of_another_form_are_refused(tmp_path: Path, files: object) -> None:
    uri = _write(tmp_path / "t")
    path = tmp_path / "t" / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": files}))
    with pytest.raises(UserError, match=MANIFEST_NAME):
        open_table(uri, "images")


def test_a_writer_that_fails_leaves_no_table(tmp_path: Path) -> None:
    def fail() -> None:
        with TableWriter(str(tmp_path / "t"), build_schema("images", CATEGORIES), config_hash="abc") as writer:
            writer.write_rows([_row(0)])
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert not is_table(str(tmp_path / "t"))
    with pytest.raises(UserError, match="did not finish"):
        open_table(str(tmp_path / "t"), "images")


def test_an_empty_table_keeps_its_schema(tmp_path: Path) -> None:
    table = open_table(_write(tmp_path / "t", num_rows=0), "images")
    assert table.num_rows == 0 and table.categories == CATEGORIES


def test_refuses_other_versions_other_kinds_and_what_is_no_table(tmp_path: Path) -> None:
    uri = _write(tmp_path / "t")
    with pytest.raises(UserError, match=r"images.*detections"):
        open_table(uri, "detections")
    with pytest.raises(UserError, match="absent"):
        open_table(str(tmp_path / "absent"), "images")
    manifest = json.loads((tmp_path / "t" / MANIFEST_NAME).read_text())
    (tmp_path / "t" / MANIFEST_NAME).write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(UserError, match="version 99"):
        open_table(uri, "images")
    (tmp_path / "t" / MANIFEST_NAME).write_text(json.dumps(manifest))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t" / "part-00000.parquet")
    with pytest.raises(UserError, match="is not a raydet table"):
        open_table(uri, "images")


def test_a_folder_of_tables_is_refused_with_their_names(tmp_path: Path) -> None:
    _write(tmp_path / "data" / "train")
    with pytest.raises(UserError, match=r"holds the table train; name it, such as .*/data/train$"):
        open_table(str(tmp_path / "data"), "images")
    _write(tmp_path / "data" / "val")
    with pytest.raises(UserError, match=r"holds the tables train and val; name one of them, such as .*/data/train$"):
        open_table(str(tmp_path / "data"), "images")
    # Two levels up, and among folders of other kinds.
    with pytest.raises(UserError, match=r"holds the tables data/train and data/val"):
        open_table(str(tmp_path), ("images", "detections"))
    with pytest.raises(UserError, match="not a complete raydet table"):
        open_table(str(tmp_path), "detections")


def test_other_files_and_folders_are_refused_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a folder of other files, such as a.jpg; make a table .* `raydet prepare`"):
        open_table(str(tmp_path), "images")
    with pytest.raises(UserError, match=r"a\.jpg is a file; a table is a folder"):
        open_table(str(tmp_path / "a.jpg"), "images")


def test_published_folders_replace_the_old_one_and_recover_from_a_kill(tmp_path: Path) -> None:
    for number in (1, 2):
        source = tmp_path / f"source{number}"
        source.mkdir()
        (source / f"file{number}").write_text("x")
        storage.publish_folder(str(source), str(tmp_path / "target"))
    assert storage.list_files(str(tmp_path / "target")) == ["file2"]
    (tmp_path / "target").rename(tmp_path / ".target.previous")
    (tmp_path / storage.partial_name("target")).mkdir()
    storage.recover_folder(str(tmp_path / "target"))
    assert storage.list_files(str(tmp_path / "target")) == ["file2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source1", "source2", "target"]


def test_a_table_shows_its_first_rows_and_becomes_a_data_frame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    categories = [Category(7, "cat"), Category(8, "<b>dog</b>")]
    rows = [
        {
            "image_id": number,
            "path": f"{number}.jpg",
            "width": 64,
            "height": 48,
            "detections": {"bbox": [[0, 0, 1, 1]] * 3, "score": [0.5] * 3, "category": [1, 0, 1]},
        }
        for number in range(30)
    ]
    with TableWriter(str(tmp_path / "found"), build_schema("detections", categories), config_hash="x") as writer:
        writer.write_rows(rows)
    table = open_table(str(tmp_path / "found"))
    assert table.kind == "detections"
    table.show(2)
    head, *shown, note = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["image_id", "path"] and len(shown) == 2
    assert "2 <b>dog</b>, 1 cat" in shown[0] and "30 rows" in note and "detections" in note
    table.show(0)
    assert len(capsys.readouterr().out.splitlines()) == 2
    page = table._repr_html_()
    assert page.count("<tr>") == 11 and "<b>" not in page and "&lt;b&gt;dog" in page
    assert table.to_pandas(["image_id", "path"])["path"].tolist() == [f"{number}.jpg" for number in range(30)]
