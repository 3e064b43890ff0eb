"""`crops` in a process of its own that is killed, or loses workers: exactly one row per detection, none asked twice."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from raydet import CropsConfig, crops
from tests.drivers import command_of, processes_of, started, wait_for_progress, wait_until
from tests.second_looks.scored import config_of, write_scored
from tests.small_sets import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

NUM_IMAGES = 300
NUM_FILES = 150
ANSWERS = 3 * (NUM_IMAGES - 43)  # every seventh image has no detections


@pytest.fixture(scope="module")
def reference(models: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[CropsConfig, list[dict[str, Any]]]:
    """An undisturbed run and its rows."""
    data = write_scored(tmp_path_factory.mktemp("killed"), NUM_IMAGES)
    config = config_of(data, data / "out", models("vit"), "image-classification", rows_per_file=2, threads_per_worker=1)
    rows = rows_of(crops(config).out, "crops")
    assert len(rows) == len({(row["image_id"], row["detection"]) for row in rows}) == ANSWERS
    return config, rows


def _files(out: str) -> dict[str, int]:
    """Return the files that are written, with the times of their last changes."""
    return {path.name: path.stat().st_mtime_ns for path in Path(out).glob("part-*.parquet")}


def _has_files(out: str, part: float) -> bool:
    return len(_files(out)) >= part * NUM_FILES


@pytest.mark.parametrize("address", ["local", ""], ids=["cluster", "process"])
def test_a_run_that_is_killed_twice_has_one_row_per_detection(
    reference: tuple[CropsConfig, list[dict[str, Any]]], tmp_path: Path, address: str
) -> None:
    config = dataclasses.replace(reference[0], out=str(tmp_path / "out"))
    done: dict[str, int] = {}
    for number, part in enumerate((0.2, 0.6)):
        output = tmp_path / f"output {number}"
        with started(command_of("crops", config), output, env={**os.environ, "RAY_ADDRESS": address}) as driver:
            wait_for_progress(functools.partial(_has_files, config.out, part), driver, output)
        now = _files(config.out)
        assert len(now) < NUM_FILES, "killed too late to tell"
        assert {name: now[name] for name in done} == done, "work was done again"
        done = now
    assert crops(config).num_crops == ANSWERS
    assert {name: _files(config.out)[name] for name in done} == done, "work was done again"
    assert rows_of(config.out, "crops") == reference[1]


def test_a_lost_worker_is_replaced_as_often_as_allowed(
    reference: tuple[CropsConfig, list[dict[str, Any]]], tmp_path: Path
) -> None:
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    for allowed in (0, 1):
        config = dataclasses.replace(reference[0], out=str(tmp_path / str(allowed)), max_failures=allowed)
        output = tmp_path / f"output {allowed}"
        with started(command_of("crops", config), output, env=environment) as driver:
            wait_for_progress(functools.partial(_has_files, config.out, 0.2), driver, output)
            _worker_of(driver.pid).kill()
            wait_until(lambda: driver.poll() is not None, output.read_text)
        assert driver.returncode == (0 if allowed else 1), output.read_text()
        if not allowed:
            assert "--max-failures 0" in output.read_text() and "Traceback" not in output.read_text()
            assert len(_files(config.out)) < NUM_FILES
            crops(config)
        assert rows_of(config.out, "crops") == reference[1]


def _worker_of(leader: int) -> psutil.Process:
    (worker,) = (one for one in processes_of(leader) if "_CropsActor" in " ".join(one.cmdline()))
    return worker
