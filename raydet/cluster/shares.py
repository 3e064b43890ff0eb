"""Resource shares of a cluster: CPUs and GPUs for each worker of a job, and its decode processes."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import remove_placement_group

from raydet.cluster import ray_internals, session
from raydet.cluster.ray_internals import NodeType
from raydet.common.errors import UserError
from raydet.common.ray_address import is_connected, starts_cluster
from raydet.tables import storage

_MOST_NODES = 1000
"""Number of nodes to assume for a kind without a limit."""
_DECODER_BYTES = 700 * 2**20
"""Memory of a decode process: Python with albumentations, and the images of one task."""


@dataclass(frozen=True)
class Resources:
    """The share of each worker of a job.

    Attributes:
        num_gpus: GPUs of the cluster, including those of nodes that it may still start.
        use_gpu: True if each worker gets one GPU.
        cpus_per_worker: CPUs reserved for each worker.
        notice: A line for the terminal if GPUs stay idle or workers must wait; empty otherwise.
    """

    num_gpus: float
    use_gpu: bool
    cpus_per_worker: float
    notice: str = ""

    def describe(self, min_workers: int, max_workers: int) -> str:
        """Return a summary for the terminal, such as "2 workers, 1 CPU each, no GPU"."""
        number = f"{max_workers}" if min_workers == max_workers else f"{min_workers} to {max_workers}"
        workers = f"{number} worker{'s' if max_workers > 1 else ''}"
        cpus = f"{self.cpus_per_worker:g} CPU{'s' if self.cpus_per_worker > 1 else ''}"
        each = " each" if max_workers > 1 else ""
        return f"{workers}, {cpus} and 1 GPU{each}" if self.use_gpu else f"{workers}, {cpus}{each}, no GPU"


def resources_of_nodes() -> list[dict[str, float]]:
    """Return the total resources of each live node, by Ray's names (CPU, GPU, memory, …)."""
    return [node["Resources"] for node in ray_internals.alive_nodes()]


def nodes_of_cluster() -> list[Mapping[str, float]]:
    """Return the resources of each live node, and of each node that the cluster's autoscaler may still start."""
    return with_future_nodes(resources_of_nodes(), ray_internals.node_types() if may_grow() else [])


def with_future_nodes(
    nodes: Sequence[Mapping[str, float]], node_types: Sequence[NodeType]
) -> list[Mapping[str, float]]:
    """Return the nodes, followed by those that may still be started: of each kind, as many as are not yet live."""
    future: list[Mapping[str, float]] = []
    for kind in node_types:
        most = _MOST_NODES if kind.max_nodes is None else min(kind.max_nodes, _MOST_NODES)
        live = sum(_cpus_and_gpus(node) == _cpus_and_gpus(kind.resources) for node in nodes)
        future += [kind.resources] * (most - live)
    return [*nodes, *future]


def _cpus_and_gpus(node: Mapping[str, float]) -> tuple[float, float]:
    return node.get("CPU", 0.0), node.get("GPU", 0.0)


def may_grow() -> bool:
    """Return True if the cluster may gain nodes; a cluster that the job itself started does not."""
    return not starts_cluster()


def gpus_in_reach() -> int:
    """Return the number of GPUs that a job of this process could use now; at least 1 if the cluster may start some.

    Connects to a named cluster for the moment, if the process is not connected yet.
    """
    if starts_cluster() and not is_connected():
        return ray_internals.local_gpus()
    with tempfile.TemporaryDirectory() as folder, session.session(folder):
        live = sum(node.get("GPU", 0.0) for node in resources_of_nodes())
        return int(live) or int(any(node.get("GPU", 0.0) for node in nodes_of_cluster()))


def share_out(*, min_workers: int, max_workers: int, use_gpu: bool | None, cpus_per_worker: float | None) -> Resources:
    """Divide the connected cluster among the job's workers; for arguments and errors see `shares_of`."""
    return shares_of(
        resources_of_nodes(),
        node_types=ray_internals.node_types() if may_grow() else [],
        may_grow=may_grow(),
        min_workers=min_workers,
        max_workers=max_workers,
        use_gpu=use_gpu,
        cpus_per_worker=cpus_per_worker,
    )


