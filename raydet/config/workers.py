"""Options shared by the commands that run a model on several workers."""

from typing import Literal

from raydet.config.fields import config, option, require, require_positive

Precision = Literal["fp32", "bf16", "fp16"]


@config
class WorkersConfig:
    """Resources of each worker; none of these options changes the result."""

    use_gpu: bool | None = option(
        "give each worker one GPU; on by default if there are enough GPUs",
        None,
        group="Compute and cluster",
        operational=True,
    )
    cpus_per_worker: float | None = option(
        "CPUs reserved for each worker; by default one or two with a GPU, otherwise an equal share of half of the "
        "cluster's CPUs; the rest decode images",
        None,
        group="Compute and cluster",
        operational=True,
    )
    threads_per_worker: int | None = option(
        "torch threads in each worker; by default the worker's share of the cores",
        None,
        group="Compute and cluster",
        operational=True,
    )

    def __post_init__(self) -> None:
        require_positive(self, "cpus_per_worker", "threads_per_worker")
        threads = self.threads_per_worker
        require(threads is None or threads <= 2**16, f"--threads-per-worker must be at most 65,536, got {threads}")
