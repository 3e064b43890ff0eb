"""Every private, developer or deprecated API of Ray that raydet uses, with the replacement once Ray removes it.

Ray does not guarantee these between minor versions. No other module may use one; a test checks the source of all
modules. Review this module when upgrading Ray.
"""

import contextlib
import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
import yaml
from ray._private import ray_constants, ray_logging
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray._private.state import state
from ray._raylet import PlacementGroupID

# Developer API; raised for a lost connection. Replacement: its base class `RayError`.
from ray.exceptions import RpcError

# Developer API; the only access to Ray's metrics. Replacement: the OpenTelemetry package.
from ray.util.metrics import Counter, Gauge, Metric
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydet.common.threads import available_cpus

if TYPE_CHECKING:
    from ray.data import DataContext, ExecutionOptions, ReadTask
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data.block import BlockMetadata
    from ray.train import UserCallback
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

__all__ = [
    "BlockMetadata",
    "Counter",
    "DataContext",
    "ExecutionCallback",
    "Gauge",
    "Metric",
    "ReadTask",
    "RpcError",
    "Searcher",
    "TrialScheduler",
    "UserCallback",
]

_LOADED_LATE = {
    # Developer API; the only way to set options of Ray Data. Replacement: settings per `Dataset`, once Ray has them.
    "DataContext": "ray.data",
    # Developer API; return types of the public `Datasource`. Replacement: `from_items` and a `flat_map`.
    "ReadTask": "ray.data",
    "BlockMetadata": "ray.data.block",
    # Private; the only hook into Ray Data's scheduling loop, used to slow it down and to end a run that lost a node.
    # Replacement: accept the spinning loop, and watch the nodes in a thread of the driver.
    "ExecutionCallback": "ray.data._internal.execution.execution_callback",
    # Developer API; the only way for a worker to end a run without restarts. Replacement: let Ray Train
    # restart the workers `max_failures` times.
    "UserCallback": "ray.train",
    # Developer API; the only way to plug a custom search into Ray Tune. Replacement: start the trials as plain tasks.
    "Searcher": "ray.tune.search",
    "TrialScheduler": "ray.tune.schedulers",
}
"""Module of each class that is imported on first use: Ray Data takes 3 s to import, Ray Tune 10 s more."""


def __getattr__(name: str) -> Any:
    """Import a class of `_LOADED_LATE`."""
    if name not in _LOADED_LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LOADED_LATE[name]), name)


# Cluster start.


def local_cluster_options() -> dict[str, Any]:
    """Return options of `ray.init` for a cluster on this machine, some of them private."""
    return {
        # Unlike Ray's own count, this respects the CPU affinity and the quotas of all enclosing control groups.
        "num_cpus": available_cpus(),
        # The address that the cluster listens on; by default Ray chooses the machine's network address. No
        # replacement yet.
        "_node_ip_address": "127.0.0.1",
        # Ray ends processes that idle for a second if there are more of them than CPUs. Stages that use a fraction of
        # a CPU have more, and a new process takes seconds to its first task. Replacement: the environment variable
        # RAY_num_workers_soft_limit.
        "_system_config": {"num_workers_soft_limit": 16},
    }


@contextlib.contextmanager
def listening_on_loopback() -> Iterator[None]:
    """Context manager: a cluster started while the block runs listens on 127.0.0.1 only, with a private token file.

    Private constants. Ray replaces 127.0.0.1 with the machine's network address, and its processes then listen on all
    addresses, unless clusters of several machines are disabled, as they are on Windows and macOS. No replacement yet;
    tests/test_security.py fails if it stops working.
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
    """Stand-in for Ray's pattern of suppressed lines."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def search(self, line: str) -> bool:
        """Log the line and report a match, so that Ray does not print it."""
        self._logger.warning(line)
        return True


@contextlib.contextmanager
def messages_logged(logger: logging.Logger) -> Iterator[None]:
    """Context manager: send Ray's messages about its processes and nodes to a logger instead of the terminal.

    Private. Ray prints them to the driver's stdout regardless of `log_to_driver`. Replacement: that option, once it
    covers these lines.
    """
    deduplicator = ray_logging.stdout_deduplicator
    before = deduplicator.skip_re
    deduplicator.skip_re = cast("re.Pattern[str]", _IntoTheLog(logger))
    try:
        yield
    finally:
        deduplicator.skip_re = before


# Cluster state.


def total_and_free_resources() -> tuple[dict[str, float], dict[str, float]]:
    """Return all resources of the cluster, and those that are not in use, by name."""
    return ray.cluster_resources(), ray.available_resources()


def alive_nodes() -> list[dict[str, Any]]:
    """List the live nodes, with Ray's keys `NodeID`, `NodeManagerAddress`, `Resources`, ….

    Developer API. Replacement: `ray.util.state.list_nodes`, which requires a dashboard.
    """
    return [node for node in ray.nodes() if node["Alive"]]


