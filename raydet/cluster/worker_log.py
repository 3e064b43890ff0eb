"""Logging of raydet's own code in the processes of a cluster, with the origin of each line.

Each process logs to its stderr, which Ray keeps in its worker log, and, if the run's log folder is local, also to
`node-IP.log` in that folder, one file for all processes of a node.
"""

import contextlib
import logging
import os
from pathlib import Path

import ray

from raydet.cluster.ray_internals import alive_nodes
from raydet.tables import storage


def log_from_here(folder: str, *, rank: int | None = None) -> None:
    """Set up logging in this worker process to the run's log folder; another call changes folder and rank.

    A line holds time, level, module, `job=` (Ray's id of the job), `node=` (its address and the start of its id),
    `pid=`, `rank=` if the process has one, and the message.
    """
    context = ray.get_runtime_context()
    node_id = context.get_node_id()
    address = next(node["NodeManagerAddress"] for node in alive_nodes() if node["NodeID"] == node_id)
    who = f"job={context.get_job_id()} node={address}/{node_id[:8]} pid={os.getpid()}"
    if rank is not None:
        who += f" rank={rank}"
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if storage.is_local(folder):
        path = Path(storage.resolve(folder)[1], f"node-{address.replace(':', '_')}.log")
        with contextlib.suppress(OSError):  # an unwritable log must not end the run
            path.parent.mkdir(parents=True, exist_ok=True)
            # Each short line is appended in one write, so that lines of several processes do not interleave.
            handlers.append(logging.FileHandler(path, encoding="utf-8"))
    formatter = logging.Formatter(f"%(asctime)s %(levelname)s %(name)s {who}: %(message)s")
    logger = logging.getLogger("raydet")
    for handler in logger.handlers:
        handler.close()
    for handler in handlers:
        handler.setFormatter(formatter)
    logger.handlers = handlers
    logger.setLevel(logging.INFO)
    logger.propagate = False
