"""The jobs as users run them: `ray job submit` and `ray job stop` on a local head that requires a token."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from raydet.models.checkpoints import STATES_FOLDER
from raydet.models.loading import build_detector
from raydet.preparation.sources.shapes import CATEGORIES
from raydet.tables.schema import build_schema
from raydet.tables.table import TableWriter, open_table
from tests.local_head import free_port, running_head
from tests.small_sets import rows_of, save_image, tiny_training

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


class Head:
    """A Ray head with a dashboard on loopback: its start command, and a client for its jobs."""

    def __init__(self, folder: str) -> None:
        self.address = f"http://127.0.0.1:{free_port()}"
        self.token = secrets.token_hex(32)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {
            **os.environ,
            "PATH": path,
            "HOME": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }
        command = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2", f"--temp-dir={folder}/r"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
        command += [f"--port={free_port()}", f"--dashboard-port={self.address.rsplit(':')[-1]}"]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        self.command = [*command, "--object-store-memory=300000000"]

    def submit(
        self, *words: str, submission_id: str = "", wait: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Submit a job, by default wait for its end, and return the output of `ray job submit`."""
        command = [RAY, "job", "submit", "--address", self.address, "--working-dir", str(ROOT)]
        # Saving on SIGTERM may take longer than Ray's default of three seconds.
        settings = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", "SOME_KEY": "a-secret"}}
        command += ["--runtime-env-json", json.dumps(settings)]
        command += ["--metadata-json", json.dumps({"commit": COMMIT, "password": "a-secret"})]
        command += [*(["--submission-id", submission_id] if submission_id else []), *([] if wait else ["--no-wait"])]
        return subprocess.run(
            [*command, "--", "python", *words],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )

    def start(self, *words: str) -> str:
        """Submit a job and return its submission id."""
        submission_id = f"job_{secrets.token_hex(4)}"
        done = self.submit(*words, submission_id=submission_id, wait=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return submission_id

    def stop(self, submission_id: str) -> None:
        """Stop a job with `ray job stop` and wait for its end."""
        command = [RAY, "job", "stop", "--address", self.address, submission_id]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert self.job(submission_id)["status"] == "STOPPED", self.logs(submission_id)

    def get(self, path: str) -> Any:
        """Return the dashboard's answer to a GET request."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        return json.load(urllib.request.urlopen(request, timeout=20))

    def job(self, submission_id: str) -> dict[str, Any]:
        """Return Ray's details of a job: status, exit code of the driver, and more."""
        return dict(self.get(f"/api/jobs/{submission_id}"))

    def logs(self, submission_id: str) -> str:
        """Return the output of the job's driver."""
        return str(self.get(f"/api/jobs/{submission_id}/logs")["logs"])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A running head; all its processes stop with it."""
    with tempfile.TemporaryDirectory(prefix="rdj", ignore_cleanup_errors=True) as folder:
        head = Head(folder)
        with running_head(head.command, head.environment, head.address, Path(folder, "head.log")):
            yield head


TINY = ["--model=rt_detr_v2_tiny", "--image-size=64", "--batch-size=48", "--augmentation=flip", "--epochs=3"]
TINY += ["--threads-per-worker=1", "--log-images=0"]
COMMIT = "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567"


@dataclass(frozen=True)
class Work:
    """Outputs of the undisturbed jobs: tables, a training run, and detections on its training images."""

    data: Path
    run: Path
    detections: Path

    def train(self, out: Path) -> list[str]:
        """Return the undisturbed training job's command with another output."""
        return [
            "jobs/train.py",
            f"--train-data={self.data}/train",
            f"--val-data={self.data}/val",
            f"--out={out}",
            *TINY,
        ]

    def predict(self, out: Path) -> list[str]:
        """Return the undisturbed scoring job's command with another output."""
        options = ["--rows-per-file=8", "--batch-size=8", "--threads-per-worker=1"]
        return [
            "jobs/predict.py",
            f"--checkpoint={self.run}/checkpoint",
            f"--data={self.data}/train",
            f"--out={out}",
            *options,
        ]


@pytest.fixture(scope="module")
def work(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """All four jobs, run in sequence without disturbance."""
    folder = tmp_path_factory.mktemp("work")
    work = Work(folder / "data", folder / "run", folder / "detections")
    evaluation = [f"--truth={work.data}/train", f"--detections={work.detections}", f"--out={folder}/metrics"]
    sizes = ["--num-train=1200", "--num-val=8", "--image-size=64"]
    for words in (
        ["jobs/prepare.py", "shapes", f"--out={work.data}", *sizes],
        work.train(work.run),
        work.predict(work.detections),
        ["jobs/evaluate.py", *evaluation],
    ):
        done = head.submit(*words)
        assert done.returncode == 0, f"{words[0]}\n{done.stdout}\n{done.stderr}"
        assert "succeeded" in done.stdout + done.stderr
    assert "AP50" in done.stdout
    return work


@pytest.mark.timeout(290)
def test_the_four_jobs_say_what_ran_where(work: Work) -> None:
    assert open_table(str(work.detections), "detections").num_rows == 1200
    for path in (work.detections / ".job.json", work.run / "log" / ".job.json"):
        text = path.read_text()
        job = json.loads(text)["job"]
        assert job["submission_id"].startswith("raysubmit_") and job["commit"] == COMMIT
        assert len(job["ray_job_id"]) == 8 and job["num_nodes"] == 1 and job["nodes"][0]["num_cpus"] == 2
        assert {"raydet", "ray", "torch"} <= job["versions"].keys()
        assert "a-secret" not in text, "the record holds the commit only, no other metadata and no environment"
    job = json.loads(Path(work.run, "log", ".job.json").read_text())["job"]
    (log,) = Path(work.run, "log").glob("node-*.log")
    address = log.stem.removeprefix("node-")
    lines = log.read_text().splitlines()
    assert all(f" job={job['ray_job_id']} node={address}/" in line for line in lines), lines
    assert any(" rank=0: epoch 3: 1200 images" in line for line in lines), lines


def test_a_mistake_fails_the_job_with_its_one_line(head: Head) -> None:
    done = head.submit("jobs/train.py", "--epoch", "3", submission_id="mistaken")
    assert done.returncode == 1
    line = "raydet: error: unknown option --epoch; did you mean --epochs?"
    assert line in done.stdout + done.stderr
    assert "Traceback" not in done.stdout
    job = head.job("mistaken")
    assert job["status"] == "FAILED" and job["driver_exit_code"] == 2 and line in job["message"]


def test_a_failure_is_told_from_a_mistake(head: Head, work: Work, tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    words = [f"--truth={work.data}/val", f"--detections={work.detections}", f"--ray-address={nowhere}"]
    head.submit("jobs/evaluate.py", *words, "--allow-partial=true", submission_id="failed")
    job = head.job("failed")
    assert job["status"] == "FAILED" and job["driver_exit_code"] == 1, job
    assert f"raydet: error: cannot connect to Ray at {nowhere}" in job["message"]


@pytest.mark.timeout(290)
def test_a_stopped_prediction_leaves_whole_files_and_no_orphan(head: Head, work: Work, tmp_path: Path) -> None:
    out = tmp_path / "detections"
    job = head.start(*work.predict(out))
    _wait_for(lambda: len(list(out.glob("part-*.parquet"))) >= 2, head, job)
    head.stop(job)
    files = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 2 <= len(files) < 150, "stopped too late"
    assert all(pq.read_metadata(path).num_rows == 8 for path in files)
    assert not Path(out, ".manifest.json").exists()
    _assert_nothing_is_left(head, job)
    done = head.submit(*work.predict(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in files} == files, "finished files are not written again"
    tables = [open_table(str(folder), "detections").read() for folder in (out, work.detections)]
    assert tables[0].equals(tables[1])


@pytest.mark.timeout(290)
def test_a_stopped_training_saves_and_resumes_to_the_same(head: Head, work: Work, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = head.start(*work.train(out))
    _wait_for(Path(out, STATES_FOLDER, "00001-0000000.pt").exists, head, job)
    head.stop(job)
    assert "run stopped" in head.logs(job)
    _assert_nothing_is_left(head, job)
    assert len(json.loads(Path(out, "log", "history.json").read_text())) < 3, "stopped too late"
    done = head.submit(*work.train(out))
    assert done.returncode == 0, done.stdout + done.stderr
    histories = [json.loads(Path(folder, "log", "history.json").read_text()) for folder in (out, work.run)]
    for name in ("loss", "gradient_norm", "AP"):
        assert [entry[name] for entry in histories[0]] == [entry[name] for entry in histories[1]], name
    record = json.loads(Path(out, "log", ".job.json").read_text())
    assert [earlier["submission_id"] for earlier in record["earlier_jobs"]] == [job]


def test_a_stopped_preparation_leaves_no_table(head: Head, tmp_path: Path) -> None:
    words = ["jobs/prepare.py", "shapes", f"--out={tmp_path}/data", "--num-train=200000", "--num-val=4"]
    job = head.start(*words, "--image-size=64")
    _wait_for(lambda: any(Path(tmp_path, "data").rglob("*.parquet")), head, job)
    head.stop(job)
    assert "run stopped" in head.logs(job)
    assert list(Path(tmp_path, "data").rglob(".manifest.json")) == []


def test_without_the_token_nothing_is_run(head: Head) -> None:
    done = head.submit("jobs/train.py", RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode != 0
    assert "raydet: error" not in done.stdout + done.stderr
    assert "Authentication" in done.stdout + done.stderr or "Unauthorized" in done.stdout + done.stderr
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=5)
    assert refused.value.code == 401


@pytest.mark.timeout(290)
def test_a_sweep_ends_with_a_long_run_of_the_best_options(head: Head, shapes: Path, tmp_path: Path) -> None:
    config = {
        "train_config": {**tiny_training(shapes), "epochs": 1},
        "space": {"learning_rate": {"choice": [1e-4, 1e-3]}},
        "num_trials": 2,
        "search": "random",
        "scheduler": "none",
        "out": "unused",
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
    data = [f"--train-data={shapes}/train", f"--val-data={shapes}/val", f"--out={tmp_path}/sweep"]
    done = head.submit("jobs/sweep.py", f"--search={tmp_path}/sweep.yaml", "--epochs=2", *data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert open_table(str(tmp_path / "sweep/search/trials"), "trials").num_rows == 2
    assert len(json.loads((tmp_path / "sweep/train/log/history.json").read_text())) == 2


@pytest.mark.timeout(290)
def test_every_night_scores_what_is_new(head: Head, shapes: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "scored"
    build_detector("rt_detr_v2_tiny", CATEGORIES, image_size=64, seed=0).save(str(tmp_path / "model"))
    (tmp_path / "predict.yaml").write_text(f"checkpoint: {tmp_path}/model\nthreads_per_worker: 1\n")
    words = ["jobs/nightly.py", f"--predict={tmp_path}/predict.yaml", f"--images={images}", f"--out={out}"]
    for night, names in (("monday", ["a", "sub/b"]), ("tuesday", ["c"]), ("wednesday", [])):
        for name in names:
            save_image(images / f"{name}.jpg")
        done = head.submit(*words, f"--night={night}")
        assert done.returncode == 0, done.stdout + done.stderr
    assert "no new images" in done.stdout and not (out / "wednesday").exists()
    scored = {night: open_table(str(out / night), "detections").read() for night in ("monday", "tuesday")}
    assert {night: len(table) for night, table in scored.items()} == {"monday": 2, "tuesday": 1}
    assert scored["tuesday"]["path"].to_pylist() == [str(images / "c.jpg")]
    again = head.submit(*words, "--night=monday")
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stdout + again.stderr


@pytest.mark.timeout(290)
def test_the_gate_stays_closed_for_a_worse_model(head: Head, shapes: Path, tmp_path: Path) -> None:
    truth = str(shapes / "val")
    for name, share in (("current", 1.0), ("worse", 0.5)):
        with TableWriter(str(tmp_path / name), build_schema("detections", CATEGORIES), config_hash="x") as writer:
            for row in rows_of(truth):
                kept = int(len(row["objects"]["id"]) * share)
                found = {key: row["objects"][key][:kept] for key in ("bbox", "category")} | {"score": [0.5] * kept}
                size = {key: row[key] for key in ("image_id", "width", "height")}
                writer.write_rows([{**size, "path": row["image"]["path"], "detections": found}])
    words = ["jobs/release_gate.py", f"--truth={truth}", f"--current={tmp_path}/current"]
    done = head.submit(*words, f"--candidate={tmp_path}/current")
    assert done.returncode == 0 and "release: the difference" in done.stdout, done.stdout + done.stderr
    head.submit(*words, f"--candidate={tmp_path}/worse", submission_id="gated")
    job = head.job("gated")
    assert job["status"] == "FAILED" and job["driver_exit_code"] == 3, job
    assert "do not release" in head.logs("gated")


def _wait_for(is_there: Callable[[], bool], head: Head, job: str) -> None:
    deadline = time.monotonic() + 150
    while not is_there():
        assert time.monotonic() < deadline and head.job(job)["status"] in ("PENDING", "RUNNING"), head.logs(job)
        time.sleep(0.05)


def _assert_nothing_is_left(head: Head, job: str) -> None:
    """Check that the job's actors and placement groups are gone, except those that Ray keeps with the cluster."""
    job_id = head.job(job)["job_id"]
    deadline = time.monotonic() + 60
    while True:
        actors = head.get("/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
        groups = head.get("/api/v0/placement_groups?limit=1000&detail=1")["data"]["result"]["result"]
        own = [actor for actor in actors if actor["job_id"] == job_id and not actor["is_detached"]]
        left = [actor["class_name"] for actor in own if actor["state"] != "DEAD"]
        left += [group["placement_group_id"] for group in groups if group["state"] != "REMOVED"]
        if not left:
            assert own, "the job had some"
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
