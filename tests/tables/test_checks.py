"""Tables of strangers: every file, number and name is checked before it is used, in one place for all commands."""

import json
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydet.common.errors import UserError
from raydet.tables.checks import check_unique, is_finite
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.schema import Category, build_schema, with_token
from raydet.tables.table import TableWriter, open_table

CATEGORIES = (Category(3, "cat"), Category(7, "dog"))
PART = "part-00000.parquet"
TOKEN = "0" * 12


def _row(number: int, **changes: Any) -> dict[str, Any]:
    box = {"bbox": [[0.0, 0.5, 1.0, 2.0]], "score": [0.5], "category": [1], **changes.pop("detections", {})}
    values = {"image_id": number, "path": f"{number}.jpg", "width": 4, "height": 3, "detections": box, "error": None}
    return {**values, **changes}


def _write(folder: Path, rows: list[dict[str, Any]] | None = None, **metadata: Any) -> Path:
    schema = build_schema("detections", CATEGORIES, extra_metadata=metadata)
    with TableWriter(str(folder), schema, config_hash=TOKEN) as writer:
        writer.write_rows([_row(number) for number in range(3)] if rows is None else rows)
    return folder


def _refusal(folder: Path, kind: Any = "detections") -> str:
    """Open and read a table, which must fail with one line."""
    with pytest.raises(UserError) as caught:
        open_table(str(folder), kind).read()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


# Manifests.


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not the manifest"),
        (b"null", "object"),
        (b"[" * 100_000, "too many lists"),
        (b'{"a": ' * 5_000 + b"1" + b"}" * 5_000, "nested too deeply"),
        (b"[" + b"[]," * 200_000 + b"1]", "too many lists"),
        (b'{"num_rows": NaN}', "NaN"),
        (b'{"num_rows": 1, "num_rows": 2}', "repeats the key"),
        (b"9" * 100_000, "digits"),
        (b"\xff\xfe{}", "manifest"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_manifests_that_are_bombs_or_no_json_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    folder = _write(tmp_path / "t")
    (folder / MANIFEST_NAME).write_bytes(content)
    assert reason in _refusal(folder)


def test_a_huge_manifest_is_refused_unread(tmp_path: Path) -> None:
    folder = _write(tmp_path / "t")
    os.truncate(folder / MANIFEST_NAME, 3 * 2**30)  # sparse: uses no disk space
    assert "64 MiB" in _refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("../other.parquet", "/etc/passwd", "a/b.parquet", "..", "", ".hidden.parquet", "_a.parquet", "part.txt"),
        *("a\0.parquet", "a\n.parquet", f"{'a' * 300}.parquet", "a\u202e.parquet", "C:\\a.parquet", "http://a.parquet"),
    ],
)
def test_file_names_that_are_no_part_of_the_table_are_refused(tmp_path: Path, name: str) -> None:
    folder = _write(tmp_path / "t")
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    manifest["files"][name] = manifest["files"].pop(PART)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert "not the name of a Parquet file" in _refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_rows": 4}, {"num_rows": None}, {"num_rows": "3"}, {"num_rows": True}, {"config_hash": 5}, {"token": 5}),
        *({"runs": []}, {"runs": {"x.parquet": {"run": "x"}}}, {"runs": {PART: {"run": 5}}}, {"id_space": 5}),
        *({"num_errors": "x"}, {"prepare": 1}, {"schema_version": "3"}, {"schema_version": [1]}, {"files": {PART: []}}),
        *({"files": {PART: [[2**62, 1], [2**62, 1]]}}, {"files": {PART: [[3, 2**62]]}}, {"files": {PART: [[True, 1]]}}),
        *({"token": "another run"}, {"token": {}}, {"files": {PART: [[3, 99]]}}),
    ],
    ids=str,
)
def test_manifests_that_lie_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = _write(tmp_path / "t")
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    (folder / MANIFEST_NAME).write_text(json.dumps({**manifest, **changes}))
    _refusal(folder)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket is limited to 108 bytes
        server.bind(path.name)
        os.chdir(here)


