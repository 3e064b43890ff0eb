"""Commands in sessions of their own, so that a test can kill all processes of a run at once, as in a power failure."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

needs_small_disk = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="requires permission to mount a file system",
)
"""Mark for tests that call `run_on_small_disk`."""


def command_of(name: str, config: Any) -> list[str]:
    """Return the command line of `raydet NAME` with every option of a config that is set."""
    arguments = [sys.executable, "-m", "raydet", name]
    for option, value in dataclasses.asdict(config).items():
        if value is not None:
            arguments.append(f"--{option}={value if isinstance(value, str) else json.dumps(value)}")
    return arguments


@contextlib.contextmanager
def started(command: Sequence[str], output: Path, **options: Any) -> "Iterator[subprocess.Popen[bytes]]":
    """Context manager: start a command as leader of a session, and kill what is left of it after the block.

    Args:
        command: Words of the command.
        output: File for its output.
        options: Further options of `subprocess.Popen`.
    """
    with output.open("wb") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, **options)
    try:
        yield driver
    finally:
        kill_session(driver)


def processes_of(leader: int) -> list[psutil.Process]:
    """Return the live processes of a session by the process id of its leader, the leader first."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return sorted(found, key=lambda process: process.pid != leader)


def kill_session(leader: "subprocess.Popen[bytes]") -> None:
    """Kill all processes of a session, repeatedly until none is left."""
    own = processes_of(leader.pid)
    while own:
        # Groups first, with a single call each, so that few processes can react to the death of another.
        for group in {_group(process.pid) for process in own} - {None, os.getpgrp()}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(group or 0), signal.SIGKILL)
        for process in own:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(own, timeout=10)
        own = processes_of(leader.pid)
    leader.wait()


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def wait_until(is_so: Callable[[], bool], explain: Callable[[], str], *, timeout_s: float = 150) -> None:
    """Poll a condition; fail with the result of `explain` after a timeout."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


def wait_for_progress(is_there: Callable[[], bool], driver: "subprocess.Popen[bytes]", output: Path) -> None:
    """Poll a condition until it holds; fail with the output of a command that exits before."""
    wait_until(lambda: is_there() or driver.poll() is not None, output.read_text, timeout_s=200)
    assert driver.poll() is None, output.read_text()


def run_on_small_disk(
    command: Sequence[str], disk: Path, *, size: str, kept: Path
) -> "subprocess.CompletedProcess[str]":
    """Run a command that sees a small file system at a folder, and copy the content of this file system afterwards.

    Args:
        command: Words of the command.
        disk: Folder for the file system; must not exist yet.
        size: Size of the file system, as for `mount`.
        kept: Folder for the copy; must not exist yet.
    """
    disk.mkdir()
    script = f'mount -t tmpfs -o size={size} none {disk} || exit 99\n"$@"\ncode=$?\ncp -r {disk} {kept}\nexit $code\n'
    arguments = ["unshare", "-rm", "sh", "-c", script, "sh", *command]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300)
