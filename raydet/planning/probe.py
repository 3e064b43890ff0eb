"""Measurements on this machine for `plan`: the stages separately, and a short real run.

The stages run in plain processes, one per CPU at the same time, because CPUs that are all busy share caches and memory
and are each slower than a single busy one. The real run determines the overhead of raydet and Ray beyond the stages.
"""

import contextlib
import dataclasses
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import psutil

from raydet.cluster.job_record import JOB_FILE
from raydet.cluster.timeline import Window
from raydet.common.threads import available_cpus
from raydet.config import PlanConfig
from raydet.models.checkpoints import read_checkpoint
from raydet.planning.processes import READY, raise_failure, run_watched, started
from raydet.planning.samples import Samples, take_samples
from raydet.planning.throughput import Probe, StageCost, check_devices
from raydet.tables import storage
from raydet.tables.schema import Category

_MEMORY_OF_A_PROCESS_BYTES = 1.5 * 2**30
_MOST_THREADS_OF_A_WORKER = 4
_LEAST_BATCHES = 16
_TURNS = 4
"""Maximum alternating turns, because the speed of a shared machine varies."""

Say = Callable[[str], None]


def threads_of_a_worker(config: PlanConfig, num_cpus: int) -> int:
    """Return the threads of one copy of the model on a machine with this many CPUs."""
    if config.threads_per_worker is not None:
        return config.threads_per_worker
    # Few workers share a training step, so each needs many threads.
    return num_cpus if config.job == "train" else min(_MOST_THREADS_OF_A_WORKER, num_cpus)