def _link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize("name", [MANIFEST_NAME, PART])
@pytest.mark.parametrize(
    "make",
    [_fifo, _socket, Path.mkdir, _link_to("/dev/zero"), _link_to("/etc/passwd"), _link_to("absent")],
    ids=["fifo", "socket", "folder", "device", "link", "dangling"],
)
def test_special_files_and_links_in_a_table_are_refused_without_waiting(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    folder = _write(tmp_path / "t")
    (folder / name).unlink()
    make(folder / name)
    _refusal(folder)


def test_a_table_may_be_reached_through_a_link(tmp_path: Path) -> None:
    _write(tmp_path / "t")
    (tmp_path / "link").symlink_to("t")
    assert open_table(str(tmp_path / "link"), "detections").read().num_rows == 3


def test_a_file_of_another_run_does_not_count(tmp_path: Path) -> None:
    folder, other = _write(tmp_path / "t"), tmp_path / "other"
    with TableWriter(str(other), build_schema("detections", CATEGORIES), config_hash="f" * 12) as writer:
        writer.write_rows([_row(number) for number in range(3)])
    size = (other / PART).stat().st_size
    assert size == (folder / PART).stat().st_size
    (other / PART).replace(folder / PART)
    assert "another run" in _refusal(folder)


def test_a_table_of_an_earlier_version_is_named_as_such(tmp_path: Path) -> None:
    folder = _write(tmp_path / "t")
    (folder / MANIFEST_NAME).rename(folder / "_manifest.json")
    assert "an earlier raydet" in _refusal(folder)


# Schemas and metadata.


def _with_schema(folder: Path, schema: pa.Schema, rows: pa.Table) -> Path:
    """Replace the file of a table by one with a schema of its own, and adapt the manifest."""
    pq.write_table(rows.replace_schema_metadata(with_token(schema, TOKEN).metadata), folder / PART)
    footer = pq.read_metadata(folder / PART)
    group = footer.row_group(0)
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    manifest |= {"num_rows": group.num_rows, "files": {PART: [[group.num_rows, group.total_byte_size]]}}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    "content",
    [
        *(5, [], "x", {}, {"kind": "detections"}, {"kind": [], "schema_version": 3, "categories": []}),
        *({"categories": 5}, {"categories": [5]}, {"categories": [{"id": "1", "name": "a"}]}),
        *({"categories": [{"id": 1, "name": 5}]}, {"categories": [{"id": True, "name": "a"}]}),
        *({"categories": [{"id": 1, "name": "a" * 2000}]}, {"categories": None}, {"checkpoint": 5}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_metadata_is_refused(tmp_path: Path, content: Any) -> None:
    folder = _write(tmp_path / "t")
    rows = pq.read_table(folder / PART)
    good = json.loads(rows.schema.metadata[b"raydet"])
    if isinstance(content, dict) and "kind" not in content and content:
        content = {**good, **content}
    schema = rows.schema.with_metadata({b"raydet": json.dumps(content).encode()})
    _refusal(_with_schema(folder, schema, rows))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("image_id", pa.array(["a", "b", "c"])),
        ("image_id", pa.array([1.0, 2.0, 3.0])),
        ("width", pa.array([1, 2, 3], pa.int32())),
        ("path", pa.array([b"a", b"b", b"c"])),
        ("detections", pa.array([1, 2, 3])),
        ("detections", pa.array([{"bbox": [1.0], "score": [1.0], "category": [1]}] * 3)),
        ("error", pa.nulls(3)),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path: Path, name: str, values: pa.Array) -> None:
    folder = _write(tmp_path / "t")
    rows = pq.read_table(folder / PART)
    changed = rows.set_column(rows.schema.get_field_index(name), name, values)
    assert "has the type" in _refusal(_with_schema(folder, rows.schema, changed))


def test_a_missing_or_repeated_column_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "t")
    rows = pq.read_table(folder / PART)
    assert "lacks the columns path" in _refusal(_with_schema(folder, rows.schema, rows.drop(["path"])))


# Rows.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": -1}, "image_id -1"),
        ({"image_id": 2**53}, "image_id"),
        ({"image_id": None}, "nulls"),
        ({"image_id": 0}, "duplicate image ids"),
        ({"width": -5}, "width -5"),
        ({"height": 2**40}, "height"),
        ({"detections": {"score": [math.nan]}}, "score that is not finite"),
        ({"detections": {"score": [1.5]}}, "score outside"),
        ({"detections": {"bbox": [[0.0, math.inf, 1.0, 1.0]]}}, "not finite"),
        ({"detections": {"bbox": [[0.0, 1.0, -1.0, 1.0]]}}, "negative width"),
        ({"detections": {"bbox": [[0.0, 1.0, 1.0, -1.0]]}}, "negative width or height"),
        ({"detections": {"category": [2]}}, "category"),
        ({"detections": {"category": [-1]}}, "category"),
        ({"detections": {"score": []}}, "differ in length"),
        ({"detections": {"bbox": [None]}}, "nulls"),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_rows", [3, 3000])
def test_values_out_of_range_are_refused(tmp_path: Path, change: dict[str, Any], reason: str, num_rows: int) -> None:
    rows = [_row(number) for number in range(num_rows)]
    rows[-1] = _row(num_rows - 1, **change)
    folder = _write(tmp_path / "t", rows)
    assert reason in _refusal(folder)
    table = open_table(str(folder), "detections")
    if "duplicate" not in reason:  # each row group by itself, as workers read it
        with pytest.raises(UserError, match=reason):
            list(table.read_row_groups(table.row_groups()))


def test_texts_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "t")
    rows = pq.read_table(folder / PART)
    path = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff\xfe", b"c"]).buffers())
    changed = rows.set_column(1, "path", path)
    assert "path" in _refusal(_with_schema(folder, rows.schema, changed))


