"""`plan`: time and cost of a job on a cluster."""

from dataclasses import dataclass
from typing import Literal

from raydet.config.fields import option, require, require_positive
from raydet.config.scoring import Engine
from raydet.config.training import Augmentation
from raydet.config.workers import Precision

PlannedJob = Literal["predict", "train"]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A short measurement on this machine → time, cost and bottleneck of a job on a cluster."""

    images: int = option("images to score, or to train on per epoch, such as 10_000_000")
    job: PlannedJob = option("job to plan", "predict")
    epochs: int = option("with --job train: passes over the images", 1)
    checkpoint: str | None = option("model folder, or a Hub name; required without --model or --probe", None)
    model: str | None = option(
        "instead of --checkpoint: the model that train would start from; the speed does not depend on the weights", None
    )
    data: str | None = option(
        "images to measure with, a few hundred of the real ones: an images table, and for predict also a folder, a "
        "list or tar files; by default generated images",
        None,
    )

    image_size: int | None = option(
        "with --model: input side in pixels; by default the model's own", None, group="Model"
    )
    engine: Engine = option("engine that runs the model in predict", "torch", group="Model")
    precision: Precision = option("fp32; bf16 or fp16 if engine and hardware support it", "fp32", group="Model")
    batch_size: int | None = option(
        "images per batch; by default 16 for predict, and 8 over all workers together for train", None, group="Model"
    )
    augmentation: Augmentation = option("with --job train: augmentation of train", "light", group="Model")

    cluster: str | None = option(
        "Ray's cluster.yaml; the plan counts each node group at its maximum size", None, group="Compute and cluster"
    )
    cpu_nodes: int | None = option(
        "nodes without a GPU; without any nodes the plan is for this machine", None, group="Compute and cluster"
    )
    cpus_per_cpu_node: int | None = option("CPUs (vCPUs) of each CPU node", None, group="Compute and cluster")
    gpu_nodes: int | None = option("nodes with GPUs", None, group="Compute and cluster")
    gpus_per_gpu_node: int | None = option("GPUs of each GPU node; by default 1", None, group="Compute and cluster")
    cpus_per_gpu_node: int | None = option("CPUs (vCPUs) of each GPU node", None, group="Compute and cluster")
    price_per_cpu_node_hour: float | None = option(
        "price of a CPU node, to estimate the cost", None, group="Compute and cluster"
    )
    price_per_gpu_node_hour: float | None = option(
        "price of a GPU node, to estimate the cost", None, group="Compute and cluster"
    )
    num_workers: int | None = option(
        "copies of the model; by default one per GPU, or as many as fill the CPUs", None, group="Compute and cluster"
    )
    threads_per_worker: int | None = option("CPU threads of each worker", None, group="Compute and cluster")
    network_gbit_per_s: float = option(
        "with --job train: bandwidth between nodes, for the gradients", 10.0, group="Compute and cluster"
    )

    use_gpu: bool | None = option(
        "measure the model on this machine's GPU; on by default if it has one", None, group="Measurement"
    )
    generated_size: int = option("side in pixels of the generated images", 640, group="Measurement")
    seconds: float = option("length of each measurement, without start-up", 20.0, group="Measurement")
    probe: list[str] | None = option(
        "instead of measuring: files written by --save-probe, from a CPU node, a GPU node, or one of each",
        None,
        group="Measurement",
    )
    save_probe: str | None = option(
        "JSON file to write the measurement to, for another plan or another machine", None, group="Measurement"
    )

    out: str | None = option("JSON file to write the plan to", None, group="Output")

    def __post_init__(self) -> None:
        require_positive(self, "images", "epochs", "image_size", "batch_size", "cpu_nodes", "cpus_per_cpu_node")
        require_positive(self, "gpu_nodes", "gpus_per_gpu_node", "cpus_per_gpu_node", "num_workers")
        require_positive(self, "threads_per_worker", "network_gbit_per_s", "seconds", "price_per_cpu_node_hour")
        require_positive(self, "price_per_gpu_node_hour")
        require(self.generated_size >= 32, f"--generated-size must be at least 32, got {self.generated_size}")
        require(self.epochs == 1 or self.job == "train", "--epochs needs --job train")
        self._check_nodes()
        if self.probe:
            require(self.save_probe is None, "--save-probe needs a measurement: omit --probe")
            return
        require(
            (self.checkpoint is None) != (self.model is None),
            "set one of --checkpoint (a trained detector), --model (the model that train would start from) or --probe",
        )
        require(
            self.image_size is None or self.model is not None,
            "--image-size needs --model; a checkpoint has its own image size",
        )
        require(self.engine == "torch" or self.job == "predict", f"--job train needs --engine torch, got {self.engine}")
        require(
            self.engine == "torch" or not self.use_gpu,
            f"--engine {self.engine} runs on CPUs: omit --use-gpu, or choose --engine torch",
        )

    @property
    def batch(self) -> int:
        """The batch size; by default that of the job."""
        return self.batch_size or (16 if self.job == "predict" else 8)

    def _check_nodes(self) -> None:
        for kind in ("cpu", "gpu"):
            nodes, cpus = getattr(self, f"{kind}_nodes"), getattr(self, f"cpus_per_{kind}_node")
            require(nodes is None or cpus is not None, f"--{kind}-nodes needs --cpus-per-{kind}-node")
            # With --cluster the number is that of an instance type whose CPUs cluster.yaml does not state.
            require(
                nodes is not None or cpus is None or self.cluster is not None,
                f"--cpus-per-{kind}-node needs --{kind}-nodes, or --cluster",
            )
        require(
            self.cluster is None or (self.cpu_nodes is None and self.gpu_nodes is None),
            "set either --cluster, or --cpu-nodes and --gpu-nodes",
        )
        require(self.gpus_per_gpu_node is None or self.gpu_nodes is not None, "--gpus-per-gpu-node needs --gpu-nodes")
        require(
            self.gpu_nodes is None or self.engine == "torch",
            f"--engine {self.engine} runs on CPUs: omit --gpu-nodes, or choose --engine torch",
        )
