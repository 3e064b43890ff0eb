"""The shares of a cluster: what its nodes offer, what each worker of a job gets, and what is left for decoding."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import remove_placement_group

from raydet.cluster import ray_internals
from raydet.common.errors import UserError
from raydet.tables import storage


@dataclass(frozen=True)
class Resources:
    """The share of each worker and each decoding task of a job.

    Attributes:
        num_gpus: In the whole cluster.
        use_gpu: Whether each worker gets one.
        cpus_per_worker: Reserved for each worker.
        cpus_per_task: What a decoding task asks for.
        remark: A line for the terminal, where GPUs and workers do not go together.
    """

    num_gpus: float
    use_gpu: bool
    cpus_per_worker: float
    cpus_per_task: float
    remark: str = ""

    def describe(self, min_workers: int, max_workers: int) -> str:
        """A few words for the terminal."""
        number = f"{max_workers}" if min_workers == max_workers else f"{min_workers} to {max_workers}"
        gpu = " and 1 GPU each" if self.use_gpu else " each, no GPU"
        return f"{number} worker{'s' if max_workers > 1 else ''} with {self.cpus_per_worker:g} CPU{gpu}"


def resources_of_nodes() -> list[dict[str, float]]:
    """Resources of each node that is alive, free or not, by Ray's names (CPU, GPU, memory, …)."""
    return [node["Resources"] for node in ray_internals.alive_nodes()]


def share_out(*, min_workers: int, max_workers: int, use_gpu: bool | None, cpus_per_worker: float | None) -> Resources:
    """Divide the cluster that this process is connected to between the workers that compute and the tasks that decode.

    Args:
        min_workers: Fewest workers of the job.
        max_workers: Most workers of the job.
        use_gpu: Whether each worker gets a GPU; None for where there are enough.
        cpus_per_worker: CPUs to reserve for each worker; None for a share of those that there are.

    Raises:
        UserError: This machine, where it is the whole cluster, does not have what is asked for.
    """
    return shares_of(
        resources_of_nodes(),
        # A cluster that the job itself has started stays as it is.
        may_grow=os.environ.get("RAY_ADDRESS", "") not in ("", "local"),
        min_workers=min_workers,
        max_workers=max_workers,
        use_gpu=use_gpu,
        cpus_per_worker=cpus_per_worker,
    )


def shares_of(
    nodes: Sequence[Mapping[str, float]],
    *,
    may_grow: bool,
    min_workers: int,
    max_workers: int,
    use_gpu: bool | None,
    cpus_per_worker: float | None,
) -> Resources:
    """The arithmetic of `share_out`.

    Half of the CPUs go to the workers, unless told otherwise, so that decoding can never be starved of all of them;
    fractions keep two CPUs from a deadlock. Where no node has a CPU yet, as on a cluster that grows from zero, nothing
    can be divided: a worker and a decoding task get one CPU each, which fit onto any node that will come.

    Args:
        nodes: Resources of each node, by Ray's names.
        may_grow: Whether nodes may be added.
        min_workers: As in `share_out`, like all that follow.
        max_workers: See above.
        use_gpu: See above.
        cpus_per_worker: See above.

    Raises:
        UserError: See above.
    """
    total_cpus = sum(node.get("CPU", 0.0) for node in nodes)
    num_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if not total_cpus:
        return Resources(
            num_gpus=num_gpus,
            use_gpu=bool(use_gpu),
            cpus_per_worker=cpus_per_worker or 1.0,
            cpus_per_task=1.0,
            remark=_remark_on_no_node(use_gpu, cpus_per_worker),
        )
    if len(nodes) == 1 and not may_grow:
        _refuse_what_is_not_there(min_workers, use_gpu, cpus_per_worker, total_cpus, num_gpus)
    if cpus_per_worker is None:
        largest_node = max(node.get("CPU", 0.0) for node in nodes)
        cpus_per_worker = max(min(total_cpus / 2 / max_workers, max(largest_node / 2, 0.5)), 0.1)
        if use_gpu or (use_gpu is None and num_gpus >= min_workers):
            # A worker must fit onto a node with a GPU, beside those for the node's other GPUs.
            room = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU", 0.0) >= 1]
            cpus_per_worker = min([cpus_per_worker, *(max(share / 2, 0.1) for share in room)])
        if cpus_per_worker > 1:
            cpus_per_worker = float(int(cpus_per_worker))
    left = total_cpus - cpus_per_worker * max_workers
    return Resources(
        num_gpus=num_gpus,
        use_gpu=num_gpus >= min_workers if use_gpu is None else use_gpu,
        cpus_per_worker=cpus_per_worker,
        cpus_per_task=1.0 if left >= 4 else 0.5,
        remark=_remark(min_workers, use_gpu, num_gpus),
    )


