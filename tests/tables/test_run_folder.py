"""The hold on an output folder with real processes that are killed, on a disk and in stand-ins for object stores."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydet.common.errors import RunError, UserError
from raydet.tables import run_folder, storage
from raydet.tables.run_folder import (
    LEASE_FILE,
    LOCK_FILE,
    RUN_FILE,
    check_folder,
    done_chunks,
    hold,
    open_run,
    part_name,
)
from tests import gcs_stand_in

_HOLDER = """
import subprocess, sys, time
from raydet.tables import run_folder
run_folder.RENEW_EVERY_S, run_folder.SETTLE_S = 0.2, 0.3
with run_folder.hold(sys.argv[1], what="predict"):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start() -> Iterator[Callable[[str], tuple[subprocess.Popen[str], int]]]:
    """Starts a process that holds a folder, and one below it; returns the first, and the id of the second."""
    ids = []

    def start_holder(out: str) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen([sys.executable, "-c", _HOLDER, out], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        child = int(process.stdout.readline())
        ids.extend([process.pid, child])
        return process, child

    yield start_holder
    for pid in ids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/runs", method="PUT"))
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def gcs_server() -> Iterator[str]:
    with gcs_stand_in.started() as url:
        yield url


@pytest.fixture(params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def bucket(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for name, seconds in {"RENEW_EVERY_S": 0.2, "WATCH_S": 1.5, "SETTLE_S": 0.3}.items():
        monkeypatch.setattr(run_folder, name, seconds)
    if request.param == "gs":
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", request.getfixturevalue("gcs_server"))
        return f"{gcs_stand_in.BUCKET}/{request.node.originalname}"
    for name, value in {
        "AWS_ENDPOINT_URL": request.getfixturevalue("server"),
        "AWS_ACCESS_KEY_ID": "stand-in",
        "AWS_SECRET_ACCESS_KEY": "stand-in",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://runs/{request.node.originalname}"


Start = Callable[[str], tuple[subprocess.Popen[str], int]]


def test_a_second_run_is_refused_while_the_first_lives_and_not_after_its_kill(tmp_path: Path, start: Start) -> None:
    out = tmp_path / "new" / "out"
    first, child = start(str(out))
    with pytest.raises(UserError, match=rf"in use by another run \(predict on .*, process {first.pid}, since 20"):
        hold(str(out), what="predict").__enter__()
    first.kill()
    first.wait()
    os.kill(child, 0)  # What the first run has started lives on, and holds nothing.
    with hold(str(out), what="predict"):
        assert json.loads((out / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(out.iterdir()) == []


def test_a_hold_ends_with_an_exception_too(tmp_path: Path) -> None:
    def interrupted() -> None:
        with hold(str(tmp_path), what="predict"):
            with pytest.raises(UserError, match="in use"):
                hold(str(tmp_path), what="predict").__enter__()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with hold(str(tmp_path), what="predict") as held:
        held.check()


def test_many_runs_that_start_at_once_never_hold_together(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from raydet.common.errors import UserError\n"
        "from raydet.tables.run_folder import hold\n"
        "taken = 0\n"
        "end = time.monotonic() + 1.0\n"
        "while time.monotonic() < end:\n"
        "    try:\n"
        "        with hold(sys.argv[1], what='predict'):\n"
        "            os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))\n"
        "            os.unlink(sys.argv[2])\n"
        "            taken += 1\n"
        "    except UserError:\n"
        "        pass\n"
        "print(taken)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out"), str(tmp_path / "mark")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all(int(output) > 0 for output in outputs)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into .*file: "):
        hold(str(tmp_path / "file"), what="predict").__enter__()


def test_a_lease_keeps_others_out_while_it_moves_and_is_taken_from_the_dead(bucket: str, start: Start) -> None:
    first, _ = start(bucket)
    told: list[str] = []
    with pytest.raises(UserError, match=rf"in use by another run \(predict on .*, process {first.pid}, since"):
        hold(bucket, what="predict", tell=told.append).__enter__()
    assert len(told) == 1
    assert "may be in use by another run" in told[0]
    first.kill()
    first.wait()
    started = time.monotonic()
    with hold(bucket, what="predict", tell=told.append) as held:
        held.check()
        assert time.monotonic() - started < run_folder.WATCH_S
        assert len(told) == 1
        assert storage.list_files(bucket) == [LEASE_FILE]
    assert storage.list_files(bucket) == []


def test_a_lease_of_another_machine_is_taken_once_it_does_not_move(bucket: str) -> None:
    lease = {"token": "t", "host": "far", "pid": 1, "since": "2026-01-01", "command": "predict", "machine": ["far"]}
    storage.write_bytes(storage.join(bucket, LEASE_FILE), json.dumps({**lease, "renewals": 7}).encode())
    started, told = time.monotonic(), list[str]()
    with hold(bucket, what="predict", tell=told.append):
        assert time.monotonic() - started >= run_folder.WATCH_S
        assert "(predict on far, process 1, since 2026-01-01): watching it" in told[0]


def test_a_run_whose_lease_was_taken_stops_and_leaves_the_new_one(bucket: str) -> None:
    uri = storage.join(bucket, LEASE_FILE)
    with hold(bucket, what="predict") as held:
        mine = json.loads(storage.read_bytes(uri))
        deadline = time.monotonic() + 10
        while json.loads(storage.read_bytes(uri))["renewals"] == mine["renewals"] and time.monotonic() < deadline:
            time.sleep(0.05)
        held.check()
        theirs = json.dumps({**mine, "token": "theirs", "host": "far"}).encode()
        # A renewal that is under way may come after it: then the other run loses, and this one goes on.
        for _ in range(3):
            storage.write_bytes(uri, theirs)
            time.sleep(0.5)
        with pytest.raises(RunError, match=r"was taken by another run \(predict on far.*what it wrote is whole"):
            held.check()
    assert json.loads(storage.read_bytes(uri))["token"] == "theirs"


def test_of_two_that_start_at_once_one_holds(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_theirs(seconds: float) -> None:
        storage.write_bytes(storage.join(bucket, LEASE_FILE), json.dumps({"token": "theirs"}).encode())

    monkeypatch.setattr("raydet.tables.run_folder.time.sleep", write_theirs)
    with pytest.raises(UserError, match="in use by another run"):
        hold(bucket, what="predict").__enter__()
    assert storage.exists(storage.join(bucket, LEASE_FILE))


IDENTITY: dict[str, Any] = {
    "data": "s3://key:secret@bucket/images",
    "classes": ("cat", "dog"),
    "score_threshold": 0.0,
    "checkpoint_fingerprint": "aa",
    "data_fingerprint": "bb",
}


def test_a_run_goes_on_with_the_plan_of_the_first(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run_folder.stored_plan(out) is None
    assert open_run(out, IDENTITY, plan={"rows_per_file": 8}, what="detections") == {"rows_per_file": 8}
    (tmp_path / "out" / part_name(0)).touch()
    rotated = {**IDENTITY, "data": "s3://other:credentials@bucket/images"}
    assert open_run(out, rotated, plan={"rows_per_file": 99}, what="detections") == {"rows_per_file": 8}
    assert run_folder.stored_plan(out) == {"rows_per_file": 8}
    assert "secret" not in (tmp_path / "out" / RUN_FILE).read_text()


def test_another_run_is_refused_with_each_difference(tmp_path: Path) -> None:
    open_run(str(tmp_path), IDENTITY, plan={}, what="detections")
    other = {**IDENTITY, "score_threshold": 0.5, "checkpoint_fingerprint": "cc", "data_fingerprint": "dd", "tile": 640}
    with pytest.raises(UserError) as refusal:
        open_run(str(tmp_path), other, plan={}, what="detections")
    assert str(refusal.value) == (
        f"--out {tmp_path} already holds another run (score_threshold: 0.0 → 0.5; the checkpoint's weights or settings "
        "have changed since; the images have changed since; tile: None → 640); choose another folder, or the same "
        "settings to go on with it"
    )
    with pytest.raises(UserError, match="what: detections → metrics"):
        open_run(str(tmp_path), IDENTITY, plan={}, what="metrics")


def test_files_of_others_are_refused_and_left(tmp_path: Path) -> None:
    check_folder(str(tmp_path / "absent"), what="detections")
    (tmp_path / "_lock").touch()
    (tmp_path / ".hidden").touch()
    check_folder(str(tmp_path), what="detections")
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"no detections of raydet, such as holiday\.jpg; choose another folder"):
        open_run(str(tmp_path), IDENTITY, plan={}, what="detections")
    assert not (tmp_path / RUN_FILE).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 1, "ide', "_run.json, which says what the run in this folder is, is damaged"),
        ('{"data": "images", "seed": 0}', "holds a run of another version of raydet"),
        ("[]", "holds a run of another version of raydet"),
    ],
)
def test_a_record_that_cannot_be_read_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(UserError, match=message):
        open_run(str(tmp_path), IDENTITY, plan={}, what="detections")
    with pytest.raises(UserError, match=message):
        run_folder.stored_plan(str(tmp_path))


def test_done_chunks_are_the_files_that_are_there(tmp_path: Path) -> None:
    assert done_chunks(str(tmp_path / "absent")) == set()
    assert part_name(123) == "part-0000123.parquet"
    for name in (part_name(0), part_name(41), part_name(12_345_678), "part-0a.parquet", f".{part_name(7)}.1.partial"):
        (tmp_path / name).touch()
    assert done_chunks(str(tmp_path)) == {0, 41, 12_345_678}
