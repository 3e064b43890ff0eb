"""Scoring survives kills of workers, driver and nodes, a full disk and a failing store, with every row exactly once.

All processes are real; each table is compared with that of an undisturbed run, which is equal to the last bit: batches
follow from the plan, and each worker has one thread.
"""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from raydet import PredictConfig, PrepareShapesConfig, predict, prepare_shapes
from raydet.models.loading import build_detector
from raydet.tables import storage
from raydet.tables.table import open_table
from tests import s3_stand_in
from tests.drivers import command_of, needs_small_disk, run_on_small_disk, started, wait_for_progress
from tests.outcomes import Rows, assert_same_rows
from tests.s3_stand_in import BUCKET
from tests.small_sets import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

NUM_IMAGES = 600
ROWS_PER_FILE = 12
NUM_FILES = NUM_IMAGES // ROWS_PER_FILE
PLACES = ("cluster", "process")
"""A Ray cluster on this machine, or the process of the command."""


def environment(place: str) -> dict[str, str]:
    """Return the environment of a command that scores in a place."""
    return {**os.environ, "RAY_ADDRESS": "local" if place == "cluster" else ""}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[PredictConfig, Rows]:
    """An undisturbed run and its rows."""
    folder = tmp_path_factory.mktemp("faults")
    data = PrepareShapesConfig(out=str(folder), num_train=NUM_IMAGES, num_val=4, image_size=64, max_shapes=3)
    prepare_shapes(data)
    categories = open_table(str(folder / "train"), "images").categories
    build_detector("rt_detr_v2_tiny", categories, image_size=64, seed=3).save(str(folder / "checkpoint"))
    config = PredictConfig(
        checkpoint=str(folder / "checkpoint"),
        data=str(folder / "train"),
        out=str(folder / "undisturbed"),
        batch_size=4,
        rows_per_file=ROWS_PER_FILE,
        threads_per_worker=1,
    )
    rows = rows_of(predict(config).out, "detections")
    assert len(rows) == NUM_IMAGES and all(row["detections"]["score"] for row in rows)
    return config, rows


def _assert_same(out: str, expected: Rows) -> None:
    assert_same_rows(rows_of(out, "detections"), expected)


def _num_files(out: str) -> int:
    return len(list(Path(out).glob("part-*.parquet")))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_killed_run_resumes(reference: tuple[PredictConfig, Rows], tmp_path: Path, part: float, place: str) -> None:
    config = dataclasses.replace(reference[0], out=str(tmp_path / "d"))
    output = tmp_path / "output"
    with started(command_of("predict", config), output, env=environment(place)) as driver:
        wait_for_progress(lambda: _num_files(config.out) >= part * NUM_FILES, driver, output)
    done = {path.name: path.stat().st_mtime_ns for path in Path(config.out).glob("part-*.parquet")}
    assert len(done) < NUM_FILES, "killed too late to tell"
    predict(config)
    assert {name: Path(config.out, name).stat().st_mtime_ns for name in done} == done, "work was done again"
    _assert_same(config.out, reference[1])


def test_only_the_driver_is_killed(reference: tuple[PredictConfig, Rows], tmp_path: Path) -> None:
    config = dataclasses.replace(reference[0], out=str(tmp_path / "d"))
    output = tmp_path / "output"
    with started(command_of("predict", config), output, env=environment("cluster")) as driver:
        wait_for_progress(lambda: _num_files(config.out) >= 0.3 * NUM_FILES, driver, output)
        driver.kill()
        driver.wait()
        # Files that its workers still finish are identical.
        predict(config)
    _assert_same(config.out, reference[1])


@pytest.mark.parametrize("title", ["ray::ScoringActor", "ray::Decoder"])
def test_a_killed_actor_is_replaced(reference: tuple[PredictConfig, Rows], tmp_path: Path, title: str) -> None:
    config = dataclasses.replace(reference[0], out=str(tmp_path / "d"), num_workers=2)
    output = tmp_path / "output"
    with started(command_of("predict", config), output) as driver:
        wait_for_progress(lambda: _num_files(config.out) >= 0.3 * NUM_FILES, driver, output)
        actors = [
            process
            for process in psutil.Process(driver.pid).children(recursive=True)
            if " ".join(process.cmdline()).startswith(title)
        ]
        assert len(actors) == 2, [process.cmdline() for process in actors]
        actors[0].kill()
        assert driver.wait(timeout=200) == 0, output.read_text()
    assert "lost" not in output.read_text()
    _assert_same(config.out, reference[1])


