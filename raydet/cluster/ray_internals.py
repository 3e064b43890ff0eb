"""Every private, developer or deprecated API of Ray that raydet uses, and what replaces each when it goes.

Ray promises nothing about these between minor versions. No other module may use one: a test reads the source of all of
them. When Ray is upgraded, this is the module to go through.
"""

import contextlib
import importlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
from ray._private import ray_constants, ray_logging
from ray._private.state import available_resources_per_node
from ray._raylet import PlacementGroupID

# Developer API, of a lost connection. Replaced by `RayError`, which it is one of.
from ray.exceptions import RpcError

# Developer API, the only way to Ray's metrics. Replaced by OpenTelemetry's own package if Ray stops exporting them.
from ray.util.metrics import Counter, Gauge, Metric
from ray.util.placement_group import PlacementGroup

if TYPE_CHECKING:
    from ray.data import DataContext, ExecutionOptions, ExecutionResources, ReadTask
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data.block import BlockMetadata
    from ray.data.exceptions import ExecutionTimeoutError, SystemException
    from ray.train import UserCallback
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

__all__ = [
    "BlockMetadata",
    "Counter",
    "DataContext",
    "ExecutionCallback",
    "ExecutionTimeoutError",
    "Gauge",
    "Metric",
    "ReadTask",
    "RpcError",
    "Searcher",
    "SystemException",
    "TrialScheduler",
    "UserCallback",
]

_LOADED_LATE = {
    # Developer API. The only way to set options of Ray Data; settings of a single `Dataset` replace it one day.
    "DataContext": "ray.data",
    # Developer API. What a `Datasource`, which is public, has to return. Without them: `from_items` and a `flat_map`.
    "ReadTask": "ray.data",
    "BlockMetadata": "ray.data.block",
    # Private. The only hook into Ray Data's scheduling loop: it slows the loop down and ends a run that lost a node.
    # Without it: a loop that spins, and a watching thread in the driver.
    "ExecutionCallback": "ray.data._internal.execution.execution_callback",
    # Developer API. What Ray Data raises for its own failures; without them, catch `Exception` and look at the cause.
    "ExecutionTimeoutError": "ray.data.exceptions",
    "SystemException": "ray.data.exceptions",
    # Developer API. The only way for a worker to end a training for good. Without it Ray Train restarts all workers as
    # often as `max_failures` says.
    "UserCallback": "ray.train",
    # Developer API. The only way to a search of one's own in Ray Tune; without it, start the trials as plain tasks.
    "Searcher": "ray.tune.search",
    "TrialScheduler": "ray.tune.schedulers",
}
"""Classes by the module that has them. Importing Ray Data takes 3 s and Ray Tune 10 more, so only who asks pays."""


def __getattr__(name: str) -> Any:
    """Imports a class of `_LOADED_LATE`."""
    if name not in _LOADED_LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LOADED_LATE[name]), name)


# Starting.


def local_cluster_options() -> dict[str, Any]:
    """Private options of `ray.init` for a cluster on this machine."""
    return {
        # The address that its processes listen on. Replaced by nothing yet; without it Ray chooses the machine's
        # address on its network.
        "_node_ip_address": "127.0.0.1",
        # Ray ends processes that idle for a second when there are more than CPUs; stages that ask for a fraction of
        # one are many, and a new process needs seconds before its first task. Replaced by the environment variable
        # RAY_num_workers_soft_limit.
        "_system_config": {"num_workers_soft_limit": 16},
    }


