"""Numbers for Ray's dashboard and Prometheus, set in the workers while a job is at work.

Every node's agent exports them (Ray's `metrics-export-port`), with `ray_` before the name and the labels of node,
session and worker; `job_id`, Ray's id of the job, is ours. Each call below is for a batch or a step. A gauge is gone
soon after its worker; of a counter the last seconds before a worker's end may be missing.

| name | kind | labels | |
|---|---|---|---|
| `raydet_images_total` | counter | `stage` | images that a stage of `predict` has passed on (read to write) |
| `raydet_busy_seconds_total` | counter | `stage` | seconds that a stage's processes were at work, `prepare` too |
| `raydet_image_errors_total` | counter | | images that could not be read, as they stand in the detections table |
| `raydet_detections_total` | counter | | boxes written |
| `raydet_train_images_total` | counter | | images that were learned from |
| `raydet_train_steps_total` | counter | | optimizer steps |
| `raydet_train_loss` | gauge | | of the newest step, over the global batch |
| `raydet_train_epoch` | gauge | | that is being trained, from 1 |
| `raydet_epoch_ap` | gauge | | AP of the newest epoch that was validated |

Counters count what was done: work done again after a failure counts again.
"""

from functools import lru_cache
from typing import TypeVar

import ray

from raydet.cluster.ray_internals import Counter, Gauge, Metric
from raydet.cluster.stopwatch import LAST_STAGE_OF_KIND, ProcessStats

AnyMetric = TypeVar("AnyMetric", bound=Metric)


def _of_this_job(metric: AnyMetric) -> AnyMetric:
    metric.set_default_tags({"job_id": ray.get_runtime_context().get_job_id()})
    return metric


@lru_cache(maxsize=1)
def _images() -> Counter:
    return _of_this_job(
        Counter("raydet_images_total", "Images that a stage of predict has passed on.", ("job_id", "stage"))
    )


@lru_cache(maxsize=1)
def _busy() -> Counter:
    return _of_this_job(
        Counter("raydet_busy_seconds_total", "Seconds that a stage of predict was at work.", ("job_id", "stage"))
    )


@lru_cache(maxsize=1)
def _errors() -> Counter:
    return _of_this_job(Counter("raydet_image_errors_total", "Images that could not be read.", ("job_id",)))


@lru_cache(maxsize=1)
def _detections() -> Counter:
    return _of_this_job(Counter("raydet_detections_total", "Boxes written into detections tables.", ("job_id",)))


@lru_cache(maxsize=1)
def _train_images() -> Counter:
    return _of_this_job(Counter("raydet_train_images_total", "Images that were learned from.", ("job_id",)))


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
    return _of_this_job(Gauge("raydet_train_epoch", "Epoch that is being trained, from 1.", ("job_id",)))


@lru_cache(maxsize=1)
def _average_precision() -> Gauge:
    return _of_this_job(Gauge("raydet_epoch_ap", "AP of the newest epoch that was validated.", ("job_id",)))


def count_stage(stats: ProcessStats, num_images: int) -> None:
    """Counts images that a process of `predict` has done its stage's work for, and the seconds it took."""
    if num_images:
        _images().inc(num_images, {"stage": LAST_STAGE_OF_KIND[stats.kind]})
    for stage, seconds in stats.seconds.items():
        if seconds > 0:
            _busy().inc(seconds, {"stage": stage})


def count_written(num_errors: int, num_detections: int) -> None:
    """Counts what stands in a detections file."""
    if num_errors:
        _errors().inc(num_errors)
    if num_detections:
        _detections().inc(num_detections)


def step_taken(num_images: int) -> None:
    """Counts a worker's own images of an optimizer step."""
    if num_images:
        _train_images().inc(num_images)


def step_finished(epoch: int, loss: float) -> None:
    """Tells of an optimizer step of all workers; for one of them. Epochs count from 1."""
    _train_steps().inc()
    _epoch().set(epoch)
    _loss().set(loss)


def epoch_validated(average_precision: float | None) -> None:
    """Tells of an epoch's AP; for one of the workers. None, where there is no box to find, is not shown."""
    _average_precision().set(average_precision)
