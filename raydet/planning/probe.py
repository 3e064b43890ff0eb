"""Measures on this machine what `plan` calculates with: the stages by themselves, and a short real run.

The stages run in plain processes, as many at once as there are CPUs, since CPUs that are all busy share caches and
memory and are slower than one alone. What raydet and Ray take beyond the stages is the rest of the real run.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

from raydet import storage
from raydet.checkpoints import read_checkpoint
from raydet.config import PlanConfig
from raydet.job_report import JOB_FILE
from raydet.planning.processes import READY, raise_failure, run_watched, started
from raydet.planning.samples import Samples, take_samples
from raydet.planning.throughput import Probe, StageCost, check_devices
from raydet.schema import Category

_MEMORY_OF_A_PROCESS_BYTES = 1.5 * 2**30
_MOST_THREADS_OF_A_WORKER = 4
_LEAST_BATCHES = 16

Say = Callable[[str], None]


def threads_of_a_worker(config: PlanConfig, num_cpus: int) -> int:
    """Threads of a copy of the model on a machine of so many CPUs."""
    if config.threads_per_worker is not None:
        return config.threads_per_worker
    # A training step is shared by few workers, which so need all the threads there are.
    return num_cpus if config.job == "train" else min(_MOST_THREADS_OF_A_WORKER, num_cpus)


def measure(config: PlanConfig, *, needs_gpu: bool | None = None, say: Say) -> Probe:
    """Measures on this machine; takes about three times `config.seconds` and a minute of starting.

    Args:
        config: What is to be planned.
        needs_gpu: Whether the plan is for GPUs; null where it is for this machine as it is.
        say: Is told what is measured.

    Raises:
        UserError: The model or the images are not what they should be.
        RunError: A measurement failed.
    """
    num_cpus = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="raydet-plan-", ignore_cleanup_errors=True) as folder:
        say("taking samples of the images")
        samples = take_samples(config, folder)
        model = _model_folder(config, samples, folder)
        alone, stages = _measure_stages(config, samples, model, folder, num_cpus=num_cpus, needs_gpu=needs_gpu, say=say)
        on_gpu = alone["device"] != "cpu"
        threads = num_cpus if on_gpu else threads_of_a_worker(config, num_cpus)
        probe = Probe(
            job=config.job,
            model=f"{config.checkpoint or config.model}, {config.engine}, {config.precision}",
            device=alone["device"],
            machine=f"{platform.node()}, {num_cpus} CPUs",
            num_cpus=num_cpus,
            stages=stages,
            model_all_threads=_costs([alone])["model"],
            ray_cpu_s=0.0,
            run_images_per_s=0.0,
            run_workers=1 if on_gpu else max(1, num_cpus // threads),
            run_threads=threads,
            run_decoded_ahead=0.0,
            startup_s=0.0,
            image_bytes=samples.image_bytes,
            pixel_bytes=alone["pixel_bytes"],
            gradient_bytes=alone["gradient_bytes"],
            batch_size=config.batch,
            source_read_s=samples.source_read_s,
        )
        say(f"measuring a short run of raydet {config.job}")
        measure_run = _measure_predict if config.job == "predict" else _measure_train
        # What the model takes depends on its threads.
        costs = {**stages, "model": probe.model_cost(threads)}
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


def _measure_stages(
    config: PlanConfig,
    samples: Samples,
    model: str,
    folder: str,
    *,
    num_cpus: int,
    needs_gpu: bool | None,
    say: Say,
) -> tuple[dict[str, Any], dict[str, StageCost]]:
    """What one process with all threads found, and the cost of each stage while all CPUs are busy."""
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
        "seconds": config.seconds / 2,
    }
    say(f"measuring the model with {num_cpus} threads, or on a GPU")
    [alone] = _run_stages([job], folder)
    if needs_gpu is not None:
        check_devices([alone["device"]], needs_gpu=needs_gpu)
    say("measuring all stages while all CPUs are busy")
    on_gpu, copies = alone["device"] != "cpu", _copies(num_cpus)
    if config.job == "train":  # the workers share a batch
        job["batch_size"] = max(1, config.batch // copies)
    job |= {"threads": 1, "with_model": not on_gpu, "seconds": config.seconds}
    stages = _costs(_run_stages([job] * copies, folder))
    if on_gpu:
        stages |= _costs([alone], ("prepare", "model", "write"))
    return alone, stages


def _model_folder(config: PlanConfig, samples: Samples, folder: str) -> str:
    """The model that is run; for predict, one that is built from scratch must be saved first."""
    if config.checkpoint is not None:
        return read_checkpoint(config.checkpoint).name
    assert config.model is not None, "the config asks for a checkpoint or a model"
    if config.job == "train":
        return storage.absolute_uri(config.model) if storage.exists(config.model) else config.model
    from raydet.models import build_detector

    categories = samples.categories or (Category(1, "object"),)
    build_detector(config.model, categories, image_size=config.image_size, seed=0).save(f"{folder}/checkpoint")
    return f"{folder}/checkpoint"


def _copies(num_cpus: int) -> int:
    """Processes with a model that fit into half of the memory that is free, one for each CPU at most."""
    return max(1, min(num_cpus, int(psutil.virtual_memory().available / 2 / _MEMORY_OF_A_PROCESS_BYTES)))


def _costs(results: Sequence[Mapping[str, Any]], stages: Sequence[str] | None = None) -> dict[str, StageCost]:
    """What an image took by stage, over all processes."""
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


def _run_stages(jobs: Sequence[Mapping[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Runs processes that measure stages, all at the same time."""
    with contextlib.ExitStack() as stack:
        errors = [stack.enter_context(Path(folder, f"stage-{number}.log").open("w+")) for number in range(len(jobs))]
        processes = [
            stack.enter_context(started([sys.executable, "-m", "raydet.planning.stages", json.dumps(job)], error))
            for job, error in zip(jobs, errors, strict=True)
        ]
        for process, error in zip(processes, errors, strict=True):
            if not _is_ready(process):
                process.wait()
                raise_failure(process.returncode, error, "measuring the stages")
        for process in processes:
            assert process.stdin is not None, "it was started with a pipe"
            process.stdin.write("go\n")
            process.stdin.flush()
        results = []
        for process, error in zip(processes, errors, strict=True):
            output, _ = process.communicate()
            if process.returncode:
                raise_failure(process.returncode, error, "measuring the stages")
            results.append(json.loads(output.splitlines()[-1]))
        return results


