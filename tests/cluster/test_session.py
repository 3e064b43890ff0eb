"""Ray sessions: connecting to a cluster and starting one."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import ray

from raydet.cluster import session
from raydet.cluster.caller import LOG_FILE


def _run(script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_an_open_session_is_used_whatever_the_address(ray_cluster: None, tmp_path: Path) -> None:
    node = ray.get_runtime_context().get_node_id()
    with session.session(str(tmp_path / "log"), address="127.0.0.1:1"):
        assert ray.get_runtime_context().get_node_id() == node
    assert ray.is_initialized() and not (tmp_path / "log").exists()


@pytest.mark.slow
def test_a_start_that_fails_is_tried_again(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("no folder")
    script = f"""
        import logging, os, sys
        from raydet.cluster import session
        from raydet.common.errors import RunError
        if sys.argv[1:] == []:
            def mend(record):
                if "trying again" in record.getMessage():
                    os.environ.pop("RAY_TMPDIR", None)
                return True
            logging.getLogger("ray.messages").addFilter(mend)
        try:
            with session.session({str(tmp_path / "log")!r}):
                import ray
                print("up", ray.is_initialized())
        except RunError as error:
            print("failed", error)
    """
    done = _run(script, RAY_TMPDIR=str(in_the_way))
    assert done.stdout.startswith("up True"), done.stdout + done.stderr
    failed = _run(script.replace("== []", "!= []"), RAY_TMPDIR=str(in_the_way))
    assert failed.stdout.startswith("failed Ray did not start on this machine: "), failed.stdout + failed.stderr
    log = (tmp_path / "log" / LOG_FILE).read_text()
    assert log.count("Ray did not start, trying again") == 1 + session.START_ATTEMPTS - 1


@pytest.mark.slow
def test_an_address_that_nobody_answers_at(tmp_path: Path) -> None:
    script = f"""
        from raydet.cluster import session
        from raydet.common.errors import RunError
        try:
            with session.session({str(tmp_path)!r}):
                print("connected")
        except RunError as error:
            print(error)
    """
    done = _run(script, RAY_ADDRESS="127.0.0.1:1")
    assert "RAY_ADDRESS 127.0.0.1:1: Connection refused" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "up"])
def test_sigterm_ends_a_session_and_its_ray(tmp_path: Path, moment: str) -> None:
    script = f"""
        import sys, time
        print("starting", flush=True)
        from raydet.cluster import session
        from raydet.common.errors import RunStopped
        from raydet.common.signals import ending_on_sigterm
        try:
            with ending_on_sigterm(), session.session({str(tmp_path)!r}):
                print("up", flush=True)
                time.sleep(100)
        except RunStopped as error:
            sys.exit(error.exit_code)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        while moment not in process.stdout.readline():
            assert process.poll() is None
        if moment == "starting":
            deadline = time.monotonic() + 60
            while not (tmp_path / LOG_FILE).exists():  # opened just before Ray is started
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.wait()
