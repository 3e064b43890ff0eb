"""Parts as Ray tasks, on all nodes of a cluster.

Plain tasks, since the parts need nothing of each other and each writes its own file: what goes through Ray is the
index of a part and the few numbers that come of it, never an image.
"""

import contextlib
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
import ray.exceptions

from raydet.cluster import session
from raydet.cluster.shared_storage import check_shared
from raydet.common.errors import RunError, UserError
from raydet.preparation.parts import Answer, Executor, Part
from raydet.preparation.target import Target
from raydet.tables import storage

_SMALL_CLUSTER_CPUS = 4
_RETRIES = 3


@contextlib.contextmanager
def tasks(target: Target, images_uri: str | None) -> Iterator[Executor]:
    """The session that is open, or one of its own, for the time of a `with`.

    Args:
        target: What is written.
        images_uri: The folder of the images, which all nodes must see.

    Raises:
        UserError: A node does not see it, or cannot write to the target.
        RunError: The cluster cannot be reached.
    """

    def execute(work: Callable[[Part], Answer], parts: Iterable[Part], /) -> Iterator[Answer]:
        return _in_order(work, parts, target.mark)

    with tempfile.TemporaryDirectory() as log, session.session(log):
        reads = {} if images_uri is None else {"--images": (images_uri, images_uri)}
        check_shared(reads=reads, writes=(target.out, target.out))
        yield execute


def _in_order(work: Callable[[Part], Answer], parts: Iterable[Part], mark: str) -> Iterator[Answer]:
    num_cpus = ray.cluster_resources().get("CPU", 1.0)
    # A fraction, where others may hold some of the few CPUs there are.
    cpus_per_task = 1.0 if num_cpus >= _SMALL_CLUSTER_CPUS else 0.5
    task = ray.remote(num_cpus=cpus_per_task, max_retries=_RETRIES)(_work_on)
    # In a list, so that the task itself fetches it and can say what it does not see.
    shared = [ray.put(work)]
    pending: deque[Any] = deque()
    try:
        for part in parts:
            pending.append(task.remote(shared, Part(part.index, list(part.images)), mark))
            # As many again as can run wait in line, so that no node waits, and a cluster that grows is asked to.
            if len(pending) >= 2 * ray.cluster_resources().get("CPU", 1.0) / cpus_per_task:
                yield _get(pending.popleft())
        while pending:
            yield _get(pending.popleft())
    finally:
        for reference in pending:
            ray.cancel(reference)


def _work_on(shared: list[Any], part: Part, mark: str) -> Any:
    """Works on a part, on whatever node."""
    if not storage.exists(mark):
        node = socket.gethostname()
        raise RunError(f"{node} does not see {mark}; on a cluster, --out and the images must be on storage it shares")
    work: Callable[[Part], Any] = ray.get(shared[0])
    return work(part)


def _get(reference: Any) -> Any:
    """The answer of a task, or its error in one line."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (UserError, RunError)):
            raise error.cause from None
        reason = " ".join(str(error.cause).split())[:300]
        raise RunError(f"a task of the cluster failed: {reason}") from error
    except ray.exceptions.RayError as error:
        raise RunError(f"the cluster failed: {' '.join(str(error).split())[:300]}") from error
