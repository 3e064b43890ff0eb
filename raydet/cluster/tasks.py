"""Ray tasks over many items: a bounded number of tasks is in flight at any time, and a lost task is retried."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import ray
import ray.exceptions

from raydet.cluster.ray_internals import cluster_cpus
from raydet.common.errors import RunError, UserError, one_line

_RETRIES = 3


class LostTaskError(RunError):
    """Loss of a task or an actor more often than it is repeated.

    Attributes:
        reason: Ray's own words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the cluster lost a task too often: {reason}; run the same command again to resume")
        self.reason = reason


Item = TypeVar("Item")
Result = TypeVar("Result")


def run_tasks(
    work: Callable[[Item], Result], items: Iterable[Item], *, cpus_per_task: float = 1.0, in_order: bool = True
) -> Iterator[Result]:
    """Apply a function to each item in a separate task on the cluster, and yield the results.

    Twice as many tasks as can run simultaneously are in flight: no node idles, an autoscaling cluster grows, and the
    object store never fills with unread results. If the caller stops reading, the remaining tasks are cancelled.

    The function is sent through the object store once, with everything it holds. The results come in the order of the
    items, or else in that of completion.

    Raises:
        UserError: The function raised it.
        RunError: The function raised it or another exception, or the cluster lost a task too often.
    """
    task = ray.remote(num_cpus=cpus_per_task, max_retries=_RETRIES)(_work_on_item)
    # In a list, so that the task itself fetches the function and a failed fetch is the task's error.
    function = [ray.put(work)]
    pending: list[Any] = []

    def take() -> Result:
        first = pending[0] if in_order else ray.wait(pending)[0][0]
        pending.remove(first)
        result: Result = result_of(first)
        return result

    try:
        for item in items:
            pending.append(task.remote(function, item))
            if len(pending) >= 2 * cluster_cpus() / cpus_per_task:
                yield take()
        while pending:
            yield take()
    finally:
        for reference in pending:
            ray.cancel(reference)


def start_actor(
    kind: type, *arguments: Any, cpus: float, gpus: int = 0, calls_at_once: int = 1, max_failures: int = _RETRIES
) -> Any:
    """Start an actor of a class; if it is lost, it starts again and its calls are repeated, up to `max_failures` times.

    The losses of each actor are counted separately.
    """
    actor: Any = ray.remote(kind).options(
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=max_failures,
        max_task_retries=max_failures,
        max_concurrency=calls_at_once,
    )
    return actor.remote(*arguments)


def run_on_actors(methods: Sequence[Any], items: Iterable[Item], *, calls_at_once: int = 1) -> Iterator[Any]:
    """Call methods of actors for all items, and yield the results in the order of completion; raises as `run_tasks`.

    Args:
        methods: The method of each actor.
        items: Arguments, one for each call.
        calls_at_once: Calls that an actor has at a time.
    """
    calls: dict[Any, Any] = {}
    free = list(methods) * calls_at_once
    for item in items:
        if not free:
            done, _ = ray.wait(list(calls))
            free.append(calls.pop(done[0]))
            yield result_of(done[0])
        method = free.pop(0)
        calls[method.remote(item)] = method
    while calls:
        done, _ = ray.wait(list(calls))
        del calls[done[0]]
        yield result_of(done[0])


def shared(value: object) -> Any:
    """Put a value into the object store, for calls of several actors."""
    return ray.put(value)


def fetched(reference: Any) -> Any:
    """Return the value behind a reference of `shared`, in a worker."""
    return ray.get(reference)


def has_gpu() -> bool:
    """Return True in a task or actor that has a GPU."""
    return bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))


def _work_on_item(function: list[Any], item: Any) -> Any:
    work: Callable[[Any], Any] = ray.get(function[0])
    return work(item)


def result_of(reference: Any) -> Any:
    """Return the result of a task or of a method of an actor; its error becomes a one-line `RunError`.

    If the task or the actor was lost too often, this is a `LostTaskError`.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (UserError, RunError)):
            raise error.cause from None
        raise RunError(f"a task on the cluster failed: {_reason(error.cause)}") from error
    except ray.exceptions.RayError as error:
        raise LostTaskError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, limit=300)}"
