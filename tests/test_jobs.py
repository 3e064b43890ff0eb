"""The four jobs, submitted with `ray job submit` to a local head that asks for a token."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from raydet.tables import open_table

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """A Ray head with a dashboard on loopback."""

    def __init__(self, folder: str) -> None:
        self.address = f"http://127.0.0.1:{_free_port()}"
        token = secrets.token_hex(32)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {
            **os.environ,
            "PATH": path,
            "HOME": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
        }
        command = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2", f"--temp-dir={folder}/r"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
        command += [f"--port={_free_port()}", f"--dashboard-port={self.address.rsplit(':')[-1]}"]
        command += [f"--dashboard-agent-listen-port={_free_port()}", f"--ray-client-server-port={_free_port()}"]
        with Path(folder, "head.log").open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--object-store-memory=300000000"],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def submit(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Submits a job, waits for its end, and returns what `ray job submit` printed."""
        command = [RAY, "job", "submit", "--address", self.address, "--working-dir", str(ROOT), "--"]
        return subprocess.run(
            [*command, "python", *words],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def is_up(self) -> bool:
        """Whether the dashboard answers."""
        try:
            urllib.request.urlopen(f"{self.address}/api/version", timeout=2)
        except urllib.error.HTTPError as error:
            return error.code in (401, 403)
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A running head; all its processes are ended with it."""
    with tempfile.TemporaryDirectory(prefix="rdj", ignore_cleanup_errors=True) as folder:
        head = Head(folder)
        try:
            deadline = time.monotonic() + 90
            while not head.is_up():
                assert head.process.poll() is None and time.monotonic() < deadline, Path(folder, "head.log").read_text()
                time.sleep(0.3)
            yield head
        finally:
            # It and all that it started are a session of their own.
            os.killpg(head.process.pid, signal.SIGTERM)
            try:
                head.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(head.process.pid, signal.SIGKILL)
                head.process.wait()


@pytest.mark.timeout(290)
def test_the_four_jobs_from_pictures_to_numbers(head: Head, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    tiny = ["--model=rt_detr_v2_tiny", "--image-size=64", "--batch-size=4", "--augmentation=flip"]
    jobs = [
        ["prepare.py", "shapes", f"--out={data}", "--num-train=8", "--num-val=4", "--image-size=64"],
        ["train.py", f"--train-data={data}/train", f"--val-data={data}/val", f"--out={run}", "--epochs=1", *tiny],
        ["predict.py", f"--checkpoint={run}/checkpoint", f"--data={data}/val", f"--out={run}/detections"],
        ["evaluate.py", f"--truth={data}/val", f"--detections={run}/detections", f"--out={run}/metrics"],
    ]
    for name, *options in jobs:
        done = head.submit(f"jobs/{name}", *options)
        assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
        assert "succeeded" in done.stdout + done.stderr
    assert open_table(str(run / "detections"), "detections").num_rows == 4
    assert "AP50" in done.stdout


def test_a_mistake_fails_the_job_with_its_one_line(head: Head) -> None:
    done = head.submit("jobs/train.py", "--epoch", "3")
    assert done.returncode == 1
    assert "raydet: error: unknown option --epoch; did you mean --epochs?" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout


def test_without_the_token_nothing_is_run(head: Head) -> None:
    done = head.submit("jobs/train.py", RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode != 0
    assert "raydet: error" not in done.stdout + done.stderr
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=5)
    assert refused.value.code in (401, 403)
