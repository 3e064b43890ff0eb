"""How many trials train at once, and what each of them gets, so that all of them fit with what decodes for them.

Ray Tune counts only the small process that drives a trial; the workers of its training ask Ray for themselves. Were
there more of them than fit, or no CPU left to decode with, trials would wait for each other for ever.
"""

import dataclasses
import math
import os
from dataclasses import dataclass

from raydet.cluster import shares
from raydet.common.errors import UserError
from raydet.config import TrainConfig

DRIVER_CPUS = 0.01
"""Of the process that drives a trial."""
_OVERHEAD_CPUS = 0.05
"""Of a trial beside its workers and decoding tasks: its driver, and the readers of its stream."""


@dataclass(frozen=True)
class Machines:
    """What the cluster has: CPUs and GPUs in all, nodes, and the CPUs of the largest of them."""

    num_cpus: float
    num_gpus: float
    num_nodes: int
    largest_node_cpus: float
    may_grow: bool


@dataclass(frozen=True)
class Share:
    """What each of the trials at once gets.

    Attributes:
        max_concurrent: Trials at once.
        use_gpu: Whether each worker gets a GPU.
        cpus_per_worker: Reserved for each worker of a trial.
        threads_per_worker: torch threads of a worker; None leaves it to the training.
    """

    max_concurrent: int
    use_gpu: bool
    cpus_per_worker: float
    threads_per_worker: int | None

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """The training of a trial with its share."""
        return dataclasses.replace(
            config,
            use_gpu=self.use_gpu,
            cpus_per_worker=self.cpus_per_worker,
            threads_per_worker=config.threads_per_worker or self.threads_per_worker,
        )


def share_out(base: TrainConfig, max_concurrent: int | None, num_trials: int) -> Share:
    """Divides the cluster that this process is connected to among trials.

    Args:
        base: Of which all trials have the workers.
        max_concurrent: Trials at once, if that is asked for.
        num_trials: That are still to be done.

    Raises:
        UserError: Not even one trial fits, or not as many as asked for.
    """
    one = shares.share_out(
        min_workers=base.min_workers,
        max_workers=base.max_workers,
        use_gpu=base.use_gpu,
        cpus_per_worker=base.cpus_per_worker,
    )
    nodes = shares.resources_of_nodes()
    machines = Machines(
        num_cpus=sum(node.get("CPU", 0.0) for node in nodes),
        num_gpus=one.num_gpus,
        num_nodes=len(nodes),
        largest_node_cpus=max((node.get("CPU", 0.0) for node in nodes), default=1.0),
        may_grow=bool(os.environ.get("RAY_ADDRESS")),
    )
    return divide(machines, one, base, None if max_concurrent is None else min(max_concurrent, num_trials), num_trials)


def divide(
    machines: Machines, one: shares.Resources, base: TrainConfig, max_concurrent: int | None, num_trials: int
) -> Share:
    """The arithmetic of `share_out`.

    Args:
        machines: What there is.
        one: What a training would get that has the cluster to itself.
        base: The training.
        max_concurrent: Trials at once, if that is asked for.
        num_trials: That are still to be done.

    Raises:
        UserError: Not as many trials fit as asked for.
    """
    workers = base.max_workers
    room = machines.num_cpus - one.cpus_per_task
    fewest_cpus = base.cpus_per_worker or 0.1
    most = int(room / (workers * fewest_cpus + _OVERHEAD_CPUS) + 1e-9)
    by_default = most if base.cpus_per_worker else int(machines.num_cpus / 2 / workers)
    if one.use_gpu and not machines.may_grow:
        most = min(most, int(machines.num_gpus / workers))
    if one.use_gpu:
        by_default = int(machines.num_gpus / workers)
    if max_concurrent is not None and max_concurrent > max(most, 1):
        each = f"{workers} worker{'s' if workers > 1 else ''} each"
        raise UserError(
            f"--max-concurrent {max_concurrent}: {machines.num_cpus:g} CPUs and {machines.num_gpus:g} GPUs have room "
            f"for {max(most, 1)} at once, with {each}; lower it, or num_workers or cpus_per_worker of --train-config"
        )
    number = max(1, min(max_concurrent or by_default, max(most, 1), num_trials))
    cpus = base.cpus_per_worker
    if cpus is None and not machines.num_cpus:  # a cluster that grows from zero
        cpus = one.cpus_per_worker
    if cpus is None:
        cpus = min(one.cpus_per_worker, (machines.num_cpus - number * _OVERHEAD_CPUS) / 2 / (number * workers))
        cpus = max(0.1, float(int(cpus)) if cpus > 1 else math.floor(cpus * 100) / 100)
    threads = None
    if number > 1:
        side_by_side = math.ceil(number * workers / machines.num_nodes)
        threads = max(1, int(machines.largest_node_cpus / side_by_side))
    return Share(number, one.use_gpu, cpus, threads)
