"""The doctor: what it finds in order, missing or broken, what it advises, and that it never hangs."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydet import DoctorConfig, doctor
from raydet.cli import checks
from raydet.cli.checks import Check
from raydet.cli.probes import ProbeError, ProbeTimeoutError, ask
from raydet.common.version import __version__

PROJECT = Path(__file__).parents[2]


def only(found: Iterator[Check]) -> Check:
    (finding,) = found
    return finding


@pytest.mark.integration
def test_this_machine_is_in_order_and_no_ray_is_started() -> None:
    code = """
import sys
from raydet.cli.main import main
code = main(["doctor"])
assert not {"ray", "torch", "transformers"} & set(sys.modules)
sys.exit(code)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=PROJECT)
    assert (run.returncode, run.stderr) == (0, ""), run.stdout
    assert run.stdout.splitlines()[-1] == "no problem found"
    for name in ("Python", "packages", "CPUs", "torch", "GPUs", "Ray", "shared memory", "current folder", "Hub"):
        assert f" {name} " in run.stdout
    assert f"raydet {__version__}, ray " in run.stdout


def test_a_check_that_hangs_or_fails_is_told_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hanging() -> Iterator[Check]:
        yield Check("ok", "temporary files", "fine")
        release.wait()

    def failing() -> Iterator[Check]:
        raise RuntimeError("no such thing")
        yield

    monkeypatch.setattr("raydet.cli.doctor._GRACE_S", 0.1)
    monkeypatch.setattr(checks, "check_disks", hanging)
    monkeypatch.setattr(checks, "check_shared_memory", failing)
    for name in ("check_devices", "check_ray", "check_hub"):
        monkeypatch.setattr(checks, name, lambda *_: iter(()))
    result = doctor(DoctorConfig(timeout_s=0.1))
    release.set()
    broken = [(finding.name, finding.text) for finding in result.findings if finding.status == "broken"]
    assert ("disks", "no answer within 0.1 s") in broken
    assert ("shared memory", "the check failed: RuntimeError: no such thing") in broken
    assert result.exit_code == 1 and "problems: " in result.lines()[-1]
    assert Check("ok", "temporary files", "fine") in result.findings


def test_a_probe_is_ended_and_its_error_is_one_line() -> None:
    with pytest.raises(ProbeTimeoutError, match=r"no answer within 0\.01 s"):
        ask("torch", timeout_s=0.01)
    found = {finding.name: finding for finding in checks.check_devices(0.01)}
    assert found["CPUs"].status == "ok" and "--timeout-s" in found["torch"].advice
    with pytest.raises(ProbeError, match="missing 1 required positional argument"):
        ask("ray", timeout_s=60)


def smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program in the place of nvidia-smi."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


_TWO = "echo 'NVIDIA H200, 143771, 570.1'; echo 'NVIDIA H200, 143771, 570.1'"


