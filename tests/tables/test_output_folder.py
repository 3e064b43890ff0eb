"""Output folders: ownership of files, resuming, and safety against hostile files."""

import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raydet.common.errors import RunError, UserError
from raydet.tables import storage
from raydet.tables.new_output import new_file, new_folder
from raydet.tables.output_folder import LOCK_FILE, RUN_FILE, OutputFolder, open_folder
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table

IDENTITY: dict[str, Any] = {
    "data": "s3://key:secret@bucket/images",
    "classes": ("cat", "dog"),
    "score_threshold": 0.0,
    "checkpoint_fingerprint": "aa",
    "data_fingerprint": "bb",
}


def folder_of(path: Path) -> OutputFolder:
    return OutputFolder(str(path), "predict")


def test_a_run_is_resumed_with_the_plan_of_the_first(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert folder.admit(IDENTITY) is None
    folder.begin(IDENTITY, plan={"rows_per_file": 8})
    (tmp_path / "part-0000000.parquet").touch()
    record = folder.admit({**IDENTITY, "data": "s3://other:credentials@bucket/images"})
    assert record is not None and record.plan == {"rows_per_file": 8} and record.command == "predict"
    assert "secret" not in (tmp_path / RUN_FILE).read_text()


def test_another_run_is_refused_with_each_difference(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.begin(IDENTITY)
    other = {**IDENTITY, "score_threshold": 0.5, "checkpoint_fingerprint": "cc", "data_fingerprint": "dd", "tile": 640}
    with pytest.raises(UserError) as refusal:
        folder.admit(other)
    for part in (str(tmp_path), "--score-threshold: 0.0 → 0.5", "weights", "images have changed", "--tile: None → 640"):
        assert part in str(refusal.value)
    assert folder.admit(other, is_disposable=True) is None
    with pytest.raises(UserError, match=r"command: predict → tune.*; choose another --out$"):
        OutputFolder(str(tmp_path), "tune").admit(IDENTITY, is_disposable=True, remedy="change the rate")
    sources: list[dict[str, Any]] = [{"source": "coco", "images": "a"}, {"source": "shapes", "seed": 1}]
    folder.begin(sources[0])
    with pytest.raises(UserError, match=r"\(source: coco → shapes\)"):
        folder.admit(sources[1])


def test_several_runs_share_a_folder_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.begin({"seed": 0}, folders=["metrics"], part="first")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "first.parquet").touch()
    assert folder.admit({"seed": 1}, folders=["metrics"], part="second") is None
    with pytest.raises(UserError, match="--seed: 0 → 1"):
        folder.admit({"seed": 1}, folders=["metrics"], part="first")


def test_files_of_others_are_refused_and_left(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "absent")
    folder.refuse_foreign(["states"])
    (tmp_path / ".lock").touch()
    (tmp_path / ".hidden").touch()
    folder = folder_of(tmp_path)
    folder.refuse_foreign()
    (tmp_path / "states" / "deep").mkdir(parents=True)
    (tmp_path / "states" / "deep" / "mine").touch()
    folder.refuse_foreign(["log"])
    with pytest.raises(UserError, match="states/deep/mine"):
        folder.admit({}, folders=["states"])
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"holiday\.jpg"):
        folder.admit({})
    folder.begin({}, folders=["log"])
    with pytest.raises(UserError, match="states/deep/mine"):
        folder.admit({}, folders=["log", "states"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 2, "ide', "damaged"),
        ('{"schema": 2}', "damaged"),
        ('{"data": "images", "seed": 0}', "version of raydet"),
        ("[]", "version of raydet"),
    ],
)
def test_a_record_that_cannot_be_read_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(UserError, match=message):
        folder_of(tmp_path).record()
    with pytest.raises(UserError, match=message) as error:
        folder_of(tmp_path).admit(IDENTITY)
    assert "\n" not in str(error.value)


def test_unfinished_files_of_a_killed_run_are_removed_and_no_others(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.begin({}, folders=["states"])
    (tmp_path / "states").mkdir()
    (tmp_path / "other").mkdir()
    partials = [tmp_path / place / storage.partial_name("a.pt") for place in (".", "states", "other")]
    for path in (*partials, tmp_path / ".mine.partial", tmp_path / "notes"):
        path.touch()
    folder.admit({}, folders=["states"])
    assert [path.exists() for path in partials] == [False, False, True]
    assert (tmp_path / ".mine.partial").exists() and (tmp_path / "notes").exists()


def test_links_are_neither_followed_nor_written_through(tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    out.mkdir()
    for name in ("part-00000.parquet", ".manifest.json", RUN_FILE):
        (out / name).symlink_to(victim)
    with TableWriter(str(out), build_schema("images", [Category(1, "a")]), config_hash="x"):
        pass
    folder_of(out).begin({})
    assert victim.read_text() == "precious" and open_table(str(out), "images").num_rows == 0
    assert not any((out / name).is_symlink() for name in ("part-00000.parquet", ".manifest.json", RUN_FILE))


@pytest.mark.parametrize("name", ["states", "log", "log/ray.log"])
def test_a_link_in_the_place_of_a_folder_or_log_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"link .* {name};"):
        folder_of(tmp_path / "out").admit({}, folders=["states"])


def test_a_linked_output_folder_is_the_user_s_choice(tmp_path: Path) -> None:
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big-disk")
    with open_folder(str(tmp_path / "out"), command="predict") as folder:
        folder.write_bytes(b"x", "a", "file")
    assert (tmp_path / "big-disk" / "a" / "file").read_bytes() == b"x"


def test_what_is_opened_travels_without_its_lock(tmp_path: Path) -> None:
    with open_folder(str(tmp_path / "out"), command="predict") as folder:
        copy = pickle.loads(pickle.dumps(folder))
        assert (copy.uri, copy.command) == (folder.uri, "predict")
        copy.check()
        with pytest.raises(UserError, match="in use"):
            open_folder(str(tmp_path / "out"), command="tune").__enter__()
        assert (tmp_path / "out" / LOCK_FILE).exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "http://127.0.0.1/out", "nosuch://bucket/out"])
