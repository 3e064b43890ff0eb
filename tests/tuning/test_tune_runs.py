"""Searches with real trainings: two concurrent trials, one that fails, one that is stopped, a killed search."""

import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from raydet import TrainConfig, TuneConfig, UserError, tune
from raydet.common.console import Console
from raydet.common.display.progress import Progress
from raydet.common.errors import RunError
from raydet.config import to_yaml
from raydet.config.options import load_file
from raydet.tables.table import open_table
from raydet.tuning import records
from tests.drivers import needs_small_disk, run_on_small_disk, started, wait_until
from tests.json_output import check_result
from tests.small_sets import tiny_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class _Watched(Console):
    """A console that records its lines, and what it would show below them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.counter = _Counter()

    def line(self, text: str = "") -> None:
        self.lines.append(text)

    @contextmanager
    def progress(self, task: str, **options: Any) -> Iterator[Progress]:
        yield self.counter


class _Counter(Progress):
    """A counter that records what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[str] = []

    def wait_for(self, what: str | None) -> None:
        self.shown.append(what or "")


def _config(shapes: Path, out: Path, train: dict[str, Any], **changes: Any) -> TuneConfig:
    base = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-3, "schedule": "constant"}
    values: dict[str, Any] = {
        "out": str(out),
        "train_config": tiny_training(shapes, **{**base, **train}),
        "space": {"learning_rate": {"loguniform": [1e-5, 1e-2]}},
        "search": "random",
        "scheduler": "none",
        "metric": "loss",  # such a short training has an AP of 0
    }
    return TuneConfig(**{**values, **changes})


