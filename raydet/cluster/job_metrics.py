"""Metrics for Ray's dashboard and Prometheus, set in the workers while a job runs.

Every node's agent exports them (Ray's `metrics-export-port`) with the prefix `ray_` and Ray's labels for node, session
and worker; raydet adds `job_id`, Ray's id of the job. Each call below covers a batch or a step. A gauge disappears soon
after its worker exits; a counter may miss the last seconds before that.

| name | kind | labels | |
|---|---|---|---|
| `raydet_images_total` | counter | `stage` | images that a stage of `predict` has finished (read to write) |
| `raydet_busy_seconds_total` | counter | `stage` | busy seconds of a stage's threads |
| `raydet_image_errors_total` | counter | | unreadable images in the detections table |
| `raydet_detections_total` | counter | | boxes written |
| `raydet_train_images_total` | counter | | images trained on |
| `raydet_train_steps_total` | counter | | optimizer steps |
| `raydet_train_loss` | gauge | | loss of the newest step, over the global batch |
| `raydet_train_epoch` | gauge | | current epoch, from 1 |
| `raydet_epoch_ap` | gauge | | AP of the newest validated epoch |

Work repeated after a failure counts again.
"""

from functools import lru_cache
from typing import TypeVar

import ray

from raydet.cluster.ray_internals import Counter, Gauge, Metric
from raydet.cluster.stopwatch import STAGES_OF_KIND, ProcessStats

AnyMetric = TypeVar("AnyMetric", bound=Metric)


def _of_this_job(metric: AnyMetric) -> AnyMetric:
    metric.set_default_tags({"job_id": ray.get_runtime_context().get_job_id()})
    return metric


@lru_cache(maxsize=1)
def _images() -> Counter:
    return _of_this_job(
        Counter("raydet_images_total", "Images that a stage of predict has finished.", ("job_id", "stage"))
    )


@lru_cache(maxsize=1)
def _busy() -> Counter:
    return _of_this_job(
        Counter("raydet_busy_seconds_total", "Busy seconds of a stage of predict.", ("job_id", "stage"))
    )


@lru_cache(maxsize=1)
def _errors() -> Counter:
    return _of_this_job(Counter("raydet_image_errors_total", "Images that could not be read.", ("job_id",)))


@lru_cache(maxsize=1)
def _detections() -> Counter:
    return _of_this_job(Counter("raydet_detections_total", "Boxes written into detections tables.", ("job_id",)))


@lru_cache(maxsize=1)
def _train_images() -> Counter:
    return _of_this_job(Counter("raydet_train_images_total", "Images trained on.", ("job_id",)))


@lru_cache(maxsize=1)
def _train_steps() -> Counter:
    return _of_this_job(Counter("raydet_train_steps_total", "Optimizer steps of training runs.", ("job_id",)))


@lru_cache(maxsize=1)
def _loss() -> Gauge:
    return _of_this_job(
        Gauge("raydet_train_loss", "Training loss of the newest step, over the global batch.", ("job_id",))
    )


@lru_cache(maxsize=1)
def _epoch() -> Gauge:
    return _of_this_job(Gauge("raydet_train_epoch", "Current epoch of training, from 1.", ("job_id",)))


@lru_cache(maxsize=1)
def _average_precision() -> Gauge:
    return _of_this_job(Gauge("raydet_epoch_ap", "AP of the newest validated epoch.", ("job_id",)))


def count_stage(stats: ProcessStats, num_images: int) -> None:
    """Count the images that a thread of `predict` has finished, and its busy seconds by stage."""
    if num_images:
        for stage in STAGES_OF_KIND[stats.kind]:
            _images().inc(num_images, {"stage": stage})
    for stage, seconds in stats.seconds.items():
        if seconds > 0:
            _busy().inc(seconds, {"stage": stage})


def count_written(num_errors: int, num_detections: int) -> None:
    """Count the unreadable images and the detections of a file."""
    if num_errors:
        _errors().inc(num_errors)
    if num_detections:
        _detections().inc(num_detections)


def step_taken(num_images: int) -> None:
    """Count a worker's images of an optimizer step."""
    if num_images:
        _train_images().inc(num_images)


def step_finished(epoch: int, loss: float) -> None:
    """Record an optimizer step; called by one worker for all. Epochs count from 1."""
    _train_steps().inc()
    _epoch().set(epoch)
    _loss().set(loss)


def epoch_validated(average_precision: float | None) -> None:
    """Record an epoch's AP, in [0, 1]; called by one worker for all. None (no ground truth) changes nothing."""
    _average_precision().set(average_precision)