def test_a_row_group_that_claims_more_values_than_raydet_writes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write(tmp_path / "t")
    monkeypatch.setattr("raydet.tables.table._MAX_VALUES", 3)  # of the four numbers of a box in each of three rows
    assert "larger than any" in _refusal(folder)


def test_repeated_ids_are_found_in_any_order() -> None:
    check_unique(np.array([], np.int64), "t")
    check_unique(np.array([5, 3, 4]), "t")
    with pytest.raises(UserError, match="image 3"):
        check_unique(np.array([5, 3, 4, 3]), "t")


def test_sums_that_overflow_do_not_hide_or_invent_infinities() -> None:
    assert is_finite(np.array([1e308, 1e308]))
    assert not is_finite(np.array([math.inf, -math.inf]))
    assert not is_finite(np.array([1.0, math.nan]))


def test_more_classes_than_a_table_holds_are_refused_before_it_is_written() -> None:
    with pytest.raises(UserError, match="100,001 classes; a table holds at most 100,000"):
        build_schema("images", [Category(number, str(number)) for number in range(100_001)])


@pytest.mark.parametrize("classes", [[0, 2], [-1], [None]])
def test_labelled_classes_must_exist(tmp_path: Path, classes: list[Any]) -> None:
    schema = build_schema("images", CATEGORIES, extra_fields=[pa.field("labelled_categories", pa.list_(pa.int64()))])
    objects: dict[str, Any] = {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
    row = {"image_id": 1, "image": {"path": "1.png"}, "width": 4, "height": 3, "objects": objects}
    for labelled in ([0, 1], [], None):
        with TableWriter(str(tmp_path / f"{labelled}"), schema, config_hash=TOKEN) as writer:
            writer.write_rows([{**row, "labelled_categories": labelled}])
        assert open_table(str(tmp_path / f"{labelled}"), "images").read()["labelled_categories"].to_pylist() == [
            labelled
        ]
    with TableWriter(str(tmp_path / "bad"), schema, config_hash=TOKEN) as writer:
        writer.write_rows([{**row, "labelled_categories": classes}])
    assert "labelled_categories has a value that is not one of the 2 categories" in _refusal(tmp_path / "bad", "images")


def test_labelled_classes_must_be_lists_of_whole_numbers(tmp_path: Path) -> None:
    schema = build_schema("images", CATEGORIES, extra_fields=[pa.field("labelled_categories", pa.string())])
    with TableWriter(str(tmp_path / "t"), schema, config_hash=TOKEN):
        pass
    assert "labelled_categories has the type string" in _refusal(tmp_path / "t", "images")
