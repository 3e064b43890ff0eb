"""Parts as Ray tasks, on all nodes of a cluster.

Plain tasks suffice, because parts are independent and each writes its own file: only the index of a part and a few
numbers pass through Ray, never an image.
"""

import contextlib
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from raydet.cluster import session
from raydet.cluster.ray_internals import cluster_cpus
from raydet.cluster.shared_storage import check_shared
from raydet.cluster.tasks import run_tasks
from raydet.common.errors import RunError
from raydet.preparation.parts import Answer, Executor, SourcePart
from raydet.preparation.target import Target
from raydet.tables import storage

_SMALL_CLUSTER_CPUS = 4


@contextlib.contextmanager
def tasks(target: Target, reads: Mapping[str, tuple[str, str]]) -> Iterator[Executor]:
    """Context manager: yield an executor on the open Ray session, or on a new one that ends with the block.

    All nodes must be able to see the inputs `reads`, in the form that `check_shared` takes.

    Raises:
        UserError: A node cannot read the images or write to the target.
        RunError: The cluster cannot be reached.
    """

    def execute(work: Callable[[SourcePart], Answer], parts: Iterable[SourcePart], /) -> Iterator[Answer]:
        # On a small cluster a fraction, because other jobs may hold some of its few CPUs.
        cpus_per_task = 1.0 if cluster_cpus() >= _SMALL_CLUSTER_CPUS else 0.5
        own = (SourcePart(part.index, list(part.images)) for part in parts)
        return run_tasks(partial(_work_on, work=work, mark=target.mark), own, cpus_per_task=cpus_per_task)

    with tempfile.TemporaryDirectory() as log, session.session(log):
        check_shared(reads=reads, writes=(target.out, target.out))
        yield execute


def _work_on(part: SourcePart, *, work: Callable[[SourcePart], Answer], mark: str) -> Answer:
    """Process a part in a Ray task, after checking that its node sees the output."""
    if not storage.exists(mark):
        node = socket.gethostname()
        raise RunError(
            f"{node} cannot see {mark}; on a cluster, --out and the images must be on storage that all nodes share"
        )
    return work(part)
