"""What jobs with a model on several workers have in common."""

from dataclasses import dataclass
from typing import Literal

from raydet.config.fields import option, require_positive

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """What jobs with a model on several workers have in common; none of it changes what comes out."""

    use_gpu: bool | None = option("one GPU per worker; by default, when the cluster has any", None, operational=True)
    cpus_per_worker: float | None = option(
        "CPUs reserved for each worker; by default half of the cluster's, shared out, the rest decodes",
        None,
        operational=True,
    )
    threads_per_worker: int | None = option("torch threads in a worker; its share of the cores", None, operational=True)

    def __post_init__(self) -> None:
        require_positive(self, "cpus_per_worker", "threads_per_worker")