def measure(config: PlanConfig, *, needs_gpu: bool | None = None, say: Say) -> Probe:
    """Measure on this machine for about four times `config.seconds`, plus one or two minutes of start-up.

    Args:
        config: Job to plan.
        needs_gpu: True if the plan is for GPUs; None to plan for this machine.
        say: Called with a line of text before each measurement.

    Raises:
        UserError: The model or the images cannot be used.
        RunError: A measurement failed.
    """
    num_cpus = available_cpus()
    with tempfile.TemporaryDirectory(prefix="raydet-plan-", ignore_cleanup_errors=True) as folder:
        say("sampling the images")
        samples = take_samples(config, folder)
        model = _model_folder(config, samples, folder)
        stages = _measure_stages(config, samples, model, folder, num_cpus=num_cpus, needs_gpu=needs_gpu, say=say)
        on_gpu = stages.device != "cpu"
        threads = num_cpus if on_gpu else threads_of_a_worker(config, num_cpus)
        probe = Probe(
            job=config.job,
            model=f"{config.checkpoint or config.model}, {config.engine}, {config.precision}",
            device=stages.device,
            machine=f"{platform.node()}, {num_cpus} CPUs",
            num_cpus=num_cpus,
            stages=stages.costs,
            model_all_threads=stages.model_all_threads,
            ray_cpu_s=0.0,
            run_images_per_s=0.0,
            run_workers=1 if on_gpu else max(1, num_cpus // threads),
            run_threads=threads,
            run_decoded_ahead=0.0,
            startup_s=0.0,
            worker_startup_cpu_s=stages.startup_cpu_s,
            image_bytes=samples.image_bytes,
            pixel_bytes=stages.pixel_bytes,
            gradient_bytes=stages.gradient_bytes,
            waiting_s=stages.waiting_s,
            waiting_workers=stages.num_processes,
            batch_size=config.batch,
            source_read_s=samples.source_read_s,
        )
        say(f"measuring a short run of raydet {config.job}")
        measure_run = _measure_predict if config.job == "predict" else _measure_train
        # The model's cost depends on its number of threads.
        costs = {**stages.costs, "model": probe.model_cost(threads)}
        cpu_s = sum(cost.cpu_s for cost in costs.values())
        expected_rate = min(num_cpus / cpu_s, probe.run_workers / costs["model"].wall_s)
        setting = _RunSetting(
            config=config,
            model=model,
            folder=folder,
            workers=probe.run_workers,
            threads=threads,
            costs=costs,
            rate=expected_rate,
        )
        run = measure_run(setting, samples)
    return dataclasses.replace(
        probe,
        ray_cpu_s=run.ray_cpu_s,
        run_images_per_s=run.images_per_s,
        run_decoded_ahead=run.decoded_ahead,
        startup_s=run.startup_s,
    )


@dataclass(frozen=True, kw_only=True)
class _Stages:
    """Measurements of the separate stages.

    Attributes:
        device: Device of the model.
        costs: Cost of an image by stage, while all CPUs are busy.
        model_all_threads: Cost of an image in the model with as many threads as CPUs.
        num_processes: Number of concurrent processes.
        startup_cpu_s: CPU seconds of each process until it was ready.
        waiting_s: Additional seconds of a training step when all processes take it together.
        pixel_bytes: Average bytes of a decoded image.
        gradient_bytes: Bytes of the gradients of all trainable parameters.
    """

    device: str
    costs: Mapping[str, StageCost]
    model_all_threads: StageCost
    num_processes: int
    startup_cpu_s: float
    waiting_s: float
    pixel_bytes: float
    gradient_bytes: float


def _measure_stages(
    config: PlanConfig,
    samples: Samples,
    model: str,
    folder: str,
    *,
    num_cpus: int,
    needs_gpu: bool | None,
    say: Say,
) -> _Stages:
    """Run alternately one process with all threads, and one single-threaded process per CPU."""
    job = {
        "job": config.job,
        "table": samples.write(f"{folder}/samples", len(samples.rows)),
        "model": model,
        "image_size": config.image_size,
        "engine": config.engine,
        "precision": config.precision,
        "augmentation": config.augmentation,
        "batch_size": config.batch,
        "threads": num_cpus,
        "use_gpu": config.use_gpu,
        "with_model": True,
        "seconds": config.seconds / 2 / _TURNS,
    }
    say(f"measuring the model with {num_cpus} threads or on a GPU, and alternately all stages with all CPUs busy")
    of_alone: list[dict[str, Any]] = []
    of_busy: list[dict[str, Any]] = []
    with _stage_processes([job], f"{folder}/alone") as [alone]:
        device = alone.wait_until_ready()
        if needs_gpu is not None:
            check_devices([device], needs_gpu=needs_gpu)
        on_gpu, copies = device != "cpu", _copies(num_cpus)
        job |= {"threads": 1, "with_model": not on_gpu, "seconds": config.seconds / _TURNS}
        if config.job == "train":  # the workers share a batch
            job["batch_size"] = max(1, config.batch // copies)
            if not on_gpu:
                job |= {"num_ranks": copies, "meeting": f"{folder}/ranks"}
        with _stage_processes([{**job, "rank": rank} for rank in range(copies)], f"{folder}/busy") as busy:
            for process in busy:
                process.wait_until_ready()
            began = time.perf_counter()
            # A batch of a large model takes longer than its turn.
            while len(of_alone) < _TURNS and time.perf_counter() - began < 2 * config.seconds:
                of_alone += _turn_of([alone])
                of_busy += _turn_of(busy)
    costs, with_model = _costs(of_busy), of_busy
    if on_gpu:
        costs, with_model = costs | _costs(of_alone, ("prepare", "model", "write")), of_alone
    num_batches = sum(turn["num_batches"] for turn in of_busy)
    return _Stages(
        device=device,
        costs=costs,
        model_all_threads=_costs(of_alone)["model"],
        num_processes=copies,
        startup_cpu_s=statistics.mean(turn["startup_cpu_s"] for turn in with_model),
        waiting_s=max(0.0, sum(turn["waiting_s"] for turn in of_busy) / num_batches),
        pixel_bytes=of_alone[-1]["pixel_bytes"],
        gradient_bytes=of_alone[-1]["gradient_bytes"],
    )


def _model_folder(config: PlanConfig, samples: Samples, folder: str) -> str:
    """Return the model to run; for predict, a model built from scratch is saved first."""
    if config.checkpoint is not None:
        return read_checkpoint(config.checkpoint).name
    assert config.model is not None, "the config requires a checkpoint or a model"
    if config.job == "train":
        return storage.absolute_uri(config.model) if storage.exists(config.model) else config.model
    from raydet.models.loading import build_detector

    categories = samples.categories or (Category(1, "object"),)
    build_detector(config.model, categories, image_size=config.image_size, seed=0).save(f"{folder}/checkpoint")
    return f"{folder}/checkpoint"


def _copies(num_cpus: int) -> int:
    """Return the number of model processes that fit into half of the free memory, at most one per CPU."""
    return max(1, min(num_cpus, int(psutil.virtual_memory().available / 2 / _MEMORY_OF_A_PROCESS_BYTES)))


def _costs(results: Sequence[Mapping[str, Any]], stages: Sequence[str] | None = None) -> dict[str, StageCost]:
    """Return the cost of an image by stage, over all turns of all processes."""
    num_images = sum(result["num_images"] for result in results)
    names = stages or list(results[0]["cpu_s"])
    return {
        name: StageCost(
            cpu_s=sum(result["cpu_s"][name] for result in results) / num_images,
            wall_s=sum(result["wall_s"][name] for result in results) / num_images,
        )
        for name in names
        if name in results[0]["cpu_s"]
    }


class _StageProcess:
    """A process that measures stages in turns."""

    def __init__(self, process: "subprocess.Popen[str]", errors: IO[str]) -> None:
        """Store a started process and the file of its stderr."""
        self._process, self._errors = process, errors

    def wait_until_ready(self) -> str:
        """Return the device of its model."""
        return self._next_line(READY).removeprefix(READY).strip()

    def begin_turn(self) -> None:
        """Start a turn of measuring."""
        assert self._process.stdin is not None, "it was started with a pipe"
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def end_turn(self) -> dict[str, Any]:
        """Wait for the measurements of the turn."""
        found: dict[str, Any] = json.loads(self._next_line("{"))
        return found

    def _next_line(self, beginning: str) -> str:
        assert self._process.stdout is not None, "it was started with a pipe"
        line = next((line for line in self._process.stdout if line.startswith(beginning)), None)
        if line is None:
            raise_failure(self._process.wait(), self._errors, "measuring the stages")
        return line


@contextlib.contextmanager
def _stage_processes(jobs: Sequence[Mapping[str, Any]], logs: str) -> Iterator[list[_StageProcess]]:
    """Context manager: processes that measure stages while the block runs; `logs` prefixes their log files."""
    with contextlib.ExitStack() as stack:
        processes = []
        for number, job in enumerate(jobs):
            errors = stack.enter_context(Path(f"{logs}-{number}.log").open("w+"))
            command = [sys.executable, "-m", "raydet.planning.stages", json.dumps(job)]
            processes.append(_StageProcess(stack.enter_context(started(command, errors)), errors))
        yield processes


def _turn_of(processes: Sequence[_StageProcess]) -> list[dict[str, Any]]:
    """Let all processes measure simultaneously."""
    for process in processes:
        process.begin_turn()
    return [process.end_turn() for process in processes]


@dataclass(frozen=True, kw_only=True)
class _RunSetting:
    """Settings of the real run; `costs` are those of its stages, `rate` is the expected images per second."""

    config: PlanConfig
    model: str
    folder: str
    workers: int
    threads: int
    costs: Mapping[str, StageCost]
    rate: float

    def options(self) -> list[str]:
        """Return the options that predict and train share."""
        values: dict[str, Any] = {
            "precision": self.config.precision,
            "batch_size": self.config.batch,
            "num_workers": self.workers,
            "threads_per_worker": self.threads,
        }
        if self.config.use_gpu is not None:
            values["use_gpu"] = str(self.config.use_gpu).lower()
        return [f"--{name}={value}" for name, value in values.items()]


@dataclass(frozen=True)
class _ProbedRun:
    """Result of a real run.

    Attributes:
        images_per_s: Images per second after start-up.
        startup_s: Remaining seconds of the run: start-up and shutdown.
        ray_cpu_s: CPU seconds per image beyond those of the stages.
        decoded_ahead: Share of the images that were decoded before the interval that `images_per_s` refers to.
    """

    images_per_s: float
    startup_s: float
    ray_cpu_s: float
    decoded_ahead: float = 0.0


def _measure_predict(setting: _RunSetting, samples: Samples) -> _ProbedRun:
    """Measure the middle of a run; start and end do not grow with the number of images."""
    batch = setting.config.batch
    most = int(setting.rate * setting.config.seconds * 4 / 3)
    num_rows = min(max(most, _LEAST_BATCHES * batch * setting.workers), max(samples.most_rows(), 2 * batch))
    table, out = samples.write(f"{setting.folder}/images", num_rows), f"{setting.folder}/detections"
    command = [sys.executable, "-m", "raydet", "predict", *setting.options()]
    command += [f"--checkpoint={setting.model}", f"--engine={setting.config.engine}", f"--data={table}", f"--out={out}"]
    watched = run_watched(command, setting.folder)
    window = Window.of(json.loads(Path(out, JOB_FILE).read_text())["timeline"])
    num_scored = window.num_images["model"]
    # Decoding runs ahead while the model is loaded, and may then be almost complete.
    shares = {stage: num_images / num_scored for stage, num_images in window.num_images.items()}
    stages_cpu_s = sum(cost.cpu_s * shares.get(stage, 1.0) for stage, cost in setting.costs.items())
    cpu_s = watched.cpu_s_between(window.began_unix_s, window.ended_unix_s) / num_scored
    return _ProbedRun(
        images_per_s=window.images_per_s,
        startup_s=max(0.0, watched.seconds - num_rows / window.images_per_s),
        ray_cpu_s=max(0.0, cpu_s - stages_cpu_s),
        decoded_ahead=min(1.0, max(0.0, 1 - shares.get("decode", 1.0))),
    )


def _measure_train(setting: _RunSetting, samples: Samples) -> _ProbedRun:
    """Measure the second of three epochs: the first includes start-up, and decoding ends during the last."""
    batch = setting.config.batch
    steps = max(4, math.ceil(setting.rate * setting.config.seconds / 2 / batch))
    train = samples.write(f"{setting.folder}/train", min(steps * batch, max(samples.most_rows(), 2 * batch)))
    val = samples.write(f"{setting.folder}/val", 1)
    out = f"{setting.folder}/run"
    command = [sys.executable, "-m", "raydet", "train", *setting.options()]
    command += [f"--train-data={train}", f"--val-data={val}", f"--out={out}", f"--model={setting.model}"]
    command += ["--epochs=3", "--validate-every=3", "--log-images=0", f"--augmentation={setting.config.augmentation}"]
    if setting.config.image_size is not None:
        command.append(f"--image-size={setting.config.image_size}")
    watched = run_watched(command, setting.folder, not_counted="ray::RayTrainWorker")
    history = json.loads(Path(out, "log", "history.json").read_text())
    midst = history[1]
    # The CPU time of the workers is excluded: it depends on their threads, which also spin while they wait.
    ended_unix_s = datetime.fromisoformat(midst["ended"]).timestamp()
    others_cpu_s = watched.cpu_s_between(ended_unix_s - midst["seconds"], ended_unix_s)
    stages_cpu_s = sum(cost.cpu_s for stage, cost in setting.costs.items() if stage != "model")
    return _ProbedRun(
        images_per_s=midst["images_per_s"],
        startup_s=max(0.0, watched.seconds - sum(entry["seconds"] for entry in history)),
        ray_cpu_s=max(0.0, others_cpu_s / (midst["images_per_s"] * midst["seconds"]) - stages_cpu_s),
    )