@pytest.mark.parametrize(
    ("script", "build", "reason", "hidden", "status", "facts"),
    [
        ("exit 127", None, "", None, "note", ("nvidia-smi fails",)),
        ("echo broken; exit 9", "CUDA 13.0", "", None, "note", ("nvidia-smi fails: broken",)),
        ("sleep 5", "CUDA 13.0", "", None, "note", ("timed out",)),
        (_TWO, None, "", None, "note", ("2 × NVIDIA H200 (140 GB)", "driver 570.1", "CPUs alone")),
        (_TWO, "CUDA 13.0", "the driver is too old", None, "broken", ("the driver is too old",)),
        (_TWO, "CUDA 13.0", "", "", "note", ("CUDA_VISIBLE_DEVICES",)),
    ],
)
def test_gpus_that_torch_does_not_see(
    script: str,
    build: str | None,
    reason: str,
    hidden: str | None,
    status: str,
    facts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smi(tmp_path, script, monkeypatch)
    monkeypatch.setattr(checks, "_GPU_TIMEOUT_S", 0.5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    torch: dict[str, Any] = {"gpus": [], "build": build, "reason": reason}
    found = checks._gpus(torch)
    assert found.status == status and found.advice
    assert all(fact in found.text for fact in facts), found


def test_gpus_that_torch_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, _TWO, monkeypatch)
    gpus = [{"name": "NVIDIA H200", "memory_gb": 139.8}] * 2
    found = checks._gpus({"gpus": gpus, "build": "CUDA 13.0", "reason": ""})
    assert found == Check("ok", "GPUs", "2 × NVIDIA H200 (140 GB); driver 570.1")


def install(folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make importlib find another raydet, with these lines of metadata."""
    (folder / "raydet-9.dist-info").mkdir()
    text = "\n".join(["Metadata-Version: 2.1", "Name: raydet", "Version: 9", *lines])
    (folder / "raydet-9.dist-info" / "METADATA").write_text(text + "\n")
    monkeypatch.syspath_prepend(str(folder))


def test_packages_that_are_missing_or_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["Requires-Dist: numpy>=99", "Requires-Dist: nowhere-to-be-found>=2", "Requires-Python: >=4"]
    install(tmp_path, lines, monkeypatch)
    found = only(checks.check_packages())
    assert found.status == "broken" and "missing: nowhere-to-be-found>=2" in found.text
    assert found.advice == "pip install 'nowhere-to-be-found>=2'"
    assert only(checks.check_python()).advice == "use a Python >=4"
    (tmp_path / "raydet-9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: raydet\nVersion: 9\nRequires-Dist: numpy>=99\n"
    )
    found = only(checks.check_packages())
    assert found.status == "note" and found.advice == "pip install 'numpy>=99'"


def test_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        *(f"Provides-Extra: {name}" for name in ("fast", "here", "all", "dev")),
        'Requires-Dist: nowhere-to-be-found>=2; extra == "fast"',
        'Requires-Dist: numpy>=1; extra == "here"',
        'Requires-Dist: numpy>=1; extra == "dev"',
        'Requires-Dist: raydet[fast,here]; extra == "all"',
    ]
    install(tmp_path, lines, monkeypatch)
    fast, here = checks.check_extras()
    assert (fast.status, fast.advice) == ("note", "pip install 'raydet[fast]'")
    assert (here.status, here.name) == ("ok", "extra here") and here.text.startswith("numpy ")


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "absent"))
    temporary, current = checks.check_disks()
    assert (temporary.status, temporary.name) == ("broken", "temporary files")
    assert "absent" in temporary.text and temporary.advice
    assert str(tmp_path) in current.text
    monkeypatch.setattr(checks, "_LEAST_FREE_GB", 1e9)
    assert list(checks.check_disks())[1].status == "note"
    assert only(checks.check_shared_memory()).status == "note"


@pytest.fixture
def answering() -> Iterator[int]:
    """The port of a web server."""
    handler: Callable[..., Any] = http.server.BaseHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def closed() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_hub(answering: int, closed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in only(checks.check_hub(1)).text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for port, status in ((answering, "ok"), (closed, "note")):
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert only(checks.check_hub(1)).status == status
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert "proxy" in only(checks.check_hub(1)).text


def test_addresses_of_ray(answering: int, closed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(checks.check_ray(None, 1)).status == "ok"
    for port, fact in ((answering, "answers"), (closed, "cannot be reached")):
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{port}")
        found = only(checks.check_ray(None, 1))
        assert found.status == "note" and fact in found.text and "ray job submit" in found.advice
    found = only(checks.check_ray(f"127.0.0.1:{closed}", 0.01))
    assert found.status == "broken" and "within 0.01 s" in found.text


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_that_answers_and_one_that_does_not(closed: int) -> None:
    import ray

    found = only(checks.check_ray(ray.get_runtime_context().gcs_address, 100))
    assert found.status == "ok" and "1 node, 2 of 2 CPUs free" in found.text, found
    found = only(checks.check_ray(f"127.0.0.1:{closed}", 100))
    assert found.status == "broken" and "refused" in found.text, found
