"""Measurements of a finished `predict` or `train` run, read from the records in its folder."""

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raydet.cluster.forecast.nodes import NodeGroup, groups_of_record, total_cpus
from raydet.cluster.job_record import JOB_FILE
from raydet.cluster.timeline import steady_rate
from raydet.common.errors import UserError
from raydet.models.checkpoints import HISTORY_FILE, STEPS_FILE
from raydet.tables import storage

DATA_BOUND = 0.1
"""A training run that waits for images for at least this share of its time is limited by reading and decoding."""


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """A measured run.

    Attributes:
        num_images: Images that the run scored, or trained on, over all epochs.
        images_per_s: Images per second, excluding start-up, validation and the end of the run.
        measured_s: Seconds over which `images_per_s` was measured.
        overhead_s: The other seconds of the run: start-up, first images and the end of the run.
        epoch_overhead_s: In training: seconds per epoch in addition to its steps, for validation and checkpoints.
        epochs: Epochs of the run; 1 for `predict`.
        batch_size: In training: images per step over all workers.
        num_workers: Copies of the model.
        use_gpu: True if each worker had a GPU.
        stage_s: Seconds per image by stage: of one process in `predict`, of all workers together in training.
        model_busy: Share of the time in which the workers ran the model.
        cpus_busy: Share of the CPUs that the other stages used, and the model if it ran on CPUs; None if unknown.
    """

    job: Literal["predict", "train"]
    num_images: int
    images_per_s: float
    measured_s: float
    overhead_s: float
    epoch_overhead_s: float = 0.0
    epochs: int = 1
    batch_size: int | None = None
    num_workers: int
    use_gpu: bool
    groups: Sequence[NodeGroup]
    stage_s: Mapping[str, float]
    model_busy: float
    cpus_busy: float | None
    notes: tuple[str, ...] = ()

    @property
    def cpus_per_gpu(self) -> float | None:
        """CPUs that read, decode and write for one GPU that never waits; None without a GPU or if unknown."""
        if not self.use_gpu or self.cpus_busy is None or not self.model_busy:
            return None
        return self.cpus_busy * total_cpus(self.groups) / (self.model_busy * self.num_workers)


def read_run(out: str) -> MeasuredRun:
    """Read the measurements of a run from its output folder.

    Raises:
        UserError: The folder holds no measured run of `predict` or `train`.
    """
    report, uri = _read_json(out, JOB_FILE), storage.join(out, JOB_FILE)
    record = _read_json(out, f"log/{JOB_FILE}")
    if report is None and record is None:
        raise UserError(
            f"--run {out} has neither {JOB_FILE} nor log/{JOB_FILE}: it must be the output folder of `raydet predict` "
            "or `raydet train`"
        )
    try:
        if report is not None:
            return _of_predict(report, uri)
        uri, stopped = storage.join(out, HISTORY_FILE), _read_json(out, STEPS_FILE)
        history = _read_json(out, HISTORY_FILE) or ([stopped] if stopped else [])
        if not history:
            raise UserError(f"{uri}: no step was measured; train for an epoch, or stop the run with Ctrl-C later")
        config = storage.read_yaml(storage.join(out, "config.yaml"))
        return _of_train(record, history, config, uri)
    except UserError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(
            f"{uri} is not the record of a run of this version of raydet ({type(error).__name__}: {error}); measure "
            "again with this version"
        ) from None


