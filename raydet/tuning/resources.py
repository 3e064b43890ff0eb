"""Resources of concurrent trials: their number and the share of each, such that all of them fit.

Ray Tune counts only the small process that drives a trial; the trial's workers request their own resources. If more
workers started than fit, trials would wait for each other forever.
"""

import dataclasses
import math
from dataclasses import dataclass

from raydet.cluster import shares
from raydet.common.errors import UserError
from raydet.config import TrainConfig

DRIVER_CPUS = 0.01
"""CPUs of the process that drives a trial."""


@dataclass(frozen=True)
class Machines:
    """Resources of the cluster, including nodes that it may still start."""

    num_cpus: float
    num_gpus: float
    num_nodes: int
    largest_node_cpus: float
    may_grow: bool


@dataclass(frozen=True)
class Share:
    """The share of each concurrent trial.

    Attributes:
        max_concurrent: Number of concurrent trials.
        use_gpu: True if each worker gets one GPU.
        cpus_per_worker: CPUs reserved for each worker of a trial.
        threads_per_worker: torch threads of a worker; None for the default of `train`.
    """

    max_concurrent: int
    use_gpu: bool
    cpus_per_worker: float
    threads_per_worker: int | None

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """Return a trial's training config with its share."""
        return dataclasses.replace(
            config,
            use_gpu=self.use_gpu,
            cpus_per_worker=self.cpus_per_worker,
            threads_per_worker=config.threads_per_worker or self.threads_per_worker,
        )


def share_out(base: TrainConfig, max_concurrent: int | None, num_trials: int) -> Share:
    """Divide the connected cluster among concurrent trials, of which the user may request a number.

    Raises:
        UserError: One trial, or the requested number, does not fit.
    """
    one = shares.share_out(
        min_workers=base.min_workers,
        max_workers=base.max_workers,
        use_gpu=base.use_gpu,
        cpus_per_worker=base.cpus_per_worker,
    )
    nodes = shares.nodes_of_cluster()
    machines = Machines(
        num_cpus=sum(node.get("CPU", 0.0) for node in nodes),
        num_gpus=one.num_gpus,
        num_nodes=len(nodes),
        largest_node_cpus=max((node.get("CPU", 0.0) for node in nodes), default=1.0),
        may_grow=shares.may_grow(),
    )
    return divide(machines, one, base, None if max_concurrent is None else min(max_concurrent, num_trials), num_trials)


def divide(
    machines: Machines, one: shares.Resources, base: TrainConfig, max_concurrent: int | None, num_trials: int
) -> Share:
    """Divide the given resources among concurrent trials.

    Args:
        machines: Resources of the cluster.
        one: Share of a single training run that uses the complete cluster.
        base: Training config that sets the workers of all trials.
        max_concurrent: Requested number of concurrent trials; None for a default.
        num_trials: Number of remaining trials.

    Raises:
        UserError: The requested number of trials does not fit.
    """
    workers = base.max_workers
    fewest_cpus = base.cpus_per_worker or 0.1
    most = int(machines.num_cpus / (workers * fewest_cpus + DRIVER_CPUS) + 1e-9)
    by_default = most if base.cpus_per_worker else int(machines.num_cpus / 2 / workers)
    if one.use_gpu and not machines.may_grow:
        most = min(most, int(machines.num_gpus / workers))
    if one.use_gpu:
        by_default = int(machines.num_gpus / workers)
    if max_concurrent is not None and max_concurrent > max(most, 1):
        each = f"{workers} worker{'s' if workers > 1 else ''} each"
        raise UserError(
            f"--max-concurrent {max_concurrent}: {machines.num_cpus:g} CPUs and {machines.num_gpus:g} GPUs have room "
            f"for at most {max(most, 1)} with {each}; lower it, or num_workers or cpus_per_worker in --train-config"
        )
    number = max(1, min(max_concurrent or by_default, max(most, 1), num_trials))
    cpus = base.cpus_per_worker
    if cpus is None and not machines.num_cpus:  # a cluster that grows from zero
        cpus = one.cpus_per_worker
    if cpus is None:
        cpus = min(one.cpus_per_worker, (machines.num_cpus - number * DRIVER_CPUS) / 2 / (number * workers))
        cpus = max(0.1, float(int(cpus)) if cpus > 1 else math.floor(cpus * 100) / 100)
    threads = None
    if number > 1:
        side_by_side = math.ceil(number * workers / machines.num_nodes)
        threads = max(1, int(machines.largest_node_cpus / side_by_side))
    return Share(number, one.use_gpu, cpus, threads)
