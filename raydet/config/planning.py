"""`plan` and `doctor`: time and cost of a job on a cluster; the state of this installation."""

from raydet.config.fields import config, option, require_positive


@config
class PlanConfig:
    """A measured run of predict or train → time, cost and bottleneck of a larger run; starts nothing."""

    run: str = option("output folder of the measured run, such as one of `raydet predict --limit 2000`")
    images: int = option("images to score, or to train on per epoch, such as 10_000_000")
    epochs: int | None = option("for training: passes over the images; by default those of the measured run", None)
    cluster: str | None = option(
        "Ray's cluster.yaml, each node type at its maximum number of nodes; by default the cluster of the measured run",
        None,
    )
    num_workers: int | None = option(
        "copies of the model; by default one per GPU, or on CPUs as many per CPU as in the measured run", None
    )
    price: list[str] | None = option(
        'price per hour of a node: one number for all nodes, or one per node type, such as "decode=0.71,model=0.98"',
        None,
    )

    def __post_init__(self) -> None:
        require_positive(self, "images", "epochs", "num_workers")


@config
class DoctorConfig:
    """Check this installation: packages, devices, Ray, memory, disks, the Hub; starts no Ray and changes nothing."""

    ray_address: str | None = option("Ray cluster to ask for its resources; by default RAY_ADDRESS, if set", None)
    timeout_s: float = option("time limit of each check in seconds; they run at the same time", 60.0)

    def __post_init__(self) -> None:
        require_positive(self, "timeout_s")