def _of_predict(report: Mapping[str, Any], uri: str) -> MeasuredRun:
    num_images, wall_s, startup_s = report["num_images"], float(report["wall_s"]), float(report["startup_s"])
    if not num_images:
        raise UserError(
            f"{uri}: the run scored no images; measure one that does, such as `raydet predict --limit 2000`"
        )
    steady = steady_rate(report["timeline"])
    rate, measured_s = steady or (num_images / max(wall_s - startup_s, 1e-3), wall_s - startup_s)
    groups, num_workers = _groups(report["job"], uri), report["num_model_workers"]
    num_cpus, use_gpu = total_cpus(groups), report["job"]["use_gpu"]
    stage_s = {name: stage["busy_s"] / num_images for name, stage in report["stages"].items()}
    model_busy = min(rate * stage_s["model"] / num_workers, 1.0)
    cpus_busy = rate * sum(seconds for name, seconds in stage_s.items() if name != "model") / num_cpus
    return MeasuredRun(
        job="predict",
        num_images=num_images,
        images_per_s=rate,
        measured_s=measured_s,
        # At least the start-up, so that an unsteady rate cannot hide it.
        overhead_s=max(wall_s - num_images / rate, startup_s),
        num_workers=num_workers,
        use_gpu=use_gpu,
        groups=groups,
        stage_s=stage_s,
        model_busy=model_busy,
        # On CPUs the workers together have one thread for each CPU.
        cpus_busy=min(cpus_busy + (0.0 if use_gpu else model_busy), 1.0),
        notes=() if report["error"] is None else (f"the measured run failed: {report['error']}",),
    )


def _of_train(
    record: Mapping[str, Any], history: Sequence[Mapping[str, Any]], config: Mapping[str, Any], uri: str
) -> MeasuredRun:
    ended = [_unix_s(epoch["ended"]) for epoch in history]
    jobs = [*record["earlier_jobs"], record["job"]]
    job = [job for job in jobs if _unix_s(job["started"]) <= ended[0]][-1]
    # The first steps are slower; a run of one epoch has no others.
    steady = history[1:] or history
    seconds = sum(epoch["seconds"] for epoch in steady)
    images = [epoch["images_per_s"] * epoch["seconds"] for epoch in history]
    rate = sum(images[-len(steady) :]) / seconds
    parts = {name: math.fsum(epoch["step_s"][name] for epoch in steady) for name in steady[0]["step_s"]}
    shares = {name: part_s / sum(parts.values()) for name, part_s in parts.items()}
    # Between the steps of two epochs; a run that was resumed in between would count its start-up.
    between = [
        later - epoch["seconds"] - epoch["start_s"] - earlier
        for earlier, later, epoch in zip(ended, ended[1:], history[1:], strict=False)
        if not epoch["start_s"]
    ]
    validated = [epoch["validation_s"] for epoch in history if epoch.get("validation_s") is not None]
    between_s = sum(between) / len(between) if between else sum(validated) / len(history)
    is_data_bound = shares["data"] >= DATA_BOUND
    return MeasuredRun(
        job="train",
        num_images=round(sum(images)),
        images_per_s=rate,
        measured_s=seconds,
        # The slower steps of the first epoch belong to the start.
        overhead_s=max(ended[0] - _unix_s(job["started"]) - images[0] / rate, history[0]["start_s"]),
        epoch_overhead_s=max(between_s, 0.0),
        epochs=len(history),
        batch_size=config["batch_size"],
        num_workers=job["num_workers"],
        use_gpu=job["use_gpu"],
        groups=_groups(job, uri),
        stage_s={name: share / rate for name, share in shares.items()},
        model_busy=1.0 - shares["data"] if is_data_bound else 1.0,
        cpus_busy=1.0 if is_data_bound else None,
        notes=_notes_of_train(config, validated),
    )


def _groups(job: Mapping[str, Any], uri: str) -> list[NodeGroup]:
    groups = groups_of_record(job["nodes"])
    if not total_cpus(groups):  # a cluster that grows from zero, and a run that ended before its nodes were counted
        raise UserError(f"{uri}: the run recorded no node with CPUs; measure a run that finishes")
    return groups


def _notes_of_train(config: Mapping[str, Any], validated: Sequence[float]) -> tuple[str, ...]:
    notes = []
    if isinstance(config["num_workers"], list):
        notes.append("the measured run may have had fewer workers at times, because --num-workers was a range")
    if not validated:
        notes.append("the measured run validated no epoch: validation and checkpoints are not counted")
    return tuple(notes)


def _unix_s(time_iso: str) -> float:
    return datetime.datetime.fromisoformat(time_iso).timestamp()


def _read_json(out: str, name: str) -> Any:
    try:
        return storage.read_json(storage.join(out, name), allow_nan=True)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{storage.join(out, name)} is not valid JSON: {error}") from None
