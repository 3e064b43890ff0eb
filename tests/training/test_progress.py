"""The remaining time of a training run, from the reports of its workers."""

from typing import Any

import pytest

from raydet.common.display.progress import Progress
from raydet.training.history import EpochRecord, ValidationRecord
from raydet.training.progress import RunProgress, WorkerProgress
from tests.common.display.test_progress import Clock


def _report(epoch: int, share_done: float, **changes: Any) -> WorkerProgress:
    values = {"epoch": epoch, "step": round(100 * share_done), "num_steps": 100, "num_images": 1000, "loss": 3.0}
    return WorkerProgress(**{**values, "share_done": share_done, "memory_mb": 100.0, **changes})


def _run() -> tuple[RunProgress, Progress, Clock]:
    clock = Clock()
    counter = Progress("training", clock=clock)
    return RunProgress(counter, epochs=4, metric="AP"), counter, clock


def test_before_the_first_epoch_is_over_the_run_takes_as_long_as_its_images() -> None:
    run, counter, clock = _run()
    run.show(_report(1, 0.0))
    for share in (0.1, 0.2):
        clock.now += 10
        run.show(_report(1, share))
    shown = counter.snapshot()
    assert (shown.task, shown.completed, shown.total) == ("epoch 1/4", 200, 1000)
    assert shown.rate_per_s == pytest.approx(10) and shown.eta_s == pytest.approx(80)
    assert shown.run_eta_s == pytest.approx(80 + 3 * 100)
    assert shown.values == {"loss": 3.0, "memory_mb": 100.0}


def test_later_the_last_epoch_with_its_validation_counts() -> None:
    run, counter, clock = _run()
    validation = ValidationRecord(numbers={"AP": 0.25}, seconds=30.0)
    run.add("a line of the workers")
    run.add(EpochRecord(epoch=1, loss=4.0, seconds=120.0, validation=validation))
    run.add(EpochRecord(epoch=2, loss=3.0, seconds=110.0, validation=ValidationRecord(numbers={"AP": 0.2}, seconds=20)))
    run.show(_report(3, 0.0, device_memory_mb=5000.0))
    for share in (0.5, 0.6):
        clock.now += 10
        run.show(_report(3, share, device_memory_mb=5000.0))
    shown = counter.snapshot()
    assert shown.eta_s == pytest.approx(40) and shown.run_eta_s == pytest.approx(40 + 20 + 130)
    assert shown.values == {"AP": 0.2, "best_AP": 0.25, "loss": 3.0, "device_memory_mb": 5000.0}
    run.show(_report(3, 0.0, is_validating=True, num_images=50))
    assert counter.snapshot().task == "epoch 3/4, validation"
    for share in (0.5, 0.6):
        clock.now += 1
        run.show(_report(3, share, is_validating=True, num_images=50))
    shown = counter.snapshot()
    assert shown.total == 50 and shown.run_eta_s == pytest.approx(4 + 130)


def test_a_resumed_epoch_starts_where_it_was_and_a_hungry_model_is_named() -> None:
    run, counter, clock = _run()
    run.show(_report(2, 0.5, data_share=0.6))
    assert counter.snapshot().completed == 500 and counter.snapshot().rate_per_s is None
    assert counter.snapshot().waiting_for == "waiting for images 60% of the time"
    clock.now += 10
    run.show(_report(2, 0.51))
    assert counter.snapshot().rate_per_s == pytest.approx(1) and counter.snapshot().waiting_for is None
