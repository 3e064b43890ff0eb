import os
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.common.threads import NUM_READ_THREADS, available_cpus, in_order


@settings(deadline=None, max_examples=20)
@given(
    num_items=st.integers(0, 40),
    num_threads=st.integers(1, 5),
    ahead=st.one_of(st.none(), st.integers(1, 12)),
)
def test_results_stand_as_the_items_do_whichever_is_done_first(
    num_items: int, num_threads: int, ahead: int | None
) -> None:
    is_done = [threading.Event() for _ in range(num_items)]

    def work(number: int) -> int:
        # With two or more threads, the first item of each pair finishes last.
        if number % 2 == 0 and number + 1 < num_items and num_threads > 1 and (ahead is None or ahead > 1):
            is_done[number + 1].wait(timeout=0.02)
        is_done[number].set()
        return -number

    results = in_order(work, iter(range(num_items)), num_threads=num_threads, ahead=ahead)
    assert list(results) == [-number for number in range(num_items)]


def test_as_many_work_side_by_side_as_there_are_threads() -> None:
    for num_threads in (3, NUM_READ_THREADS):
        all_threads = threading.Barrier(num_threads)
        names: set[str] = set()

        def work(number: int, barrier: threading.Barrier = all_threads, names: set[str] = names) -> int:
            names.add(threading.current_thread().name)
            barrier.wait(timeout=20)  # times out unless all threads run concurrently
            return number

        assert list(in_order(work, range(2 * num_threads), num_threads=num_threads)) == list(range(2 * num_threads))
        assert len(names) == num_threads and threading.current_thread().name not in names


def test_no_more_items_are_taken_than_may_be_in_flight() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(200):
            taken.append(number)
            yield number

    for count, result in enumerate(in_order(lambda number: number, numbers(), num_threads=3, ahead=7), 1):
        assert result == count - 1
        assert len(taken) - (count - 1) <= 7
    taken.clear()
    results = in_order(lambda number: number, numbers(), num_threads=3)
    assert not taken, "nothing starts before the first result is requested"
    next(results)
    assert len(taken) == 6, "twice the threads by default"


def test_what_waits_is_dropped_when_the_reader_stops_and_no_thread_stays() -> None:
    started: list[int] = []
    may_continue = threading.Event()

    def work(number: int) -> int:
        started.append(number)
        if number:
            may_continue.wait(timeout=20)
        return number

    results = cast(Generator[int], in_order(work, range(100), num_threads=2, ahead=20))
    assert next(results) == 0
    # The two running items block until `close` has dropped the queued ones.
    threading.Timer(0.5, may_continue.set).start()
    results.close()
    assert len(started) <= 1 + 2
    assert not any(thread.name.startswith("in-order") for thread in threading.enumerate())


def test_the_first_failure_is_raised_in_its_turn() -> None:
    later_failed = threading.Event()

    def fail(number: int) -> int:
        if number == 7:
            later_failed.set()
            raise ValueError("a later item that fails first")
        if number == 5:
            later_failed.wait(timeout=20)
            raise OSError("storage is unavailable")
        return number

    results = in_order(fail, range(100), num_threads=4, ahead=20)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="storage is unavailable"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_what_the_items_raise_is_raised() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise KeyError("no more items")

    with pytest.raises(KeyError, match="no more items"):
        list(in_order(lambda number: number, items(), num_threads=2, ahead=10))


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


_V2 = {"proc/self/cgroup": "0::/pods/mine\n"}
_V1 = {"proc/self/cgroup": "5:memory:/mine\n4:cpu,cpuacct:/mine\n1:name=systemd:/mine\n"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({**_V2, "sys/fs/cgroup/pods/mine/cpu.max": "max 100000\n"}, None),
        ({**_V2, "sys/fs/cgroup/pods/mine/cpu.max": "150000 100000\n"}, 2),
        ({**_V2, "sys/fs/cgroup/pods/mine/cpu.max": "20000 100000\n"}, 1),
        ({**_V2, "sys/fs/cgroup/pods/cpu.max": "300000 100000\n"}, 3),  # the quota of the parent group
        ({**_V2, "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),  # in a container, where the group has the host's name
        ({**_V1, "sys/fs/cgroup/cpu,cpuacct/mine/cpu.cfs_quota_us": "-1\n"}, None),
        (
            {
                **_V1,
                "sys/fs/cgroup/cpu,cpuacct/mine/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/mine/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                **_V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
    ],
)
def test_cpus_are_those_of_the_container(
    files: dict[str, str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert available_cpus(system=_write(tmp_path, files)) == (limit or 16)


def test_cpus_are_those_that_the_process_may_run_on() -> None:
    assert 1 <= available_cpus() <= len(os.sched_getaffinity(0))
