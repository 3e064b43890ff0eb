"""Output locks with real processes that are killed, on disk and in stand-ins for object stores."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydet.common.errors import RunError, UserError
from raydet.tables import folder_lock, storage
from raydet.tables.folder_lock import Hold, LeaseTimes
from tests import gcs_stand_in, s3_stand_in

QUICK = LeaseTimes(renew_s=0.2, watch_s=1.5, settle_s=0.3)
LOCK_FILE, LEASE_FILE = ".lock", ".lock.json"

_HOLDER = """
import subprocess, sys, time
from raydet.tables.folder_lock import LeaseTimes, hold
times = LeaseTimes(renew_s=0.2, settle_s=0.3)
with hold(sys.argv[1], ".lock", out=sys.argv[1], command="predict", times=times):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start() -> Iterator[Callable[[str], tuple[subprocess.Popen[str], int]]]:
    """Start a process that locks a folder and has a child process; return the process and the child's id."""
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
def s3_server() -> Iterator[s3_stand_in.StandIn]:
    with s3_stand_in.started() as server:
        yield server


@pytest.fixture(scope="module")
def gcs_server() -> Iterator[str]:
    with gcs_stand_in.started() as url:
        yield url


@pytest.fixture(params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def bucket(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    if request.param == "gs":
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", request.getfixturevalue("gcs_server"))
        return f"{gcs_stand_in.BUCKET}/{request.node.originalname}"
    request.getfixturevalue("s3_server").use(monkeypatch)
    return f"{s3_stand_in.BUCKET}/{request.node.originalname}"


Start = Callable[[str], tuple[subprocess.Popen[str], int]]


def hold(out: str, **more: Any) -> contextlib.AbstractContextManager[Hold]:
    return folder_lock.hold(out, LOCK_FILE, out=out, command="predict", times=QUICK, **more)


def test_a_second_run_is_refused_while_the_first_lives_and_not_after_its_kill(tmp_path: Path, start: Start) -> None:
    out = tmp_path / "new" / "out"
    first, child = start(str(out))
    with pytest.raises(UserError, match=rf"predict.* {first.pid}"):
        hold(str(out)).__enter__()
    first.kill()
    first.wait()
    os.kill(child, 0)  # The first run's child is alive but does not hold the lock.
    with hold(str(out)):
        assert json.loads((out / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(out.iterdir()) == []


def test_a_hold_ends_with_an_exception_too(tmp_path: Path) -> None:
    def interrupted() -> None:
        with hold(str(tmp_path)):
            with pytest.raises(UserError, match="in use"):
                hold(str(tmp_path)).__enter__()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with hold(str(tmp_path)) as held:
        held.check()


def test_many_runs_that_start_at_once_never_hold_together(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from raydet.common.errors import UserError\n"
        "from raydet.tables.folder_lock import hold\n"
        "taken = 0\n"
        "end = time.monotonic() + 1.0\n"
        "while time.monotonic() < end:\n"
        "    try:\n"
        "        with hold(sys.argv[1], '.lock', out=sys.argv[1], command='predict'):\n"
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


def test_a_second_run_waits_where_it_is_told_to(tmp_path: Path) -> None:
    first = hold(str(tmp_path))
    first.__enter__()
    timer = threading.Timer(0.3, first.__exit__, (None, None, None))
    timer.start()
    with hold(str(tmp_path), wait_s=20.0):
        timer.join()
    with hold(str(tmp_path)), pytest.raises(UserError, match="in use"):
        hold(str(tmp_path), wait_s=0.1).__enter__()


@pytest.mark.parametrize("kind", ["link", "dangling link", "second name", "pipe", "folder"])
def test_what_is_no_lock_file_is_never_written(tmp_path: Path, kind: str) -> None:
    victim, lock = tmp_path / "victim", tmp_path / "out" / LOCK_FILE
    lock.parent.mkdir()
    if kind != "dangling link":
        victim.write_text("precious")
    if kind in ("link", "dangling link"):
        lock.symlink_to(victim)
    elif kind == "second name":
        lock.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(UserError, match=r"\.lock is a link"):
        hold(str(lock.parent)).__enter__()
    assert kind == "dangling link" or victim.read_text() == "precious"
    assert victim.exists() == (kind != "dangling link") and os.path.lexists(lock)


def test_a_lease_keeps_others_out_while_it_moves_and_is_taken_from_the_dead(bucket: str, start: Start) -> None:
    first, _ = start(bucket)
    lines: list[str] = []
    with pytest.raises(UserError, match=rf"predict.* {first.pid}"):
        hold(bucket, notify=lines.append).__enter__()
    assert len(lines) == 1
    assert "may be in use" in lines[0]
    first.kill()
    first.wait()
    started = time.monotonic()
    with hold(bucket, notify=lines.append) as held:
        held.check()
        assert time.monotonic() - started < QUICK.watch_s
        assert len(lines) == 1
        assert storage.list_files(bucket) == [LEASE_FILE]
    assert storage.list_files(bucket) == []


def test_a_lease_of_another_machine_is_taken_once_it_does_not_move(bucket: str) -> None:
    lease = {"token": "t", "host": "far", "pid": 1, "since": "2026-01-01", "command": "predict", "machine": ["far"]}
    storage.write_bytes(storage.join(bucket, LEASE_FILE), json.dumps({**lease, "renewals": 7}).encode())
    started, lines = time.monotonic(), list[str]()
    with hold(bucket, notify=lines.append):
        assert time.monotonic() - started >= QUICK.watch_s
        assert all(fact in lines[0] for fact in ("predict on far", "process 1", "2026-01-01"))


def test_a_run_whose_lease_was_taken_stops_and_leaves_the_new_one(bucket: str) -> None:
    uri = storage.join(bucket, LEASE_FILE)
    with hold(bucket) as held:
        mine = json.loads(storage.read_bytes(uri))
        deadline = time.monotonic() + 10
        while json.loads(storage.read_bytes(uri))["renewals"] == mine["renewals"] and time.monotonic() < deadline:
            time.sleep(0.05)
        held.check()
        theirs = json.dumps({**mine, "token": "theirs", "host": "far"}).encode()
        # A renewal in progress may overwrite their lease, so write it several times.
        for _ in range(3):
            storage.write_bytes(uri, theirs)
            time.sleep(0.5)
        with pytest.raises(RunError, match=r"predict on far.* taken over"):
            held.check()
    assert json.loads(storage.read_bytes(uri))["token"] == "theirs"


def test_of_two_that_start_at_once_one_holds(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_theirs(seconds: float) -> None:
        storage.write_bytes(storage.join(bucket, LEASE_FILE), json.dumps({"token": "theirs"}).encode())

    monkeypatch.setattr("raydet.tables.folder_lock.time.sleep", write_theirs)
    with pytest.raises(UserError, match="in use"):
        hold(bucket).__enter__()
    assert storage.exists(storage.join(bucket, LEASE_FILE))