def _remark_on_no_node(use_gpu: bool | None, cpus_per_worker: float | None) -> str:
    guessed = {"--use-gpu": use_gpu, "--cpus-per-worker": cpus_per_worker}
    missing = [option for option, value in guessed.items() if value is None]
    advice = f"; to choose for the nodes that will come, set {' and '.join(missing)}" if missing else ""
    return f"the cluster has no node with CPUs yet: workers wait until it has grown{advice}"


def _remark(num_workers: int, use_gpu: bool | None, num_gpus: float) -> str:
    if use_gpu and num_gpus < num_workers:
        return (
            f"--use-gpu with {num_workers} workers needs as many GPUs, the cluster has {num_gpus:g}: they wait "
            "until it has grown"
        )
    if use_gpu is None and 0 < num_gpus < num_workers:
        return (
            f"no GPU is used: {num_workers} workers would need as many, the cluster has {num_gpus:g}; lower "
            "--num-workers to use them"
        )
    return ""


def workers_that_fit(resources: Resources) -> int:
    """Workers that the nodes that are alive have room for, with as many CPUs left as one decoding task asks for.

    What other jobs hold counts as room: Ray says what is taken but not by whom, and this job's own workers, just lost
    or still running, are among those that hold it. Where others do, workers wait for them, as all jobs do for CPUs.
    """
    nodes = resources_of_nodes()
    total_cpus = sum(node.get("CPU", 0.0) for node in nodes)
    fitting = 0
    for node in nodes:
        by_cpus = int(node.get("CPU", 0.0) / resources.cpus_per_worker + 1e-9)
        fitting += min(by_cpus, int(node.get("GPU", 0.0))) if resources.use_gpu else by_cpus
    while fitting and total_cpus - fitting * resources.cpus_per_worker < resources.cpus_per_task - 1e-9:
        fitting -= 1
    return fitting


def cpus_for_tasks(resources: Resources) -> float:
    """CPUs that a decoding task may ask for beside workers that hold theirs; 0 where no node has as many left.

    All workers may fit onto fewer nodes than they were shared out over, as when one was lost: tasks that ask for what
    the workers hold would wait for ever, and the workers for them.
    """
    is_room = ray_internals.most_free_cpus() >= resources.cpus_per_task - 1e-9
    return resources.cpus_per_task if is_room else 0.0


def note_own_group(uri: str) -> None:
    """Writes down, in a worker of a training, where `free_noted_group` finds what it holds of the cluster."""
    group = ray.util.get_current_placement_group()
    if group is not None:
        storage.write_bytes(uri, group.id.hex().encode())


def free_noted_group(uri: str) -> None:
    """Gives back what the workers of a training hold whose own process has ended.

    Of a process that was killed or lost Ray itself would do so at the end of the job alone, and for a trial that is the
    end of the whole search; Ray Train's cleaner does it only where there is a dashboard, and does not outlive its node.
    What is given back already, or is of another cluster, is no matter.
    """
    if storage.exists(uri):
        remove_placement_group(ray_internals.placement_group(storage.read_bytes(uri).decode()))


def _refuse_what_is_not_there(
    num_workers: int, use_gpu: bool | None, cpus_per_worker: float | None, total_cpus: float, num_gpus: float
) -> None:
    if use_gpu and num_gpus < num_workers:
        raise UserError(
            f"--use-gpu with {num_workers} workers needs as many GPUs, this machine has {num_gpus:g}; lower "
            "--num-workers, or leave --use-gpu out"
        )
    if cpus_per_worker and cpus_per_worker * num_workers > total_cpus - 0.5:
        raise UserError(
            f"{num_workers} workers of {cpus_per_worker:g} CPUs leave none of this machine's {total_cpus:g} to decode "
            "with; lower --cpus-per-worker or --num-workers"
        )
