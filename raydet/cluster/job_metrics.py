"""Metrics for Ray's dashboard and Prometheus, set in the workers while a job runs.

Every node's agent exports them (Ray's `metrics-export-port`) with the prefix `ray_` and Ray's labels for node, session
and worker; raydet adds `job_id`, Ray's id of the job. Each call below covers a batch or a step. A gauge disappears soon
after its worker exits; a counter may miss the last seconds before that. Work repeated after a failure counts again.
"""

from functools import cache
from typing import Any

import ray

from raydet.cluster.ray_internals import Counter, Gauge, Metric
from raydet.cluster.stopwatch import STAGES_OF_KIND, ProcessStats

METRICS: dict[str, tuple[type[Metric], str, tuple[str, ...]]] = {
    "raydet_images_total": (Counter, "Images that a stage of predict (read to write) has finished.", ("stage",)),
    "raydet_busy_seconds_total": (Counter, "Busy seconds of the threads of a stage of predict.", ("stage",)),
    "raydet_image_errors_total": (Counter, "Unreadable images in detections tables.", ()),
    "raydet_detections_total": (Counter, "Boxes written into detections tables.", ()),
    "raydet_train_images_total": (Counter, "Images trained on.", ()),
    "raydet_train_steps_total": (Counter, "Optimizer steps of training runs.", ()),
    "raydet_train_loss": (Gauge, "Training loss of the newest step, over the global batch.", ()),
    "raydet_train_epoch": (Gauge, "Current epoch of training, from 1.", ()),
    "raydet_epoch_ap": (Gauge, "AP of the newest validated epoch.", ()),
}
"""Kind, description and labels of each metric."""


@cache
def _metric(name: str) -> Any:
    kind, description, labels = METRICS[name]
    metric = kind(name, description, ("job_id", *labels))
    metric.set_default_tags({"job_id": ray.get_runtime_context().get_job_id()})
    return metric


def count_stage(stats: ProcessStats, num_images: int) -> None:
    """Count the images that a thread of `predict` has finished, and its busy seconds by stage."""
    if num_images:
        for stage in STAGES_OF_KIND[stats.kind]:
            _metric("raydet_images_total").inc(num_images, {"stage": stage})
    for stage, seconds in stats.seconds.items():
        if seconds > 0:
            _metric("raydet_busy_seconds_total").inc(seconds, {"stage": stage})


def count_written(num_errors: int, num_detections: int) -> None:
    """Count the unreadable images and the detections of a file."""
    if num_errors:
        _metric("raydet_image_errors_total").inc(num_errors)
    if num_detections:
        _metric("raydet_detections_total").inc(num_detections)


def step_taken(num_images: int) -> None:
    """Count a worker's images of an optimizer step."""
    if num_images:
        _metric("raydet_train_images_total").inc(num_images)


def step_finished(epoch: int, loss: float) -> None:
    """Record an optimizer step; called by one worker for all. Epochs count from 1."""
    _metric("raydet_train_steps_total").inc()
    _metric("raydet_train_epoch").set(epoch)
    _metric("raydet_train_loss").set(loss)


def epoch_validated(average_precision: float | None) -> None:
    """Record an epoch's AP, in [0, 1]; called by one worker for all. None (no ground truth) changes nothing."""
    _metric("raydet_epoch_ap").set(average_precision)
