"""A scoring run on a Ray cluster, as the driver sees it: shares, checks of the nodes, and attempts."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import ray

from raydet.cluster import session, shares
from raydet.cluster.caller import LOG_FILE
from raydet.cluster.job_record import JobRecord
from raydet.cluster.ray_internals import RpcError
from raydet.cluster.shared_storage import check_shared
from raydet.cluster.tasks import has_gpu, run_tasks
from raydet.common.console import Console
from raydet.config import PredictConfig
from raydet.engines.engine import can_use_gpu, no_fp16_on_cpu
from raydet.engines.loading import EngineLoader
from raydet.images.listing import is_pattern
from raydet.models.checkpoints import ADAPTER_CONFIG
from raydet.scoring.plan import LOG_FOLDER, ChunkStats, Work
from raydet.scoring.recovery import Losses
from raydet.scoring.stream import score, threads_of
from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.table import is_table


class RayLosses(Losses):
    """Losses on a Ray cluster, including the lost nodes, processes and objects that Ray reports."""

    no_memory = (MemoryError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectStoreFullError)
    _kinds = (
        ray.exceptions.NodeDiedError,
        ray.exceptions.ObjectLostError,
        ray.exceptions.RayActorError,
        ray.exceptions.RaySystemError,
        RpcError,
        ray.exceptions.WorkerCrashedError,
    )

    def is_loss(self, chain: Sequence[BaseException]) -> bool:
        """See `Losses.is_loss`."""
        if super().is_loss(chain):
            return True
        is_defect = any(getattr(cause, "actor_init_failed", False) for cause in chain)
        return not is_defect and any(isinstance(cause, self._kinds) for cause in chain)

    def causes(self, error: BaseException) -> list[BaseException]:
        """List an error and its causes, outermost first, without Ray's wrappers around errors of its workers."""
        chain: list[BaseException] = []
        following: BaseException | None = error
        while following is not None and following not in chain:
            if not isinstance(following, ray.exceptions.RayTaskError) or following.cause is None:
                chain.append(following)
            # If an actor could not be created, the error of its constructor is the first argument.
            inner = [item for item in following.args if isinstance(item, BaseException)]
            following = getattr(following, "cause", None) or following.__cause__ or next(iter(inner), None)
        return chain or [error]


class Cluster:
    """The connected cluster as the place of a scoring run.

    Attributes:
        losses: Errors after which another attempt follows.
    """

    losses = RayLosses()

    def __init__(self, config: PredictConfig, resources: shares.Resources) -> None:
        self._resources = resources
        self._wanted = self._num_workers = config.num_workers

    def attempt(self, work: Work, chunks: Sequence[int]) -> Iterator[ChunkStats]:
        """Score chunks and yield the statistics of each file once it is written, in any order."""
        return score(work, chunks, self._resources, num_workers=self._num_workers)

    def apply(self, write: Callable[[int], ChunkStats], chunks: Sequence[int]) -> Iterator[ChunkStats]:
        """Write chunks with a function that needs no model, and yield the statistics of each file, in any order."""
        return run_tasks(write, chunks, in_order=False)

    def prepare_again(self, reason: str) -> str:
        """Reduce the number of workers to those that fit after a loss, and return a line for the terminal."""
        # An autoscaling cluster may have room again later; any other continues with the workers that fit.
        self._num_workers = min(self._wanted, shares.workers_that_fit(self._resources)) or self._wanted
        return f"the cluster lost workers or nodes ({reason}); continuing with {self._num_workers} workers"

    def best_batch_size(self, config: PredictConfig, load: EngineLoader) -> int:
        """Measure the fastest batch size on a worker."""
        resources = self._resources
        probe = ray.remote(_probe).options(num_cpus=resources.cpus_per_worker, num_gpus=int(resources.use_gpu))
        found: int = ray.get(probe.remote(config, resources, load))
        return found

    def job_record(self) -> JobRecord:
        """Build the record of the job."""
        return JobRecord.of_this_job(num_workers=self._wanted, resources=self._resources)

    def with_joined_nodes(self, record: JobRecord) -> JobRecord:
        """Return the record at the end of the job, with the nodes that have joined since its start."""
        return record.with_joined_nodes()


@contextlib.contextmanager
def connected(config: PredictConfig, console: Console) -> Iterator[Cluster]:
    """Context manager: connect to the cluster, or start one, and check it for a run."""
    log_folder = storage.join(config.out, LOG_FOLDER)
    with session.session(log_folder):
        resources = shares.share_out(
            min_workers=config.num_workers,
            max_workers=config.num_workers,
            # An engine that runs on CPUs would leave a reserved GPU idle.
            use_gpu=config.use_gpu if can_use_gpu(config.engine) else False,
            cpus_per_worker=config.cpus_per_worker,
        )
        log = storage.join(log_folder, LOG_FILE)
        console.line(f"{resources.describe(config.num_workers, config.num_workers)}. Ray log: {log}")
        if resources.notice:
            console.line(resources.notice)
        if resources.use_gpu is False and config.precision == "fp16":
            raise no_fp16_on_cpu(config.engine)
        _check_nodes(config)
        yield Cluster(config, resources)


def _check_nodes(config: PredictConfig) -> None:
    """Check that every node sees the images, the checkpoint and the output."""
    reads = shared_inputs(config.data_uri, {"--checkpoint": config.checkpoint, "--model": config.model})
    for number, uri in enumerate(config.adapters, start=1):
        reads[f"--adapter ({number})"] = (uri, storage.join(uri, ADAPTER_CONFIG))
    check_shared(reads=reads, writes=(config.out, storage.join(config.out, LOG_FOLDER)))


def shared_inputs(data_uri: str, models: Mapping[str, str | None]) -> dict[str, tuple[str, str]]:
    """Return what all nodes must see of a collection of images and of models by option, as `check_shared` takes it."""
    reads = {}
    if is_table(data_uri):
        reads["--data"] = (data_uri, storage.join(data_uri, MANIFEST_NAME))
    elif not is_pattern(data_uri):
        reads["--data"] = (data_uri, data_uri)
    for option, name in models.items():
        if name is not None and storage.exists(storage.join(name, "config.json")):  # otherwise a Hub name
            reads[option] = (name, storage.join(name, "config.json"))
    return reads


def _probe(config: PredictConfig, resources: shares.Resources, load: EngineLoader) -> int:
    from raydet.engines.batch_size import best_batch_size

    engine = load(config, device="cuda" if has_gpu() else "cpu", num_threads=threads_of(config, resources))
    return best_batch_size(engine)