def test_a_name_that_cannot_be_written_is_one_line_and_a_mistake(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    out = name if "://" in name else str(tmp_path / name)

    def as_file() -> Any:
        return new_file(f"{out}.json", command="export coco", endings=(".json",))

    openers = [lambda: open_folder(out, command="predict"), lambda: new_folder(out, command="export yolo")]
    for opener in [*openers, *([as_file] if name != "file" else [])]:
        with pytest.raises(UserError) as error, opener():
            raise AssertionError("opened")
        assert "\n" not in str(error.value) and name[:20] in str(error.value)


@pytest.mark.parametrize(
    ("number", "message"),
    [(28, "No space left"), (13, "no permission"), (30, "Read-only"), (5, "Input/output error")],
)
def test_a_disk_or_right_that_is_missing_is_one_line(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(RunError, match=message) as error, open_folder(str(tmp_path / "out"), command="predict"):
        raise OSError(number, os.strerror(number))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="the user's"), open_folder(str(tmp_path / "out"), command="predict"):
        raise UserError("the user's")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(RunError, match="no permission"):
            open_folder(str(tmp_path / "out"), command="predict").__enter__()
    finally:
        tmp_path.chmod(0o755)


def test_new_files_and_folders_appear_complete_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r.json"

    def failing_file() -> None:
        with new_file(str(out), command="export coco", endings=(".json",)) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    def failing_folder() -> None:
        with new_folder(str(tmp_path / "new"), command="export yolo") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    for fail in (failing_file, failing_folder):
        with pytest.raises(KeyboardInterrupt):
            fail()
    assert list(tmp_path.iterdir()) == []
    with new_file(str(out), command="export coco", endings=(".json",)) as file:
        file.write(b"whole")
    with pytest.raises(KeyboardInterrupt):
        failing_file()
    assert out.read_bytes() == b"whole" and [path.name for path in out.parent.iterdir()] == ["r.json"]
    with new_folder(str(tmp_path / "new"), command="export yolo") as folder:
        (folder / "a").touch()
    with pytest.raises(UserError, match="such as a"):
        new_folder(str(tmp_path / "new"), command="export yolo").__enter__()
    with pytest.raises(UserError, match="is a folder"):
        new_file(str(tmp_path), command="report", endings=("",)).__enter__()


def test_what_a_killed_export_leaves_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    mine, other = tmp_path / storage.partial_name("r.json"), tmp_path / storage.partial_name("s.json")
    for path in (mine, other, tmp_path / ".r.json.lock"):
        path.write_bytes(b"half")
    with new_file(str(tmp_path / "r.json"), command="export coco", endings=(".json",)) as file:
        file.write(b"{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["r.json", other.name])
    (tmp_path / storage.partial_name("new")).mkdir()
    with new_folder(str(tmp_path / "new"), command="export yolo"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["new", "r.json", other.name])


def test_a_store_gets_files_and_records(tmp_path: Path) -> None:
    out = f"memory://bucket/{tmp_path.name}"
    with new_file(f"{out}/r.json", command="export coco", endings=(".json",)) as file:
        file.write(b"{}")
    assert storage.list_files(out) == ["r.json"]
    with pytest.raises(UserError, match=r"such as r\.json"):
        OutputFolder(out, "predict").admit({})


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    private = tmp_path / "private"
    (private / "sub").mkdir(parents=True)
    for path in (private / "a", private / "sub" / "b"):
        path.write_text("x")
        path.chmod(0o600)
    for path in (private, private / "sub"):
        path.chmod(0o700)
    before = os.umask(0o027)
    try:
        storage.publish_folder(str(private), str(tmp_path / "checkpoint"))
        storage.write_bytes(str(tmp_path / "file"), b"x")
        with TableWriter(str(tmp_path / "table"), build_schema("images"), config_hash="x"):
            pass
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
        if "private" not in str(path.relative_to(tmp_path))
    }
    assert {name: modes.pop(name) for name in ("checkpoint", "checkpoint/sub", "table")} == {
        "checkpoint": 0o750,
        "checkpoint/sub": 0o750,
        "table": 0o750,
    }
    assert set(modes.values()) == {0o640} and {"checkpoint/a", "checkpoint/sub/b", "file"} < set(modes)


def test_a_table_that_fails_leaves_no_file_and_names_may_be_long(tmp_path: Path) -> None:
    schema = build_schema("rejected")

    def fail() -> None:
        with TableWriter(str(tmp_path / "t"), schema, config_hash="x") as writer:
            writer.write(pa.RecordBatch.from_pylist([{"path": "a", "reason": "b"}], schema=schema))
            writer.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list((tmp_path / "t").iterdir()) == []
    name = "é" * 127
    storage.write_bytes(str(tmp_path / name), json.dumps({}).encode())
    assert storage.is_partial(storage.partial_name(name), of=name) and (tmp_path / name).exists()


def test_a_folder_of_shared_runs_is_refused_to_other_commands(tmp_path: Path) -> None:
    with open_folder(str(tmp_path / "out"), command="evaluate") as folder:
        folder.admit({"seed": 0}, folders=["metrics"], part="a")
        folder.begin({"seed": 0}, folders=["metrics"], part="a")
    with (
        open_folder(str(tmp_path / "out"), command="train") as folder,
        pytest.raises(UserError, match="command: evaluate → train"),
    ):
        folder.admit({"seed": 0}, folders=["states"])