def shares_of(
    nodes: Sequence[Mapping[str, float]],
    *,
    node_types: Sequence[NodeType] = (),
    may_grow: bool,
    min_workers: int,
    max_workers: int,
    use_gpu: bool | None,
    cpus_per_worker: float | None,
) -> Resources:
    """Divide the given nodes among workers; the CPUs that no worker holds decode.

    Nodes that the autoscaler may still start count like live ones: a cluster often starts with none. A worker with a
    GPU holds one or two CPUs, which its model and its input need. Workers without a GPU hold half of the CPUs,
    fractions on two CPUs. If no kind of node is known, a worker gets one CPU, which fits any future node.

    `nodes` are the resources of each live node, by Ray's names; `node_types` may be added if the cluster `may_grow`.
    `use_gpu` gives each worker one GPU; None uses GPUs if there are enough. Without `cpus_per_worker`, a worker gets a
    share of the cluster's CPUs.

    Raises:
        UserError: There is one node, none may be added, and it lacks the requested resources.
    """
    live_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    all_nodes = with_future_nodes(nodes, node_types)
    total_cpus = sum(node.get("CPU", 0.0) for node in all_nodes)
    num_gpus = sum(node.get("GPU", 0.0) for node in all_nodes)
    if not total_cpus:
        notice = _notice_without_nodes(use_gpu, cpus_per_worker)
        return Resources(num_gpus, bool(use_gpu), cpus_per_worker or 1.0, notice)
    if len(nodes) == 1 and not may_grow:
        _require_available(min_workers, use_gpu, cpus_per_worker, total_cpus, num_gpus)
    notice = _notice(min_workers, use_gpu, live_gpus, num_gpus)
    use_gpu = num_gpus >= min_workers if use_gpu is None else use_gpu
    if cpus_per_worker is None:
        cpus_per_worker = _cpus_of_worker(all_nodes, max_workers, use_gpu=use_gpu)
    return Resources(num_gpus, use_gpu, cpus_per_worker, notice)


def _cpus_of_worker(nodes: Sequence[Mapping[str, float]], max_workers: int, *, use_gpu: bool) -> float:
    """Return the CPUs that each worker holds by default.

    A worker with a GPU holds two CPUs if its node has at least four per GPU, one if it has at least two, and otherwise
    half of the CPUs per GPU. Workers without a GPU share half of all CPUs, each at most half of a node.
    """
    per_gpu = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU", 0.0) >= 1]
    if use_gpu:
        fewest = min(per_gpu, default=2.0)
        return 2.0 if fewest >= 4 else 1.0 if fewest >= 2 else max(fewest / 2, 0.1)
    total_cpus = sum(node.get("CPU", 0.0) for node in nodes)
    largest_node = max(node.get("CPU", 0.0) for node in nodes)
    cpus = max(min(total_cpus / 2 / max_workers, max(largest_node / 2, 0.5)), 0.1)
    return float(int(cpus)) if cpus > 1 else cpus


def _notice_without_nodes(use_gpu: bool | None, cpus_per_worker: float | None) -> str:
    options = {"--use-gpu": use_gpu, "--cpus-per-worker": cpus_per_worker}
    unset = [option for option, value in options.items() if value is None]
    advice = f"; set {' and '.join(unset)} to suit the nodes it will add" if unset else ""
    return f"the cluster has no node with CPUs yet: workers wait until it grows{advice}"


def _notice(num_workers: int, use_gpu: bool | None, live_gpus: float, num_gpus: float) -> str:
    if use_gpu is None and 0 < num_gpus < num_workers:
        return (
            f"no GPU is used: {num_workers} workers would require {num_workers} GPUs, but the cluster has "
            f"{num_gpus:g}; lower --num-workers to use them"
        )
    if use_gpu is False or live_gpus >= num_workers or (use_gpu is None and not num_gpus):
        return ""
    # Nodes can also be added by hand, so a request beyond the autoscaler's limit is no error.
    limit = f", at most {num_gpus:g} with the nodes that it may start" if live_gpus < num_gpus else ""
    return (
        f"{num_workers} worker{'s' * (num_workers > 1)} with a GPU each: the cluster has {live_gpus:g} GPUs{limit}; "
        "workers wait until it grows"
    )


