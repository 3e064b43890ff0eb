"""Parts as Ray tasks, on all nodes of a cluster.

Plain tasks, since the parts need nothing of each other and each writes its own file: what goes through Ray is the
index of a part and the few numbers that come of it, never an image.
"""

import contextlib
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
def tasks(target: Target, images_uri: str | None) -> Iterator[Executor]:
    """The session that is open, or one of its own, for the time of a `with`.

    Args:
        target: What is written.
        images_uri: The folder of the images, which all nodes must see.

    Raises:
        UserError: A node does not see it, or cannot write to the target.
        RunError: The cluster cannot be reached.
    """

    def execute(work: Callable[[SourcePart], Answer], parts: Iterable[SourcePart], /) -> Iterator[Answer]:
        # A fraction, where others may hold some of the few CPUs there are.
        cpus_per_task = 1.0 if cluster_cpus() >= _SMALL_CLUSTER_CPUS else 0.5
        own = (SourcePart(part.index, list(part.images)) for part in parts)
        return run_tasks(partial(_work_on, work=work, mark=target.mark), own, cpus_per_task=cpus_per_task)

    with tempfile.TemporaryDirectory() as log, session.session(log):
        reads = {} if images_uri is None else {"--images": (images_uri, images_uri)}
        check_shared(reads=reads, writes=(target.out, target.out))
        yield execute


def _work_on(part: SourcePart, *, work: Callable[[SourcePart], Answer], mark: str) -> Answer:
    """Works on a part, on whatever node."""
    if not storage.exists(mark):
        node = socket.gethostname()
        raise RunError(f"{node} does not see {mark}; on a cluster, --out and the images must be on storage it shares")
    return work(part)
