"""Failures of real runs: a kill, a signal, a dead worker, a full disk, a changed number of workers.

The results are compared with those of an undisturbed run.
"""

import dataclasses
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raydet import PlanConfig, PredictConfig, TrainConfig, plan, predict, train
from raydet.models.checkpoints import STATES_FOLDER
from raydet.models.loading import load_detector
from raydet.tables import storage
from raydet.training.train import TrainResult
from tests.drivers import command_of, needs_small_disk, run_on_small_disk, started, wait_for_progress
from tests.outcomes import RecordingConsole, assert_same_rows, outcome_of_training
from tests.small_sets import tiny_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

EPOCHS = 4


def _config(shapes: Path, out: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "epochs": EPOCHS,
        "validate_batch_size": 4,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "save_every_steps": 2,
    }
    return TrainConfig(out=str(out), **tiny_training(shapes, **{**options, **changes}))


@pytest.fixture(scope="module")
def undisturbed(shapes: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> TrainResult:
    """An undisturbed run on one worker."""
    return train(_config(shapes, tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.fixture(scope="module")
def undisturbed_pair(shapes: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> TrainResult:
    """An undisturbed run on two workers."""
    return train(_config(shapes, tmp_path_factory.mktemp("undisturbed") / "run", num_workers=2))


def _assert_same_run(result: TrainResult, reference: TrainResult) -> None:
    """Check that all numbers and the weights are identical: single-threaded workers repeat every step exactly."""
    assert len(result.history) == EPOCHS and not result.already_done
    assert_same_rows(outcome_of_training(result.out), outcome_of_training(reference.out))


def test_a_killed_run_resumes_in_mid_epoch(shapes: Path, tmp_path: Path, undisturbed: TrainResult) -> None:
    config = _config(shapes, tmp_path / "killed")
    state = tmp_path / "killed" / STATES_FOLDER / "00001-0000002.pt"
    with started(command_of("train", config), tmp_path / "output") as driver:
        wait_for_progress(state.exists, driver, tmp_path / "output")
    assert len(_history(config.out)) < EPOCHS, "killed too late: the run had finished"
    console = RecordingConsole()
    _assert_same_run(train(config, console=console), undisturbed)
    (line,) = (line for line in console.lines if line.startswith("resuming"))
    assert re.fullmatch(rf"resuming after (step \d+ of )?epoch \d+ of {EPOCHS}", line)


def test_a_killed_run_of_mixed_tables_resumes_with_the_rest(shapes: Path, tmp_path: Path, ray_cluster: None) -> None:
    data = {"train_data": [f"{shapes}/train:0.6", f"{shapes}/val:1.5"], "repeat_rare": 0.8}
    _assert_a_kill_changes_nothing(shapes, tmp_path, data)


def test_a_killed_run_with_a_teacher_resumes_with_it(shapes: Path, tmp_path: Path, undisturbed: TrainResult) -> None:
    found = str(tmp_path / "teacher")
    checkpoint = f"{undisturbed.out}/checkpoint"
    predict(PredictConfig(checkpoint=checkpoint, data=f"{shapes}/train", keep=["class_scores"], out=found))
    _assert_a_kill_changes_nothing(shapes, tmp_path, {"teacher": found})


def _assert_a_kill_changes_nothing(shapes: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    undisturbed = train(_config(shapes, tmp_path / "undisturbed", **options))
    config = _config(shapes, tmp_path / "killed", **options)
    state = tmp_path / "killed" / STATES_FOLDER / "00001-0000002.pt"
    with started(command_of("train", config), tmp_path / "output") as driver:
        wait_for_progress(state.exists, driver, tmp_path / "output")
    assert len(_history(config.out)) < EPOCHS, "killed too late: the run had finished"
    _assert_same_run(train(config), undisturbed)


def test_sigterm_saves_what_there_is(shapes: Path, tmp_path: Path, undisturbed: TrainResult) -> None:
    config = _config(shapes, tmp_path / "stopped", save_every_steps=None)
    state = tmp_path / "stopped" / STATES_FOLDER / "00001-0000000.pt"
    with started(command_of("train", config), tmp_path / "output") as driver:
        wait_for_progress(state.exists, driver, tmp_path / "output")
        driver.terminate()
        assert driver.wait(timeout=60) == 143
    text = (tmp_path / "output").read_text()
    assert "run stopped" in text and "Traceback" not in text
    assert 0 < plan(PlanConfig(run=config.out, images=1000)).measured.images_per_s < 10_000
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


@needs_small_disk
def test_a_full_disk_ends_the_run_with_one_line(shapes: Path, tmp_path: Path, undisturbed: TrainResult) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    # Room for the first checkpoints (weights, and a state three times their size) only.
    config = _config(shapes, disk / "run", keep_states=10)
    result = run_on_small_disk(command_of("train", config), disk, size="14m", kept=kept)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "cannot write the checkpoint" in result.stderr and "the disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    _assert_same_run(train(dataclasses.replace(config, out=str(kept / "run"), keep_states=2)), undisturbed)


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
        with started(command_of("train", dataclasses.replace(config, epochs=epochs)), tmp_path / "output") as driver:
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
