"""Failures of real runs: a kill, a signal, a dead worker, a full disk, a changed number of workers, a bad step.

The results are compared with those of an undisturbed run.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raydet import TrainConfig, train
from raydet.common.errors import RunError
from raydet.models.checkpoints import STATES_FOLDER
from raydet.models.loading import load_detector
from raydet.tables import storage
from raydet.training.train import TrainResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

EPOCHS = 4


def _config(shapes: Path, out: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "train_data": str(shapes / "train"),
        "val_data": str(shapes / "val"),
        "out": str(out),
        "model": "rt_detr_v2_tiny",
        "image_size": 64,
        "epochs": EPOCHS,
        "batch_size": 4,
        "validate_batch_size": 4,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "augmentation": "flip",
        "threads_per_worker": 1,
        "save_every_steps": 2,
        "log_images": 0,
    }
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(shapes: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> TrainResult:
    """An undisturbed run on one worker."""
    return train(_config(shapes, tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.fixture(scope="module")
def undisturbed_pair(shapes: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> TrainResult:
    """An undisturbed run on two workers."""
    return train(_config(shapes, tmp_path_factory.mktemp("undisturbed") / "run", num_workers=2))


def _command(config: TrainConfig) -> list[str]:
    """Return the command line of a run with every option."""
    arguments = [sys.executable, "-m", "raydet", "train"]
    for name, value in dataclasses.asdict(config).items():
        arguments += [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return arguments


def _start(config: TrainConfig, output: Path) -> "subprocess.Popen[bytes]":
    """Start a run in its own session, with its own Ray."""
    with output.open("wb") as file:
        return subprocess.Popen(_command(config), stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def _wait_for(path: Path, driver: "subprocess.Popen[bytes]", timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert driver.poll() is None and time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)


def _assert_same_run(result: TrainResult, reference: TrainResult) -> None:
    """Check that all numbers and the weights are identical: single-threaded workers repeat every step exactly."""
    assert len(result.history) == EPOCHS and not result.already_done
    names = ("loss", "losses", "gradient_norm", "learning_rate", "AP", "AP_by_class")
    for mine, other in zip(result.history, reference.history, strict=True):
        contents = mine.to_json(), other.to_json()
        assert [contents[0][name] for name in names] == [contents[1][name] for name in names]
    hashes = [hashlib.sha256(Path(each.checkpoint, "model.safetensors").read_bytes()) for each in (result, reference)]
    assert hashes[0].hexdigest() == hashes[1].hexdigest()


def test_a_killed_run_resumes_in_mid_epoch(shapes: Path, tmp_path: Path, undisturbed: TrainResult) -> None:
    config = _config(shapes, tmp_path / "killed")
    driver = _start(config, tmp_path / "output")
    try:
        _wait_for(tmp_path / "killed" / STATES_FOLDER / "00001-0000002.pt", driver)
    finally:
        # Kill the complete session: driver, Ray's processes and workers, as in a power failure.
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert len(_history(config.out)) < EPOCHS, "killed too late: the run had finished"
    _assert_same_run(train(config), undisturbed)


def test_sigterm_saves_what_there_is(shapes: Path, tmp_path: Path, undisturbed: TrainResult) -> None:
    config = _config(shapes, tmp_path / "stopped", save_every_steps=None)
    driver = _start(config, tmp_path / "output")
    try:
        _wait_for(tmp_path / "stopped" / STATES_FOLDER / "00001-0000000.pt", driver)
        os.kill(driver.pid, signal.SIGTERM)
        assert driver.wait(timeout=60) == 143
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    text = (tmp_path / "output").read_text()
    assert "run stopped" in text and "Traceback" not in text
    _assert_same_run(train(config), undisturbed)


@pytest.mark.parametrize("num_workers", [2, [1, 2]], ids=["fixed", "elastic"])
def test_a_dead_worker_is_replaced(
    shapes: Path, tmp_path: Path, undisturbed_pair: TrainResult, num_workers: int | list[int]
) -> None:
    config = _config(shapes, tmp_path / "run", num_workers=num_workers)
    killed: list[int] = []
    state = Path(config.out, STATES_FOLDER, "00001-0000002.pt")
    killer = threading.Thread(target=lambda: killed.append(_kill_a_worker(state)), daemon=True)
    killer.start()
    result = train(config)
    killer.join(timeout=10)
    assert killed and killed[0] > 0
    if num_workers == 2:
        _assert_same_run(result, undisturbed_pair)
    else:  # the cluster chooses the number of workers: the batches are the same, and the gradients up to rounding
        assert [record.epoch for record in result.history] == list(range(1, EPOCHS + 1))
        for record, other in zip(result.history[:2], undisturbed_pair.history[:2], strict=True):
            assert record.loss == pytest.approx(other.loss, rel=0.02)


def _kill_a_worker(state: Path) -> int:
    """Wait for a state file, kill one training process and return its id; return 0 after a timeout."""
    import psutil

    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if state.exists():
            for process in psutil.process_iter(["name", "cmdline"]):
                if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                    process.kill()
                    return int(process.pid)
        time.sleep(0.02)
    return 0


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="requires permission to mount a file system",
)
def test_a_full_disk_ends_the_run_with_one_line(shapes: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    kept = tmp_path / "kept"
    # Room for the first checkpoints (weights, and a state three times their size) only.
    config = _config(shapes, disk / "run", keep_states=10)
    script = tmp_path / "script.sh"
    script.write_text(
        f'mount -t tmpfs -o size=14m none {disk} || exit 99\n"$@"\ncode=$?\ncp -r {disk}/run {kept}\nexit $code\n'
    )
    command = ["unshare", "-rm", "sh", str(script), *_command(config)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "cannot write the checkpoint" in result.stderr and "the disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    again = train(dataclasses.replace(config, out=str(kept), keep_states=2))
    assert len(again.history) == EPOCHS


def test_a_loss_that_is_no_number_names_step_images_and_terms(shapes: Path, tmp_path: Path, ray_cluster: None) -> None:
    config = _config(shapes, tmp_path / "run", learning_rate=1e25, max_grad_norm=1e9, schedule="constant")
    with pytest.raises(RunError, match=r"loss.*step \d of epoch 1: \w+.*images \d+, \d+"):
        train(config)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of an empty bucket on a local S3 server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "stand-in",
        "AWS_SECRET_ACCESS_KEY": "stand-in",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="runs")
    yield "s3://runs"
    server.stop()


def test_an_object_store_holds_the_tables_and_the_run(shapes: Path, tmp_path: Path, bucket: str) -> None:
    for name in ("train", "val"):
        storage.publish_folder(str(shapes / name), f"{bucket}/{name}")
    config = dataclasses.replace(
        _config(shapes, tmp_path, epochs=1, log_images=1),
        train_data=f"{bucket}/train",
        val_data=f"{bucket}/val",
        out=f"{bucket}/run",
    )
    for epochs in (1, 2):
        driver = _start(dataclasses.replace(config, epochs=epochs), tmp_path / "output")
        assert driver.wait(timeout=180) == 0, (tmp_path / "output").read_text()
    files = storage.list_files(f"{bucket}/run", recursive=True)
    assert {"config.yaml", "log/history.json", "checkpoint/model.safetensors", "last/config.json"} <= set(files)
    assert [name for name in files if name.startswith(STATES_FOLDER)] == [
        f"{STATES_FOLDER}/00001-0000004.pt",
        f"{STATES_FOLDER}/00002-0000000.pt",
    ]
    assert [entry["epoch"] for entry in json.loads(storage.read_bytes(f"{bucket}/run/log/history.json"))] == [1, 2]
    assert any(name.startswith("log/tensorboard/events") for name in files)
    checkpoint = tmp_path / "checkpoint"
    storage.fetch_folder(f"{bucket}/run/checkpoint", str(checkpoint))
    assert len(load_detector(str(checkpoint)).categories) == 3


def _history(out: str) -> list[dict[str, Any]]:
    path = Path(out, "log", "history.json")
    history: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return history