def test_a_second_run_is_refused_and_a_finished_one_does_nothing(
    reference: tuple[PredictConfig, Rows], tmp_path: Path
) -> None:
    config = dataclasses.replace(reference[0], out=str(tmp_path / "d"))
    output = tmp_path / "output"
    with started(command_of("predict", config), output) as driver:
        wait_for_progress(lambda: _num_files(config.out) >= 1, driver, output)
        second = subprocess.run(command_of("predict", config), capture_output=True, text=True, timeout=60)
        assert second.returncode == 2 and "is in use by another run" in second.stderr, second.stderr
        assert driver.wait(timeout=200) == 0, output.read_text()
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*.parquet")}
    assert predict(config).already_done
    assert {path: path.stat().st_mtime_ns for path in before} == before
    _assert_same(config.out, reference[1])


@needs_small_disk
@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_ends_the_run_with_one_line(
    reference: tuple[PredictConfig, Rows], tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", environment(place)["RAY_ADDRESS"])
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    config = dataclasses.replace(reference[0], out=str(disk / "d"))
    result = run_on_small_disk(command_of("predict", config), disk, size="200k", kept=kept)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "cannot write to" in result.stderr and "No space left on device" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    config = dataclasses.replace(config, out=str(kept / "d"))
    assert 0 < _num_files(config.out) < NUM_FILES
    predict(config)
    _assert_same(config.out, reference[1])


@pytest.mark.parametrize("place", PLACES)
def test_a_store_that_fails_for_a_while(reference: tuple[PredictConfig, Rows], tmp_path: Path, place: str) -> None:
    with s3_stand_in.started() as server, pytest.MonkeyPatch.context() as patch:
        server.use(patch)
        storage.publish_folder(reference[0].data_uri, f"{BUCKET}/images")
        config = dataclasses.replace(reference[0], data=f"{BUCKET}/images", out=f"{BUCKET}/detections")
        output = tmp_path / "output"
        with started(command_of("predict", config), output, env=environment(place)) as driver:
            wait_for_progress(lambda: len(storage.list_files(config.out)) > 0.2 * NUM_FILES, driver, output)
            server.fail("503", 15)
            assert driver.wait(timeout=250) == 0, output.read_text()
        assert server.num_refused > 0
        # This process did not write the table, like any user's.
        _assert_same(config.out, reference[1])


@pytest.mark.cluster
def test_a_lost_node_is_made_up_for(reference: tuple[PredictConfig, Rows], tmp_path: Path) -> None:
    config = dataclasses.replace(reference[0], out=str(tmp_path / "d"), num_workers=2, cpus_per_worker=1.5)
    script = """
        import dataclasses, json, sys, tempfile, threading, time
        from pathlib import Path
        import ray
        from ray.cluster_utils import Cluster
        from raydet import PredictConfig, predict

        config = PredictConfig(**json.loads(sys.argv[1]))
        options = {"num_cpus": 2, "object_store_memory": 200 * 2**20}
        temporary = tempfile.mkdtemp(prefix="rdt")
        cluster = Cluster(initialize_head=True, head_node_args={**options, "temp_dir": temporary})
        second = cluster.add_node(**options)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)

        def remove() -> None:
            while len(list(Path(config.out).glob("part-*.parquet"))) < int(sys.argv[2]):
                time.sleep(0.01)
            cluster.remove_node(second, allow_graceful=False)
            print("the node is gone", flush=True)

        threading.Thread(target=remove, daemon=True).start()
        print(predict(config).num_images)
        print(sum(node["Alive"] for node in ray.nodes()), "node is left")
        ray.shutdown()
        cluster.shutdown()
    """
    arguments = [json.dumps(dataclasses.asdict(config)), str(int(0.3 * NUM_FILES))]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=350,
        env={**os.environ, "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the node is gone" in result.stdout and "1 node is left" in result.stdout, result.stdout
    _assert_same(config.out, reference[1])
