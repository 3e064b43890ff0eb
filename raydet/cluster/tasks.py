"""Many pieces of work as Ray tasks: a bounded number waits or runs at any time, and a lost one is tried again."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
import ray.exceptions

from raydet.cluster.ray_internals import cluster_cpus
from raydet.common.errors import RunError, UserError

_RETRIES = 3

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_tasks(
    work: Callable[[Item], Result], items: Iterable[Item], *, cpus_per_task: float = 1.0, in_order: bool = True
) -> Iterator[Result]:
    """Do the same to each item in a task of its own, anywhere on the cluster, and yield the results.

    As many tasks as can run at once, and as many again, are out at a time: no node waits, a cluster that can grow is
    asked to, and the object store never fills with results that nobody has fetched. When the reader stops, the rest is
    cancelled.

    Args:
        work: Goes through the object store once, with all that it holds.
        items: Taken one at a time; they may be made while they are read.
        cpus_per_task: CPUs that each task reserves.
        in_order: Yield the results in the items' order, not as they come.

    Raises:
        UserError: The work raised it.
        RunError: The work raised it or something else, or the cluster lost a task too often.
    """
    task = ray.remote(num_cpus=cpus_per_task, max_retries=_RETRIES)(_work_on_item)
    # In a list, so that the task itself fetches it: what cannot be fetched there is an error of the task's.
    shared = [ray.put(work)]
    pending: list[Any] = []

    def take() -> Result:
        first = pending[0] if in_order else ray.wait(pending)[0][0]
        pending.remove(first)
        result: Result = _get(first)
        return result

    try:
        for item in items:
            pending.append(task.remote(shared, item))
            if len(pending) >= 2 * cluster_cpus() / cpus_per_task:
                yield take()
        while pending:
            yield take()
    finally:
        for reference in pending:
            ray.cancel(reference)


def _work_on_item(shared: list[Any], item: Any) -> Any:
    work: Callable[[Any], Any] = ray.get(shared[0])
    return work(item)


def _get(reference: Any) -> Any:
    """The result of a task, or its error in one line."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (UserError, RunError)):
            raise error.cause from None
        raise RunError(f"a task of the cluster failed: {_one_line(error.cause)}") from error
    except ray.exceptions.RayError as error:
        raise RunError(
            f"the cluster lost a part of the work: {_one_line(error)}; run the same command again"
        ) from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
