"""Bounded Ray tasks: results, their order, one-line errors, and lost tasks."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raydet.cluster.tasks import run_tasks
from raydet.common.errors import RunError, UserError


def test_results_come_in_order_or_as_they_are_ready(ray_cluster: None) -> None:
    def work(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    list(run_tasks(work, [0.0] * 4))  # processes have started
    waits = [3.0, 0.0, 0.1]
    assert list(run_tasks(work, waits)) == waits
    unordered = list(run_tasks(work, waits, in_order=False))
    assert sorted(unordered) == sorted(waits) and unordered[-1] == 3.0
    assert list(run_tasks(work, [])) == []


def test_a_bounded_number_of_items_is_taken_ahead(ray_cluster: None) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    results = run_tasks(lambda number: -number, items(), cpus_per_task=0.5)
    for count, result in enumerate(results, 1):
        assert result == 1 - count
        # Twice the four tasks that two CPUs run simultaneously.
        assert taken <= count + 7
    assert taken == 100


@pytest.mark.parametrize(("kind", "words"), [(UserError, "no such class"), (RunError, "a full disk")])
def test_a_line_for_the_user_comes_through(ray_cluster: None, kind: type[Exception], words: str) -> None:
    def work(number: int) -> int:
        if number == 2:
            raise kind(words)
        return number

    with pytest.raises(kind, match=f"^{words}$"):
        list(run_tasks(work, range(4)))


def test_a_defect_is_one_line(ray_cluster: None) -> None:
    def work(number: int) -> float:
        return 1 / number

    with pytest.raises(RunError, match="ZeroDivisionError") as caught:
        list(run_tasks(work, [1, 0]))
    assert "\n" not in str(caught.value)


def test_a_lost_task_is_tried_again(ray_cluster: None, tmp_path: Path) -> None:
    def work(number: int) -> int:
        mark = tmp_path / str(number)
        if number == 1 and not mark.exists():
            mark.touch()
            os._exit(1)
        return number

    assert list(run_tasks(work, range(3))) == [0, 1, 2]