def _trainers() -> list[int]:
    """List the training processes among this process's descendants."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if re.search("RayTrainWorker|_LoneWorker", " ".join(_command(child)))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@pytest.mark.usefixtures("ray_cluster")
def test_two_trials_at_once_of_which_one_fails(shapes: Path, tmp_path: Path) -> None:
    # A learning rate at which the loss becomes NaN during training.
    config = _config(
        shapes,
        tmp_path / "out",
        {"max_grad_norm": 1e9},
        points_to_evaluate=[{"learning_rate": 1e25}],
        num_trials=3,
        max_concurrent=2,
    )
    console = _Watched()
    result = tune(config, console=console)
    assert [trial.state for trial in result.trials] == ["finished", "failed", "finished"]
    assert [trial.source for trial in result.trials] == ["default", "point", "search"]
    assert "the loss is not finite" in (result.trials[1].error or "")
    shown = console.counter.shown
    assert any("trial-0000" in text and "trial-0001" in text for text in shown), "no concurrent trials"
    assert check_result(result, "tune")["trials"][1]["state"] == "failed"
    assert re.search(r"3 trials, 2 at a time.*1 worker .*0\.49 CPU", console.lines[0])
    assert len([line for line in console.lines if line.startswith("trial-")]) == 3
    rows = open_table(f"{config.out}/trials", "trials").read().to_pylist()
    # The run ends at the fifth step in a row that is skipped, in its second epoch.
    assert [row["num_epochs"] for row in rows] == [2, 1, 2] and rows[1]["value"] is None
    assert result.value == min(row["value"] for row in rows if row["value"] is not None)
    again = load_file(TrainConfig, result.config_file)
    assert again.learning_rate == result.parameters["learning_rate"] and again.threads_per_worker == 1
    assert Path(result.checkpoint, "model.safetensors").is_file() and Path(config.out, "tune.html").is_file()
    before = {path: path.stat().st_mtime_ns for path in Path(config.out, "trials").glob("*/**/*")}
    done = tune(config)
    assert done.already_done and done.value == result.value
    assert {path: path.stat().st_mtime_ns for path in Path(config.out, "trials").glob("*/**/*")} == before


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_that_is_behind_is_stopped_with_its_workers(shapes: Path, tmp_path: Path) -> None:
    # Two trials that hardly learn, with many epochs left. The second one fits only if the first has released its
    # resources.
    config = _config(
        shapes,
        tmp_path / "out",
        {"epochs": 12, "cpus_per_worker": 1.2},
        points_to_evaluate=[{"learning_rate": 1e-9}, {"learning_rate": 2e-9}],
        num_trials=3,
        max_concurrent=1,
        scheduler="asha",
        grace_epochs=3,
        reduction_factor=2,
    )
    result = tune(config)
    assert [trial.state for trial in result.trials] == ["finished", "stopped", "stopped"]
    assert result.best.number == 0 and len(result.trials[0].history) == 12
    assert all(3 <= len(trial.history) < 12 for trial in result.trials[1:])
    wait_until(lambda: not _trainers(), lambda: "workers of a stopped trial live on", timeout_s=60)


@pytest.mark.usefixtures("ray_cluster")
def test_trials_of_two_workers_and_all_that_fail(shapes: Path, tmp_path: Path) -> None:
    result = tune(_config(shapes, tmp_path / "two", {"num_workers": 2, "epochs": 1}, num_trials=1))
    assert result.best.source == "default" and len(result.best.history) == 1
    config = _config(shapes, tmp_path / "bad", {"learning_rate": 1e25, "max_grad_norm": 1e9}, num_trials=1)
    with pytest.raises(RunError, match=r"trial-0000: .*the loss is not finite"):
        tune(config)
    assert open_table(f"{config.out}/trials", "trials").read()["state"].to_pylist() == ["failed"]


def test_a_killed_search_resumes(shapes: Path, tmp_path: Path, ray_cluster: None) -> None:
    config = _config(shapes, tmp_path / "out", {"epochs": 6, "save_every_steps": 2}, num_trials=2, max_concurrent=1)
    file = tmp_path / "tune.yaml"
    file.write_text(to_yaml(config))
    second = Path(config.out, "trials", "trial-0001")
    command = [sys.executable, "-m", "raydet", "tune", "--config", str(file)]
    with started(command, tmp_path / "output", env={**os.environ, "COLUMNS": "200"}) as driver:
        wait_until(
            lambda: len(records.read_history(str(second))) >= 2 or driver.poll() is not None,
            lambda: "the second trial makes no progress",
            timeout_s=600,
        )
        assert driver.poll() is None, (tmp_path / "output").read_text()
    assert "Traceback" not in (tmp_path / "output").read_text()
    first, cut_off = records.load(config.out)
    assert first.state == "finished" and cut_off.state == "unfinished" and len(cut_off.history) < 6
    before = {path: path.stat().st_mtime_ns for path in Path(config.out, "trials", "trial-0000").rglob("*")}
    with pytest.raises(UserError, match=r"train\.learning_rate: 0\.001 → 0\.002"):
        tune(dataclasses.replace(config, train_config={**config.train_config, "learning_rate": 2e-3}))  # type: ignore[dict-item]
    console = _Watched()
    result = tune(config, console=console)
    assert any(line.startswith("resuming after 1 of 2 trials; 1 trial,") for line in console.lines)
    assert [trial.state for trial in result.trials] == ["finished", "finished"]
    assert result.trials[1].parameters == cut_off.parameters
    assert result.trials[1].history[: len(cut_off.history)] == cut_off.history
    assert [record.epoch for record in result.trials[1].history] == [1, 2, 3, 4, 5, 6]
    assert {path: path.stat().st_mtime_ns for path in Path(config.out, "trials", "trial-0000").rglob("*")} == before


@needs_small_disk
def test_a_full_disk_ends_the_search_with_one_line(shapes: Path, tmp_path: Path, ray_cluster: None) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    config = _config(shapes, disk / "out", {"epochs": 1}, num_trials=3, max_concurrent=1)
    file = tmp_path / "tune.yaml"
    file.write_text(to_yaml(config))
    # Room for the checkpoints of the first trial only.
    ended = run_on_small_disk(
        [sys.executable, "-m", "raydet", "tune", "--config", str(file)], disk, size="6m", kept=kept
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stdout + ended.stderr
    assert ended.stderr.count("raydet: error") == 1 and re.search("disk is full|No space left", ended.stderr), (
        ended.stderr
    )
    result = tune(dataclasses.replace(config, out=str(kept / "out"), retry_failed=True))
    assert [trial.state for trial in result.trials] == ["finished"] * 3


@pytest.mark.usefixtures("ray_cluster")
def test_a_time_limit_leaves_the_rest_for_later(shapes: Path, tmp_path: Path) -> None:
    config = _config(shapes, tmp_path / "out", {"epochs": 1}, num_trials=2, max_concurrent=1, time_limit_s=1)
    with pytest.raises(RunError, match=r"no trial .*--time-limit-s"):
        tune(config)
    assert [trial.state for trial in records.load(config.out)][:1] == ["unfinished"]
    result = tune(dataclasses.replace(config, time_limit_s=None))
    assert [trial.state for trial in result.trials] == ["finished", "finished"] and result.is_over