def decoders_of(
    nodes: Sequence[Mapping[str, float]], *, workers: Sequence[int], cpus_per_worker: float, executions: int = 1
) -> tuple[int, ...]:
    """Return the number of decode processes that one execution runs on each node.

    Decode processes reserve no CPUs: they wait as soon as their consumer has enough, so the operating system divides
    the cores between them and the workers. A node runs one for each CPU that its workers do not hold, but at least
    two if it has two CPUs: whenever decoding is too slow the workers wait, and their CPUs are free. All decode
    processes of a node fit into half of the memory that Ray may use there. If several executions (training runs,
    validations, trials) share the cluster, each gets an equal part. In any case each execution has one decode process
    on every node with CPUs, and none on a node without, such as a head that only coordinates.

    `workers` and the result are by node, in the order of `nodes`; the workers are those of all executions.
    """
    return tuple(
        _decoders_on(node, num_workers * cpus_per_worker) // executions or int(node.get("CPU", 0.0) > 0)
        for node, num_workers in zip(nodes, workers, strict=True)
    )


def _decoders_on(node: Mapping[str, float], held_cpus: float) -> int:
    """Return the number of decode processes on a node, over all executions; 0 if it has neither CPUs nor memory."""
    cpus = int(node.get("CPU", 0.0))
    fitting = int(node["memory"] / 2 / _DECODER_BYTES) if "memory" in node else cpus
    return min(max(int(cpus - held_cpus + 1e-9), min(2, cpus)), fitting)


def decoders_near(node_id: str, node_of_worker: Sequence[str], *, cpus_per_worker: float) -> list[str]:
    """Return the node of each decode process that serves the training workers of one node, by Ray's ids.

    These are the processes on that node, and an equal share of those on the nodes without training workers.
    """
    nodes = {node["NodeID"]: node["Resources"] for node in ray_internals.alive_nodes()}
    workers = [node_of_worker.count(node) for node in nodes]
    decoders = decoders_of([*nodes.values()], workers=workers, cpus_per_worker=cpus_per_worker)
    numbers = dict(zip(nodes, decoders, strict=True))
    served = sorted(set(node_of_worker))
    others = [node for node, number in numbers.items() if node not in served for _ in range(number)]
    return [node_id] * max(1, numbers.get(node_id, 1)) + others[served.index(node_id) :: len(served)]


def workers_that_fit(resources: Resources) -> int:
    """Return the number of workers that fit on the live nodes.

    Resources in use count as available: Ray does not report who holds them, and the holders include this job's own
    workers. If other jobs hold them, the workers wait, as they always do for CPUs.
    """
    fitting = 0
    for node in resources_of_nodes():
        by_cpus = int(node.get("CPU", 0.0) / resources.cpus_per_worker + 1e-9)
        fitting += min(by_cpus, int(node.get("GPU", 0.0))) if resources.use_gpu else by_cpus
    return fitting


def note_own_group(uri: str) -> None:
    """Record the id of this training worker's placement group in a file, for `free_noted_group`."""
    group = ray.util.get_current_placement_group()
    if group is not None:
        storage.write_bytes(uri, group.id.hex().encode())


def free_noted_group(uri: str) -> None:
    """Release the recorded placement group of a training run whose driver process was killed or lost.

    Ray releases it only at the end of the job, which for a trial is the end of the search. Ray Train's cleaner requires
    a dashboard, and does not survive the loss of its node. A group that is already released, or belongs to another
    cluster, is ignored.
    """
    if storage.exists(uri):
        remove_placement_group(ray_internals.placement_group(storage.read_bytes(uri).decode()))


def _require_available(
    num_workers: int, use_gpu: bool | None, cpus_per_worker: float | None, total_cpus: float, num_gpus: float
) -> None:
    if use_gpu and num_gpus < num_workers:
        raise UserError(
            f"--use-gpu requires a GPU for each worker, {num_workers} in total; this machine has {num_gpus:g}; lower "
            "--num-workers, or omit --use-gpu"
        )
    if cpus_per_worker and cpus_per_worker * num_workers > total_cpus - 0.5:
        raise UserError(
            f"--num-workers {num_workers} with --cpus-per-worker {cpus_per_worker:g} leaves none of this machine's "
            f"{total_cpus:g} CPUs for decoding; lower --cpus-per-worker or --num-workers"
        )