@contextlib.contextmanager
def listening_on_loopback() -> Iterator[None]:
    """Make a cluster that starts inside listen on 127.0.0.1 alone, and its token readable by this user alone.

    Private constants. Ray takes 127.0.0.1 for an oversight and puts the machine's own address in its place, and then
    its processes listen on all addresses, unless clusters of several machines are switched off, as they are on Windows
    and macOS. Replaced by nothing yet; tests/test_security.py fails when it stops working.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    variable_before = os.environ.get(variable)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[variable] = "0"  # for the processes of the cluster
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if variable_before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = variable_before
        with contextlib.suppress(OSError):
            (Path.home() / ".ray" / "auth_token").chmod(0o600)


class _IntoTheLog:
    """Stands in for a pattern of lines not to print."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def search(self, line: str) -> bool:
        """Log the line, and keep Ray from printing it."""
        self._logger.warning(line)
        return True


@contextlib.contextmanager
def remarks_logged(logger: logging.Logger) -> Iterator[None]:
    """Send what Ray prints about its processes and nodes to a logger instead of the terminal.

    Private. Ray prints it to the driver's stdout whatever `log_to_driver` says. Replaced by that option once it holds
    for these lines too.
    """
    deduplicator = ray_logging.stdout_deduplicator
    before = deduplicator.skip_re
    deduplicator.skip_re = cast("re.Pattern[str]", _IntoTheLog(logger))
    try:
        yield
    finally:
        deduplicator.skip_re = before


# Asking the cluster.


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes that are alive, with Ray's own keys: `NodeID`, `NodeManagerAddress`, `Resources`, ….

    Developer API. Replaced by `ray.util.state.list_nodes`, which needs a dashboard.
    """
    return [node for node in ray.nodes() if node["Alive"]]


def cluster_cpus() -> float:
    """CPUs of the whole cluster, at least 1.

    Developer API. Replaced by the sum over `alive_nodes`.
    """
    return max(float(ray.cluster_resources().get("CPU", 0.0)), 1.0)


def most_free_cpus() -> float:
    """CPUs that are free on the node with the most of them.

    Private. Ray's public `available_resources` sums over the nodes, and no task runs on two. Replaced by nothing yet.
    """
    return max((float(node.get("CPU", 0.0)) for node in available_resources_per_node().values()), default=0.0)


def placement_group(group_id: str) -> PlacementGroup:
    """The placement group with this id in hexadecimal, also when another process made it.

    Private. Ray finds groups by name only, and Ray Train gives its own none. Replaced by a name, once Ray Train sets
    one, or by its own cleaner, once that outlives the driver.
    """
    return PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))


def submitted_metadata() -> dict[str, str]:
    """The metadata of `ray job submit --metadata-json`, and Ray's own; empty in a process that no job server started.

    Private. The job server puts it into this variable, for the driver alone. Replaced by `JobSubmissionClient`, which
    needs the dashboard's address.
    """
    try:
        metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata") or {}
    except (ValueError, AttributeError):
        return {}
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


# Ray Data.


def task_retries(number: int) -> dict[str, Any]:
    """Arguments of `map_batches` that limit how often Ray tries a task again; by default it does so for ever.

    Deprecated, goes with Ray 2.64. Replaced by an option of the operator's own, which 2.60 does not have.
    """
    return {"ray_remote_args_fn": lambda: {"max_retries": number}}


def call_retries(number: int) -> dict[str, Any]:
    """The same for the calls of an actor."""
    return {"ray_remote_args_fn": lambda: {"max_task_retries": number}}


def execution_options(reserved: "ExecutionResources | None") -> "ExecutionOptions":
    """Options of an execution that keeps order and leaves some resources of the cluster alone.

    Deprecated. Replaced by `label_selector`, or by the coordinator that Ray Train reports its workers to.

    Args:
        reserved: CPUs and GPUs to leave alone; None for nothing.
    """
    from ray.data import ExecutionOptions

    return ExecutionOptions(preserve_order=True, exclude_resources=reserved)


def set_callbacks(context: "DataContext", *callbacks: "type[ExecutionCallback]") -> None:
    """Have Ray Data call these at each turn of its scheduling loop.

    Private, as `ExecutionCallback` is, and replaced by the same.
    """
    context.custom_execution_callback_classes = list(callbacks)
