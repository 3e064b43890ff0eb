"""The cluster of a plan, from options or from Ray's `cluster.yaml`."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from raydet.common.errors import UserError, one_line
from raydet.config import PlanConfig
from raydet.planning.throughput import NodeGroup
from raydet.tables import storage

_AWS_SIZE = re.compile(r"[a-z][a-z0-9-]*\.(?:(\d*)x)?large")


def node_groups(config: PlanConfig) -> tuple[NodeGroup, ...]:
    """Return the node groups that a config requests; empty if it requests none.

    Raises:
        UserError: The cluster.yaml cannot be read, or does not state the CPUs of a node.
    """
    if config.cluster is not None:
        groups = _groups_of_yaml(config, config.cluster)
    else:
        groups = []
        if config.cpu_nodes is not None:
            assert config.cpus_per_cpu_node is not None, "the config requires it"
            groups.append(NodeGroup(name="CPU nodes", num_nodes=config.cpu_nodes, num_cpus=config.cpus_per_cpu_node))
        if config.gpu_nodes is not None:
            assert config.cpus_per_gpu_node is not None, "the config requires it"
            groups.append(
                NodeGroup(
                    name="GPU nodes",
                    num_nodes=config.gpu_nodes,
                    num_cpus=config.cpus_per_gpu_node,
                    num_gpus=config.gpus_per_gpu_node or 1,
                )
            )
    return tuple(with_price(config, group) for group in groups)


def with_price(config: PlanConfig, group: NodeGroup) -> NodeGroup:
    """Return the group with the config's price for its kind of nodes."""
    price = config.price_per_gpu_node_hour if group.num_gpus else config.price_per_cpu_node_hour
    return NodeGroup(**{**vars(group), "price_per_hour": price})


def _groups_of_yaml(config: PlanConfig, uri: str) -> list[NodeGroup]:
    try:
        content = yaml.safe_load(storage.read_bytes(uri))
    except FileNotFoundError:
        raise UserError(f"no such cluster file: {uri}") from None
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"cannot read the cluster file {uri}: {one_line(error)}") from None
    kinds = content.get("available_node_types") if isinstance(content, dict) else None
    if not isinstance(kinds, dict) or not all(isinstance(kind, dict) for kind in kinds.values()):
        raise UserError(f"{uri} is not a cluster.yaml of Ray: it has no available_node_types")
    groups = []
    for name, kind in kinds.items():
        resources = kind.get("resources") or {}
        num_nodes = 1 if name == content.get("head_node_type") else int(kind.get("max_workers", 0))
        # A head that offers no CPU takes no part in the work.
        if num_nodes == 0 or resources.get("CPU") == 0:
            continue
        num_gpus = int(resources.get("GPU", 0))
        num_cpus = resources.get("CPU")
        if num_cpus is None:
            num_cpus = (config.cpus_per_gpu_node if num_gpus else config.cpus_per_cpu_node) or _aws_cpus(content, kind)
        if num_cpus is None:
            raise UserError(
                f"{uri} does not state the CPUs of a node of the group {name}; write resources: {{CPU: 16}} there, "
                f"or set --cpus-per-{'gpu' if num_gpus else 'cpu'}-node"
            )
        groups.append(NodeGroup(name=str(name), num_nodes=num_nodes, num_cpus=int(num_cpus), num_gpus=num_gpus))
    if not groups:
        raise UserError(f"{uri} has no group of worker nodes: each has max_workers 0 or no CPU")
    most = content.get("max_workers")
    num_workers = sum(group.num_nodes for group in groups if group.name != content.get("head_node_type"))
    if most is not None and num_workers > int(most):
        raise UserError(
            f"{uri} allows {num_workers} nodes in its groups but only {most} in total; set --cpu-nodes and --gpu-nodes"
        )
    return groups


def _aws_cpus(content: Mapping[str, Any], kind: Mapping[str, Any]) -> int | None:
    """Return the vCPUs of an AWS instance type: 2 for large, 4 for xlarge, 4 N for Nxlarge."""
    if (content.get("provider") or {}).get("type") != "aws":
        return None
    match = _AWS_SIZE.fullmatch(str((kind.get("node_config") or {}).get("InstanceType")))
    if match is None:
        return None
    return 2 if match[1] is None else 4 * int(match[1] or 1)