def _is_ready(process: "subprocess.Popen[str]") -> bool:
    """Waits until the process says so; false when it has ended without."""
    assert process.stdout is not None, "it was started with a pipe"
    return any(line.strip() == READY for line in process.stdout)


@dataclass(frozen=True, kw_only=True)
class _RunSetting:
    """The real run; `costs` are those of its stages, `rate` is about how many images per second it will do."""

    config: PlanConfig
    model: str
    folder: str
    workers: int
    threads: int
    costs: Mapping[str, StageCost]
    rate: float

    def options(self) -> list[str]:
        """What predict and train have in common."""
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
class _Run:
    """What came of a real run.

    Attributes:
        images_per_s: After start-up.
        startup_s: All else that it took.
        ray_cpu_s: CPU seconds an image beyond those of the stages; 0 where unknown.
        decoded_ahead: Share of the images that had been decoded before the time that `images_per_s` is of.
    """

    images_per_s: float
    startup_s: float
    ray_cpu_s: float = 0.0
    decoded_ahead: float = 0.0


@dataclass(frozen=True)
class Window:
    """The part of a scoring run in which all processes are up and busy.

    Attributes:
        began_unix_s: When all of the first quarter of the images had been through the model.
        ended_unix_s: Before the last images were.
        num_images: By stage, images that it was done with in between.
    """

    began_unix_s: float
    ended_unix_s: float
    num_images: Mapping[str, float]

    @property
    def images_per_s(self) -> float:
        """Through the model."""
        return self.num_images["model"] / (self.ended_unix_s - self.began_unix_s)

    @classmethod
    def of(cls, timeline: Mapping[str, Any]) -> Self:
        """Finds it in the `timeline` of a job's report; in a run too short to have one it is all of the run."""
        counts = {stage: np.array(values) for stage, values in timeline["images"].items()}
        scored = counts["model"]
        last = int(np.flatnonzero(scored)[-1])
        first = int(np.searchsorted(scored.cumsum(), scored.sum() / 4)) + 1
        if first >= last:
            first, last = int(np.flatnonzero(scored)[0]), last + 1
        began_unix_s = timeline["started_unix_s"] + first * timeline["span_s"]
        ended_unix_s = timeline["started_unix_s"] + last * timeline["span_s"]
        return cls(began_unix_s, ended_unix_s, {stage: float(one[first:last].sum()) for stage, one in counts.items()})


