"""Counts, rates and remaining times."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from raydet.common.display.progress import Progress, Snapshot


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_before_the_first_unit_does_not_count_for_the_rate() -> None:
    clock = Clock()
    progress = Progress("scoring", total=100, clock=clock)
    clock.now += 30  # workers start
    assert progress.snapshot().rate_per_s is None and progress.snapshot().eta_s is None
    progress.advance(10)
    assert progress.snapshot().rate_per_s == pytest.approx(10 / 30)  # nothing better is known
    clock.now += 5
    progress.advance(20)
    shown = progress.snapshot()
    assert shown.rate_per_s == pytest.approx(4) and shown.eta_s == pytest.approx(70 / 4)
    assert (shown.completed, shown.total, shown.elapsed_s) == (30, 100, 35)
    clock.now += 2.5  # the remaining time goes on while a slow unit is computed
    assert progress.snapshot().eta_s == pytest.approx(70 / 4 - 2.5)
    clock.now += 100
    assert progress.snapshot().eta_s == 0


def test_the_rate_is_that_of_the_last_half_minute_and_leaves_out_an_earlier_run() -> None:
    clock = Clock()
    progress = Progress("scoring", total=100_000, completed=50_000, clock=clock)
    for rate in (10, 200):
        for _ in range(40):
            clock.now += 1
            progress.advance(rate)
            progress.snapshot()
    assert progress.snapshot().rate_per_s == pytest.approx((19 * 10 + 40 * 200) / 59)
    for _ in range(60):
        clock.now += 1
        progress.advance(200)
        progress.snapshot()
    assert progress.snapshot().rate_per_s == pytest.approx(200)


def test_marks_are_few_however_often_one_looks() -> None:
    clock = Clock()
    progress = Progress(total=100_000, clock=clock)
    for _ in range(1000):
        clock.now += 0.01
        progress.advance(3)
        progress.snapshot()
    assert progress.snapshot().rate_per_s == pytest.approx(300, rel=0.05)


def test_another_task_starts_anew_and_ends_the_one_before() -> None:
    ended: list[Snapshot] = []
    progress = Progress("epoch 1/2", total=8, ended=ended.append)
    progress.advance(8)
    progress.note(loss=1.5, AP=None)
    progress.wait_for("images")
    progress.expect_run_end(60.0)
    progress.begin("epoch 2/2", total=8, completed=2)
    (first,) = ended
    assert (first.task, first.completed, first.run_eta_s, first.waiting_for) == ("epoch 1/2", 8, 60.0, "images")
    second = progress.snapshot()
    assert (second.task, second.completed, second.run_eta_s, second.waiting_for) == ("epoch 2/2", 2, None, None)
    assert second.rate_per_s is None
    assert second.values == {"loss": 1.5}
    progress.note(loss=None)
    assert progress.snapshot().values == {}


def test_any_thread_may_count_and_items_count_when_they_are_done() -> None:
    progress = Progress()

    def count() -> None:
        for _ in range(1000):
            progress.advance()

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(count)
    assert progress.snapshot().completed == 8000
    sizes = progress.over([[1, 2], [3]], count=len)
    assert next(sizes) == [1, 2] and progress.snapshot().completed == 8000
    assert next(sizes) == [3] and progress.snapshot().completed == 8002
    assert next(sizes, None) is None and progress.snapshot().completed == 8003
    progress.reach(5)
    assert progress.snapshot().completed == 5
