"""The nodes of a plan: those of the measured run, or those of Ray's `cluster.yaml`, with their prices."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raydet.common.errors import UserError
from raydet.tables import storage

_AWS_SIZE = re.compile(r"[a-z][a-z0-9-]*\.(?:(\d*)x)?large")


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Identical nodes.

    Attributes:
        num_cpus: CPUs per node; 0 for a head that takes no part in the work.
        price_per_hour: Price of a node; None if unknown.
    """

    name: str
    num_nodes: int
    num_cpus: float
    num_gpus: float = 0.0
    price_per_hour: float | None = None

    def describe(self) -> str:
        """Return a text such as "4 × model (8 CPUs, 1 GPU)"."""
        gpus = f", {self.num_gpus:g} GPU{'s' if self.num_gpus > 1 else ''}" if self.num_gpus else ""
        return f"{self.num_nodes} × {self.name} ({self.num_cpus:g} CPU{'s' * (self.num_cpus != 1)}{gpus})"


def total_cpus(groups: Sequence[NodeGroup]) -> float:
    """Return the CPUs of all nodes."""
    return sum(group.num_nodes * group.num_cpus for group in groups)


def total_gpus(groups: Sequence[NodeGroup]) -> float:
    """Return the GPUs of all nodes."""
    return sum(group.num_nodes * group.num_gpus for group in groups)


def groups_of_record(kinds: Sequence[Mapping[str, Any]]) -> list[NodeGroup]:
    """Return the nodes of a job record, named after their CPUs and GPUs."""
    groups = []
    for kind in kinds:
        num_nodes, num_cpus, num_gpus = int(kind["count"]), float(kind["num_cpus"]), float(kind["num_gpus"])
        gpus = f"-{num_gpus:g}{(kind['accelerator'] or 'gpu').lower()}" if num_gpus else ""
        groups.append(
            NodeGroup(name=f"{num_cpus:g}cpu{gpus}", num_nodes=num_nodes, num_cpus=num_cpus, num_gpus=num_gpus)
        )
    return groups


def groups_of_yaml(uri: str) -> list[NodeGroup]:
    """Read Ray's `cluster.yaml`; each node type counts at its maximum number of nodes.

    Raises:
        UserError: The file cannot be read, or does not state the CPUs of a node type.
    """
    content = storage.read_given_yaml(uri, "cluster file")
    kinds = content.get("available_node_types") if isinstance(content, dict) else None
    if not isinstance(kinds, dict) or not all(isinstance(kind, dict) for kind in kinds.values()):
        raise UserError(f"{uri} is not a Ray cluster.yaml: it has no available_node_types")
    head = content.get("head_node_type")
    groups = [_group(uri, content, str(name), kind, is_head=name == head) for name, kind in kinds.items()]
    groups = [group for group in groups if group.num_nodes]
    if not total_cpus(groups):
        raise UserError(f"{uri} has no nodes that can work: each node type has max_workers 0 or no CPUs")
    most, num_workers = content.get("max_workers"), sum(group.num_nodes for group in groups if group.name != head)
    if most is not None and num_workers > int(most):
        raise UserError(
            f"{uri} allows {num_workers} nodes in its node types but only {most} in total; lower the max_workers of "
            "the node types to the nodes you plan for"
        )
    return groups


def _group(uri: str, content: Mapping[str, Any], name: str, kind: Mapping[str, Any], *, is_head: bool) -> NodeGroup:
    resources = kind.get("resources") or {}
    num_cpus = resources.get("CPU", _aws_cpus(content, kind))
    num_nodes = 1 if is_head else int(kind.get("max_workers", 0))
    if num_cpus is None and num_nodes:
        raise UserError(f"{uri} does not state the CPUs of a node of type {name}; write `resources: {{CPU: 16}}` there")
    num_gpus = float(resources.get("GPU", 0))
    return NodeGroup(name=name, num_nodes=num_nodes, num_cpus=float(num_cpus or 0), num_gpus=num_gpus)


def _aws_cpus(content: Mapping[str, Any], kind: Mapping[str, Any]) -> int | None:
    """Return the vCPUs of an AWS instance type: 2 for large, 4 for xlarge, 4 N for Nxlarge."""
    if (content.get("provider") or {}).get("type") != "aws":
        return None
    match = _AWS_SIZE.fullmatch(str((kind.get("node_config") or {}).get("InstanceType")))
    return None if match is None else 2 if match[1] is None else 4 * int(match[1] or 1)


def with_prices(groups: Sequence[NodeGroup], prices: Sequence[str]) -> list[NodeGroup]:
    """Return the groups with a price per node and hour: one number for all, or `NAME=NUMBER` for each node type.

    Raises:
        UserError: A price is not a number or names an unknown node type, or a node type with CPUs has no price.
    """
    by_name: dict[str, float] = {}
    names = ", ".join(group.name for group in groups)
    for text in prices:
        name, equals, value = text.rpartition("=")
        if equals and name not in {group.name for group in groups}:
            raise UserError(f"--price {text}: there is no node type {name}; the node types are {names}")
        try:
            price = float(value)
        except ValueError:
            price = -1.0
        if not 0 <= price < float("inf"):
            raise UserError(f"--price {text}: give a price per node and hour, such as 0.98 or {groups[0].name}=0.98")
        by_name |= {name: price} if equals else dict.fromkeys((group.name for group in groups), price)
    missing = [group.name for group in groups if group.num_cpus and group.name not in by_name]
    if prices and missing:
        raise UserError(f"--price gives no price for {', '.join(missing)}; the node types are {names}")
    return [replace(group, price_per_hour=by_name.get(group.name)) for group in groups]
