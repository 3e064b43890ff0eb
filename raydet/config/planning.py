"""`plan`: what a cluster would take for so many images."""

from dataclasses import dataclass
from typing import Literal

from raydet.config.fields import option, require, require_positive
from raydet.config.scoring import Engine
from raydet.config.training import Augmentation
from raydet.config.workers import Precision

PlannedJob = Literal["predict", "train"]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Say how long a cluster would take, what it would cost, and what would hold it up, from a short measurement."""

    images: int = option("images to score, or to train on in an epoch, such as 10_000_000")
    job: PlannedJob = option("what is to be done with them", "predict")
    epochs: int = option("with job train: passes over the images", 1)

    checkpoint: str | None = option("model folder, or a Hub name", None)
    model: str | None = option(
        "instead of checkpoint: what train would start from; speed does not depend on what a model has learned", None
    )
    image_size: int | None = option("with model: side in pixels that it sees, its own by default", None)
    data: str | None = option(
        "images to measure with, a few hundred of the real ones; an images table, or for predict also a folder, a list "
        "or tar files; generated pictures by default",
        None,
    )
    picture_size: int = option("side in pixels of the generated pictures", 640)
    engine: Engine = option("what runs the model in predict", "torch")
    precision: Precision = option("fp32, or bf16 or fp16 where the engine and the hardware have it", "fp32")
    batch_size: int | None = option("as of predict (16 by default) or of train (8, over all workers together)", None)
    augmentation: Augmentation = option("with job train", "light")
    use_gpu: bool | None = option("measure the model on this machine's GPU; by default, when it has one", None)

    cluster: str | None = option("Ray's cluster.yaml: as many nodes as its groups may have at most", None)
    cpu_nodes: int | None = option("nodes without a GPU; without any nodes the plan is for this machine", None)
    cpus_per_cpu_node: int | None = option("CPUs (vCPUs) of each of them", None)
    gpu_nodes: int | None = option("nodes with GPUs", None)
    gpus_per_gpu_node: int | None = option("GPUs of each of them, 1 by default", None)
    cpus_per_gpu_node: int | None = option("CPUs of each of them", None)
    price_per_cpu_node_hour: float | None = option("to say what it costs", None)
    price_per_gpu_node_hour: float | None = option("to say what it costs", None)
    num_workers: int | None = option("copies of the model; by default one on each GPU, or what fills the CPUs", None)
    threads_per_worker: int | None = option("threads of each of them on CPUs", None)
    network_gbit_per_s: float = option("with job train: between nodes, for the gradients", 10.0)

    seconds: float = option("that each of the measurements takes, start-up not counted", 20.0)
    probe: list[str] | None = option(
        "instead of measuring here: files of save_probe, of a CPU node, of a GPU node, or of one of each", None
    )
    save_probe: str | None = option("JSON file for what was measured, for another plan or on another machine", None)
    out: str | None = option("JSON file for the plan", None)

    def __post_init__(self) -> None:
        require_positive(self, "images", "epochs", "image_size", "batch_size", "cpu_nodes", "cpus_per_cpu_node")
        require_positive(self, "gpu_nodes", "gpus_per_gpu_node", "cpus_per_gpu_node", "num_workers")
        require_positive(self, "threads_per_worker", "network_gbit_per_s", "seconds", "price_per_cpu_node_hour")
        require_positive(self, "price_per_gpu_node_hour")
        require(self.picture_size >= 32, f"picture_size must be at least 32, got {self.picture_size}")
        require(self.epochs == 1 or self.job == "train", "epochs are train's, the job is predict")
        self._check_nodes()
        if self.probe:
            require(self.save_probe is None, "with --probe nothing is measured: there is nothing for --save-probe")
            return
        require(
            (self.checkpoint is None) != (self.model is None),
            "name either --checkpoint, a trained detector, or --model, what train would start from, or give --probe",
        )
        require(
            self.image_size is None or self.model is not None,
            "image_size goes with --model; a checkpoint sees images at its own size",
        )
        require(
            self.engine == "torch" or self.job == "predict", f"train runs on torch only, the engine is {self.engine}"
        )
        require(
            self.engine == "torch" or not self.use_gpu,
            f"engine {self.engine} runs on CPUs; leave use_gpu out, or choose engine torch",
        )

    @property
    def batch(self) -> int:
        """The batch size, the job's own default where none is given."""
        return self.batch_size or (16 if self.job == "predict" else 8)

    def _check_nodes(self) -> None:
        for kind in ("cpu", "gpu"):
            nodes, cpus = getattr(self, f"{kind}_nodes"), getattr(self, f"cpus_per_{kind}_node")
            require(nodes is None or cpus is not None, f"--{kind}-nodes needs --cpus-per-{kind}-node")
            # With a cluster.yaml it says what an instance type has that the file does not tell of.
            require(
                nodes is not None or cpus is None or self.cluster is not None,
                f"--cpus-per-{kind}-node needs --{kind}-nodes, or --cluster",
            )
        require(
            self.cluster is None or (self.cpu_nodes is None and self.gpu_nodes is None),
            "give either --cluster, or --cpu-nodes and --gpu-nodes",
        )
        require(self.gpus_per_gpu_node is None or self.gpu_nodes is not None, "--gpus-per-gpu-node needs --gpu-nodes")
        require(
            self.gpu_nodes is None or self.engine == "torch",
            f"engine {self.engine} runs on CPUs; leave gpu_nodes out, or choose engine torch",
        )
