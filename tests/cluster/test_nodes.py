"""Every job on a cluster of several nodes survives the loss of a node, a worker or the driver with the same result.

The nodes are real, each a separate set of processes, and so are the jobs, started from the command line. Each outcome
is compared with an undisturbed run on the same nodes. Each test prints the seconds from the kill to the next progress.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from raydet import PrepareShapesConfig, prepare_shapes
from raydet.models.checkpoints import STATES_FOLDER
from raydet.models.loading import build_detector
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table
from raydet.tuning import records
from tests.drivers import wait_until
from tests.nodes import Cluster, Node, nodes
from tests.outcomes import Rows, assert_same_rows, epochs_of, outcome_of_training, weights_hash
from tests.small_sets import rows_of, tiny_training

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

EPOCHS, STEPS = 4, 6
JOBS = ("train", "predict", "tune", "prepare", "evaluate")
RAYDET = [sys.executable, "-m", "raydet"]
TRAINING = {
    "epochs": EPOCHS,
    "learning_rate": 1e-3,
    "ema_decay": 0.9,
    "save_every_steps": 2,
    "cpus_per_worker": 1.2,  # of a node's two CPUs, so that no node has room for two workers
}
SMALL_PARTS = """
import sys
from raydet.preparation import prepare
from raydet.config import PrepareImagesConfig
config = PrepareImagesConfig(images=sys.argv[1], out=sys.argv[2], use_ray=True)
prepare._prepare(config, prepare._open_images, file_bytes=60_000)
"""
NUM_IMAGES, NUM_GROUPS, IMAGES_PER_GROUP, BOXES_PER_IMAGE = 400, 300, 20, 40


@dataclass(frozen=True)
class Job:
    """A job of the matrix.

    Attributes:
        command: Command line for an output folder.
        title: Process title of its workers.
        progress: Progress read from an output folder; never decreases.
        begun: Progress at which the job is in the middle of its work.
        outcome: Complete result read from an output folder.
    """

    command: Callable[[Path], list[str]]
    title: str
    progress: Callable[[Path], int]
    begun: int
    outcome: Callable[[Path], Rows]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and, for each test, a second node."""
    with (
        tempfile.TemporaryDirectory(prefix="rdn", ignore_cleanup_errors=True) as folder,
        nodes(2, cpus=2, folder=Path(folder)) as cluster,
    ):
        yield cluster