def _measure_predict(setting: _RunSetting, samples: Samples) -> _Run:
    """Looks into the midst of a run: what starts and ends before and after it, a long run has but once as well."""
    batch = setting.config.batch
    most = int(setting.rate * setting.config.seconds * 4 / 3)
    num_rows = min(max(most, _LEAST_BATCHES * batch * setting.workers), max(samples.most_rows(), 2 * batch))
    table, out = samples.write(f"{setting.folder}/images", num_rows), f"{setting.folder}/detections"
    command = [sys.executable, "-m", "raydet.cli", "predict", *setting.options()]
    command += [f"--checkpoint={setting.model}", f"--engine={setting.config.engine}", f"--data={table}", f"--out={out}"]
    watched = run_watched(command, setting.folder)
    window = Window.of(json.loads(Path(out, JOB_FILE).read_text())["timeline"])
    num_scored = window.num_images["model"]
    # Decoding runs ahead while the model is loaded, until nothing or little of it is left.
    shares = {stage: num_images / num_scored for stage, num_images in window.num_images.items()}
    stages_cpu_s = sum(cost.cpu_s * shares.get(stage, 1.0) for stage, cost in setting.costs.items())
    cpu_s = watched.cpu_s_between(window.began_unix_s, window.ended_unix_s) / num_scored
    return _Run(
        images_per_s=window.images_per_s,
        startup_s=max(0.0, watched.seconds - num_rows / window.images_per_s),
        ray_cpu_s=max(0.0, cpu_s - stages_cpu_s),
        decoded_ahead=min(1.0, max(0.0, 1 - shares.get("decode", 1.0))),
    )


def _measure_train(setting: _RunSetting, samples: Samples) -> _Run:
    """A run of two epochs, of which the second is not disturbed by what is done at the first steps."""
    batch = setting.config.batch
    steps = max(4, math.ceil(setting.rate * setting.config.seconds / 2 / batch))
    train = samples.write(f"{setting.folder}/train", min(steps * batch, max(samples.most_rows(), 2 * batch)))
    val = samples.write(f"{setting.folder}/val", 1)
    out = f"{setting.folder}/run"
    command = [sys.executable, "-m", "raydet.cli", "train", *setting.options()]
    command += [f"--train-data={train}", f"--val-data={val}", f"--out={out}", f"--model={setting.model}"]
    command += ["--epochs=2", "--validate-every=2", "--log-images=0", f"--augmentation={setting.config.augmentation}"]
    if setting.config.image_size is not None:
        command.append(f"--image-size={setting.config.image_size}")
    seconds = run_watched(command, setting.folder).seconds
    history = json.loads(Path(out, "log", "history.json").read_text())
    return _Run(history[1]["images_per_s"], max(0.0, seconds - sum(entry["seconds"] for entry in history)))