@dataclass(frozen=True)
class NodeType:
    """A kind of node that an autoscaler may start.

    Attributes:
        resources: Resources of a node, by Ray's names (CPU, GPU, …).
        max_nodes: Maximum number of nodes of this kind; None for no limit.
    """

    resources: dict[str, float]
    max_nodes: int | None


def node_types() -> list[NodeType]:
    """List the kinds of nodes that the cluster's autoscaler may start; empty without one, or if it is unknown.

    Private. Some autoscalers store their configuration in the cluster. `ray up` copies its own, with the resources of
    each kind, to the head, where submitted jobs run; other nodes do not have that file, and KubeRay's autoscaler
    publishes nothing. No replacement yet.
    """
    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return [
            NodeType(dict(group.resources), None if group.max_count < 0 else group.max_count)
            for group in config.node_group_configs
        ]
    return _types_in(Path("~/ray_bootstrap_config.yaml").expanduser()) if _is_on_head() else []


def _is_on_head() -> bool:
    own_id = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == own_id and "node:__internal_head__" in node["Resources"] for node in alive_nodes())


def _types_in(path: Path) -> list[NodeType]:
    try:
        config = yaml.safe_load(path.read_bytes())
        types = config["available_node_types"]
        return [
            NodeType(
                {name: float(amount) for name, amount in (kind.get("resources") or {}).items()},
                # As Ray does: the head is started once, other kinds are limited by the whole cluster only.
                int(kind.get("max_workers", 0 if name == config.get("head_node_type") else config["max_workers"])),
            )
            for name, kind in types.items()
        ]
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
        return []


def cluster_cpus() -> float:
    """Return the total CPUs of the cluster, at least 1.

    Developer API. Replacement: the sum over `alive_nodes`.
    """
    return max(float(ray.cluster_resources().get("CPU", 0.0)), 1.0)


def away_from_empty_nodes() -> dict[str, Any]:
    """Return options of a task that reserves no CPUs, so that it does not run on a node without CPUs.

    Ray would place it on any node, even on a head that only coordinates. Developer API: the ids of the nodes.
    Replacement: none needed once such heads carry a label.
    """
    empty = [node["NodeID"] for node in alive_nodes() if not node["Resources"].get("CPU")]
    return {"label_selector": {"ray.io/node-id": f"!in({','.join(empty)})"}} if empty else {}


def placement_group(group_id: str) -> PlacementGroup:
    """Return the placement group with this hexadecimal id, even if another process created it.

    Private. Ray looks up groups by name only, and those of Ray Train have none. Replacement: a name, once Ray Train
    sets one, or its own cleaner, once that outlives the driver.
    """
    return PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))


def submitted_metadata() -> dict[str, str]:
    """Return the metadata of `ray job submit --metadata-json` plus Ray's own; empty unless a job server started this.

    Private. The job server sets this variable for the driver only. Replacement: `JobSubmissionClient`, which requires
    the dashboard's address.
    """
    try:
        metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata") or {}
    except (ValueError, AttributeError):
        return {}
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


# Ray Data.


def execution_options(most_bytes: int | None) -> "ExecutionOptions":
    """Return options of an execution that preserves order and limits the blocks that wait in the object store.

    Developer API. No replacement yet.
    """
    from ray.data import ExecutionOptions, ExecutionResources

    limits = ExecutionResources.for_limits(object_store_memory=most_bytes) if most_bytes else None
    return ExecutionOptions(preserve_order=True, resource_limits=limits)


def set_blocks_ahead(context: "DataContext", number: int) -> None:
    """Set the number of blocks that a task may yield before Ray Data takes them, two by default.

    Private. Replacement: the default, which halves the speed of a reader of small images.
    """
    context._max_num_blocks_in_streaming_gen_buffer = number


def local_gpus() -> int:
    """Return the number of GPUs that Ray would find on this machine, without starting Ray or importing torch.

    Private. Replacement: a cluster on this machine, whose start takes seconds.
    """
    manager = get_accelerator_manager_for_resource("GPU")
    if manager is None:
        return 0
    visible = manager.get_current_process_visible_accelerator_ids()
    found = int(manager.get_current_node_num_accelerators())
    return found if visible is None else min(found, len(visible))


def actors_on(nodes: Sequence[str]) -> dict[str, Any]:
    """Return arguments of `map_batches` that place its actors on nodes in turn, or on others if one is lost.

    The function for each actor is deprecated, and Ray 2.64 removes it. Replacement: one execution for each node.
    `nodes` are Ray's ids, one for each actor.
    """
    strategies = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    if len(set(nodes)) == 1:
        return {"scheduling_strategy": strategies[0]}
    places = cycle(strategies)
    return {"ray_remote_args_fn": lambda: {"scheduling_strategy": next(places)}}


def set_callbacks(context: "DataContext", *callbacks: "type[ExecutionCallback]") -> None:
    """Set the callbacks of Ray Data's scheduling loop.

    Private, with the same replacement as `ExecutionCallback`.
    """
    context.custom_execution_callback_classes = list(callbacks)