@pytest.fixture
def second(cluster: Cluster) -> Node:
    """The second node, replaced if it was killed."""
    return cluster.nodes[1] if len(cluster.nodes) > 1 else cluster.add_node()


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All jobs by name, with data on storage that the nodes share."""
    data = tmp_path_factory.mktemp("shared")
    prepare_shapes(PrepareShapesConfig(out=f"{data}/few", num_train=24, num_val=10, image_size=64, max_shapes=3))
    prepare_shapes(PrepareShapesConfig(out=f"{data}/many", num_train=NUM_IMAGES, num_val=1, image_size=64))
    categories = open_table(f"{data}/few/train", "images").categories
    build_detector("rt_detr_v2_tiny", categories, image_size=64, seed=3).save(f"{data}/checkpoint")
    _save_images(data / "images")
    _save_boxes(data)
    scoring = ["--batch-size=4", "--rows-per-file=8", "--threads-per-worker=1", "--cpus-per-worker=1.5"]
    matching = [f"--num-shards={NUM_GROUPS}", "--bootstrap=0"]
    return {
        "train": Job(
            lambda out: _train(data / "few", out, "2"), "RayTrainWorker", _num_states, STEPS + 2, outcome_of_training
        ),
        "predict": Job(
            lambda out: [
                *[*RAYDET, "predict", f"--data={data}/many/train", f"--checkpoint={data}/checkpoint"],
                *[f"--out={out}", "--num-workers=2", *scoring],
            ],
            "ScoringActor",
            _num_parts,
            10,
            lambda out: rows_of(out, "detections"),
        ),
        "tune": Job(lambda out: _tune(data / "few", out), "_LoneWorker", _num_trial_epochs, 3, _outcome_of_search),
        "prepare": Job(
            lambda out: [sys.executable, "-c", SMALL_PARTS, f"{data}/images", str(out)],
            "_work_on_item",
            _num_parts,
            2,
            lambda out: rows_of(out, "images"),
        ),
        "evaluate": Job(
            lambda out: [
                *[*RAYDET, "evaluate", f"--truth={data}/truth", f"--detections={data}/detections"],
                *[f"--out={out}", *matching, f"--ray-address={cluster.address}"],
            ],
            "_work_on_item",
            lambda out: len(list(out.glob("*"))),
            0,
            lambda out: [row for kind in ("metrics", "per_image") for row in rows_of(out / kind, kind)],
        ),
    }


class Undisturbed:
    """Outcomes of the undisturbed jobs, each run on first use."""

    def __init__(self, cluster: Cluster, jobs: dict[str, Job], folder: Path) -> None:
        self._cluster, self._jobs, self._folder = cluster, jobs, folder
        self._outcomes: dict[str, Rows] = {}

    def outcome(self, name: str) -> Rows:
        """Return the outcome of one job."""
        if name not in self._outcomes:
            out = self._folder / name
            done = self._cluster.run(self._jobs[name].command(out), timeout_s=300)
            assert done.returncode == 0, done.stdout + done.stderr
            self._outcomes[name] = self._jobs[name].outcome(out)
        return self._outcomes[name]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(cluster, jobs, tmp_path_factory.mktemp("undisturbed"))


def test_a_node_is_lost_whole(cluster: Cluster, second: Node) -> None:
    assert set(cluster.alive()) == {cluster.head.address, second.address}
    for node in (cluster.head, second):
        titles = [" ".join(process.cmdline()) for process in node.processes()]
        assert any("raylet/raylet" in title for title in titles), titles
        assert {process.cwd() for process in node.processes()} == {str(node.folder)}
        assert (node.folder / "r").is_dir()
    stranger = {**cluster.environment, "RAY_AUTH_TOKEN": "0" * 64}
    code = "import ray; ray.init()"
    refused = subprocess.run([sys.executable, "-c", code], env=stranger, capture_output=True, text=True, timeout=200)
    assert refused.returncode != 0 and "token" in refused.stderr.lower(), refused.stderr
    cluster.kill_node(second)
    assert second.processes() == []
    wait_until(lambda: len(cluster.alive()) == 1, lambda: "the loss was not noticed", timeout_s=60)


@pytest.mark.parametrize("name", JOBS)
def test_a_node_is_lost(
    cluster: Cluster, second: Node, jobs: dict[str, Job], undisturbed: Undisturbed, name: str, tmp_path: Path
) -> None:
    job, out, expected = jobs[name], tmp_path / "out", undisturbed.outcome(name)
    with cluster.started(job.command(out), tmp_path / "said") as driver:
        _wait_for_work(job, out, driver, tmp_path / "said", lambda: bool(_at_work(second, job)))
        done = job.progress(out)
        cluster.kill_node(second)
        killed = time.monotonic()
        if name == "train":  # its fixed number of workers does not fit on one node
            cluster.add_node()
        _follow(job, out, driver, tmp_path / "said", done, killed)
    assert_same_rows(job.outcome(out), expected)


@pytest.mark.parametrize("name", JOBS)
def test_the_driver_is_killed_and_the_job_submitted_again(
    cluster: Cluster, second: Node, jobs: dict[str, Job], undisturbed: Undisturbed, name: str, tmp_path: Path
) -> None:
    job, out, expected = jobs[name], tmp_path / "out", undisturbed.outcome(name)
    with cluster.started(job.command(out), tmp_path / "said") as driver:
        _wait_for_work(job, out, driver, tmp_path / "said", lambda: _num_at_work(cluster, job) > 0)
        done = job.progress(out)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        killed = time.monotonic()
    with cluster.started(job.command(out), tmp_path / "again") as driver:
        _follow(job, out, driver, tmp_path / "again", done, killed)
    assert_same_rows(job.outcome(out), expected)
    wait_until(lambda: _num_at_work(cluster, job) == 0, lambda: "workers of the killed job live on", timeout_s=60)


# The test files of training, scoring and preparation cover those jobs.
@pytest.mark.parametrize("name", ["tune", "evaluate"])
def test_a_worker_is_killed(
    cluster: Cluster, second: Node, jobs: dict[str, Job], undisturbed: Undisturbed, name: str, tmp_path: Path
) -> None:
    job, out, expected = jobs[name], tmp_path / "out", undisturbed.outcome(name)
    with cluster.started(job.command(out), tmp_path / "said") as driver:
        _wait_for_work(job, out, driver, tmp_path / "said", lambda: _num_at_work(cluster, job) > 0)
        done = job.progress(out)
        next(process for node in cluster.nodes for process in _at_work(node, job)).kill()
        _follow(job, out, driver, tmp_path / "said", done, time.monotonic())
    assert_same_rows(job.outcome(out), expected)


def test_a_trials_own_process_is_killed(
    cluster: Cluster, second: Node, jobs: dict[str, Job], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    job, out, expected = jobs["tune"], tmp_path / "out", undisturbed.outcome("tune")
    with cluster.started(job.command(out), tmp_path / "said") as driver:
        _wait_for_work(job, out, driver, tmp_path / "said", lambda: True)
        done = job.progress(out)
        trials = [process for node in cluster.nodes for process in node.workers("ImplicitFunc")]
        assert trials, "no trial has a process"
        trials[0].kill()
        _follow(job, out, driver, tmp_path / "said", done, time.monotonic())
    assert_same_rows(job.outcome(out), expected)


def test_elastic_training_continues_with_the_node_that_is_left(
    cluster: Cluster, second: Node, jobs: dict[str, Job], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    job, out, expected = jobs["train"], tmp_path / "out", undisturbed.outcome("train")
    with cluster.started(_train(_data_of(job), out, "[1, 2]"), tmp_path / "said") as driver:
        _wait_for_work(job, out, driver, tmp_path / "said", lambda: bool(_at_work(second, job)))
        done = job.progress(out)
        cluster.kill_node(second)
        _follow(job, out, driver, tmp_path / "said", done, time.monotonic())
    history = epochs_of(out)
    assert [entry["epoch"] for entry in history] == [*range(1, EPOCHS + 1)]
    # The batches are the same; random draws per worker, such as noisy boxes, differ between one and two workers.
    for entry, other, tolerance in zip(history[:2], expected[:2], (0.02, 0.1), strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=tolerance)
    logs = "\n".join(path.read_text() for path in Path(out, "log").glob("node-*.log"))
    assert "one of 2 workers" in logs and "one of 1 workers" in logs, logs


def test_workers_that_hold_all_cpus_do_not_wait_for_ever_for_images(
    cluster: Cluster, second: Node, jobs: dict[str, Job], tmp_path: Path
) -> None:
    """This occurs after the loss of a node, when all workers fit on the remaining nodes."""
    command = _train(_data_of(jobs["train"]), tmp_path / "out", "2", cpus_per_worker=2.0)
    done = cluster.run(command, timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [path.read_text() for path in Path(tmp_path, "out", "log").glob("node-*.log")]
    assert len(logs) == 2 and all("one of 2 workers" in log for log in logs), "a worker on each node"


def _train(data: Path, out: Path, num_workers: str, **changes: object) -> list[str]:
    options = tiny_training(data, **{**TRAINING, "out": out, "num_workers": num_workers, **changes})
    return [*RAYDET, "train", *(f"--{name}={value}" for name, value in options.items())]


def _tune(data: Path, out: Path) -> list[str]:
    config = {
        "out": str(out),
        "train_config": tiny_training(data, **TRAINING),
        "space": {"learning_rate": {"loguniform": [1e-4, 1e-3]}},
        "search": "random",
        "scheduler": "none",
        "metric": "loss",  # such a short training has an AP of 0
        "num_trials": 3,
        "max_concurrent": 2,
    }
    file = out.with_name(f"{out.name}.yaml")
    file.write_text(yaml.safe_dump(config))
    return [*RAYDET, "tune", f"--config={file}"]


def _data_of(job: Job) -> Path:
    """Return the folder of the tables on which a training job runs."""
    option = next(word for word in job.command(Path("out")) if word.startswith("--train_data="))
    return Path(option.partition("=")[2]).parent


def _save_images(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((320, 240)).save(folder / f"{number:04d}.jpg")


def _save_boxes(folder: Path) -> None:
    """Write the tables `truth` and `detections`, the latter with many row groups, which are matched one by one."""
    random = np.random.default_rng(0)
    categories = [Category(1, "cat"), Category(2, "dog")]
    schemas = [build_schema(kind, categories) for kind in ("images", "detections")]
    with (
        TableWriter(f"{folder}/truth", schemas[0], config_hash="x") as truth,
        TableWriter(f"{folder}/detections", schemas[1], config_hash="x") as detections,
    ):
        for first in range(0, NUM_GROUPS * IMAGES_PER_GROUP, IMAGES_PER_GROUP):
            ids = range(first, first + IMAGES_PER_GROUP)
            rows = [_made_up(random, image_id) for image_id in ids]
            truth.write_rows([row for row, _ in rows])
            detections.write_rows([row for _, row in rows])
            detections.flush()


def _made_up(random: np.random.Generator, image_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
    boxes = np.round(random.uniform(5, 120, (BOXES_PER_IMAGE, 4)), 1)
    category = random.integers(0, 2, BOXES_PER_IMAGE).tolist()
    row = {"image_id": image_id, "width": 300, "height": 300}
    objects = {"id": [*range(BOXES_PER_IMAGE)], "bbox": boxes.tolist(), "category": category}
    objects |= {"area": (boxes[:, 2] * boxes[:, 3]).tolist(), "iscrowd": [False] * BOXES_PER_IMAGE}
    found = {"bbox": np.abs(boxes + random.normal(0, 3, boxes.shape)).tolist(), "category": category}
    found["score"] = random.random(BOXES_PER_IMAGE).tolist()
    image = {"bytes": b"not a picture", "path": "a.png"}
    return {**row, "image": image, "objects": objects}, {**row, "path": "a.png", "detections": found, "error": None}


def _at_work(node: Node, job: Job) -> list[psutil.Process]:
    return node.workers(job.title)


def _num_at_work(cluster: Cluster, job: Job) -> int:
    return sum(len(_at_work(node, job)) for node in cluster.nodes)


def _wait_for_work(
    job: Job, out: Path, driver: "subprocess.Popen[bytes]", said: Path, is_ready: Callable[[], bool]
) -> None:
    """Wait until a job is in the middle of its work."""
    wait_until(
        lambda: driver.poll() is not None or (job.progress(out) >= job.begun and is_ready()),
        said.read_text,
        timeout_s=250,
    )
    assert driver.poll() is None, f"finished too early: {said.read_text()}"


def _follow(job: Job, out: Path, driver: "subprocess.Popen[bytes]", said: Path, done: int, killed_at_s: float) -> None:
    """Wait for a job to succeed, and print the seconds from the kill to the next progress."""
    wait_until(lambda: driver.poll() is not None or job.progress(out) > done, said.read_text, timeout_s=250)
    print(f"next progress after {time.monotonic() - killed_at_s:.1f} s")
    assert driver.wait(timeout=250) == 0, said.read_text()
    assert "Traceback" not in said.read_text()


def _num_states(out: Path) -> int:
    """Return the number of states that a training has written, from the newest one's name; only two are kept."""
    names = sorted(path.stem for path in Path(out, STATES_FOLDER).glob("*.pt"))
    epoch, _, step = names[-1].partition("-") if names else ("0", "", "0")
    return int(epoch) * STEPS + int(step)


def _num_parts(out: Path) -> int:
    return len(list(out.glob("part-*.parquet")))


def _num_trial_epochs(out: Path) -> int:
    return sum(len(trial.history) for trial in records.load(str(out)))


def _outcome_of_search(out: Path) -> Rows:
    """Return the rows of all trials but their times, with the numbers of their epochs and their weights."""
    return [
        {
            **{name: value for name, value in row.items() if name not in ("seconds", "checkpoint")},
            "epochs": epochs_of(out / "trials" / row["trial"]),
            "weights": weights_hash(row["checkpoint"]),
        }
        for row in rows_of(out / "trials", "trials")
    ]
