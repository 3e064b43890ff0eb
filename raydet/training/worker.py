"""What a worker of a training run holds, how it comes up, and how it stands together with the others."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from raydet.cluster.worker_log import log_from_here
from raydet.common.errors import RunError
from raydet.common.threads import available_cpus
from raydet.config import TrainConfig
from raydet.models.backbone import backbone_parameter_names, freeze_backbone
from raydet.models.batch_norm import synchronise_batch_norms
from raydet.models.collate import Example
from raydet.models.detector import Detector
from raydet.models.loading import build_detector
from raydet.models.optim.moving_average import MovingAverage
from raydet.models.optim.optimizer import build_optimizer
from raydet.models.optim.schedules import build_schedule
from raydet.models.step import AUTOCAST_DTYPES, StepSetting, sum_over_ranks
from raydet.tables import storage
from raydet.tables.schema import Category
from raydet.training.meter import EpochMeter, merge_states
from raydet.training.ordering import Kind, MicroBatch, RunPlan
from raydet.training.state import Position, TrainingState, load_state, newest_state
from raydet.training.stream import ReadyImage
from raydet.training.tracking.trackers import RunTracker

Stream = Iterator[tuple[MicroBatch, list[ReadyImage]]]

_LOG = logging.getLogger(__name__)


@dataclass
class _LastBucket:
    """When the last of the gradients was ready to be sent; what the backward pass takes from then on is waiting."""

    ready_at: float = 0.0


@dataclass
class Worker:
    """What a worker holds while it trains.

    Attributes:
        position: The next step to take.
        meter: What has been added up in the epoch so far.
        cpu_group: Process group for plain objects and flags, whatever the device.
        tracker: Of rank 0; null on the others.
    """

    config: TrainConfig
    rank: int
    setting: StepSetting
    detector: Detector
    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    average: MovingAverage | None
    cpu_group: Any
    board: Any
    history: list[dict[str, Any]] = field(default_factory=list)
    position: Position = Position(0, 0)
    meter: EpochMeter = field(default_factory=EpochMeter)
    tracker: RunTracker | None = None
    last_bucket: _LastBucket = field(default_factory=_LastBucket)
    is_frozen: bool = False

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return self.setting.world_size

    def say(self, line: str) -> None:
        """Shows a line to the user; rank 0 speaks for all."""
        if self.rank == 0:
            self.board.pin.remote({"note": line})

    def fail(self, message: str, cause: BaseException | None = None) -> NoReturn:
        """Ends the run, on all workers and for good, with a line for the user.

        Raises:
            RunError: Always.
        """
        ray.get(self.board.report_failure.remote(message))
        raise RunError(message) from cause

    def gather(self, value: Any) -> list[Any] | None:
        """Every worker's value on rank 0, in the order of ranks; null on the others."""
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self.cpu_group)
        return gathered

    def share(self, value: Any) -> Any:
        """Rank 0's value on all workers."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.cpu_group)
        return values[0]


def start_worker(config: TrainConfig, categories: tuple[Category, ...], plan: RunPlan, board: Any) -> Worker:
    """Builds the model and all that goes with it, as new or as the newest state has it."""
    context = ray.train.get_context()
    log_from_here(storage.join(config.out, "log"), rank=context.get_world_rank())
    device = get_device()
    world_size = context.get_world_size()
    torch.set_num_threads(config.threads_per_worker or max(1, available_cpus() // context.get_local_world_size()))
    unfreezes = config.unfreeze_epoch is not None
    detector = build_detector(
        config.model,
        categories,
        image_size=config.image_size,
        seed=config.seed,
        batch_norm=config.batch_norm,
        freeze_backbone="none" if unfreezes else config.freeze_backbone,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    detector.to(device)
    if config.batch_norm == "sync" and world_size > 1:
        synchronise_batch_norms(detector.model, device)
    optimizer = build_optimizer(detector.model, config, backbone_parameter_names(detector.model))
    worker = Worker(
        config=config,
        rank=context.get_world_rank(),
        setting=StepSetting(
            device=device,
            autocast_dtype=AUTOCAST_DTYPES[config.precision],
            world_size=world_size,
            sum_over_ranks=sum_over_ranks,
            scaler=torch.amp.GradScaler(device.type) if config.precision == "fp16" else None,
        ),
        detector=detector,
        module=detector.model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config, plan.steps_per_epoch),
        average=MovingAverage(detector.model, config.ema_decay) if config.ema_decay else None,
        cpu_group=dist.new_group(backend="gloo"),
        board=board,
        is_frozen=unfreezes,
    )
    if unfreezes:  # after the optimizer was built, which is to know of all that will ever learn
        freeze_backbone(detector.model, config.freeze_backbone)
    if config.compile:
        detector.model.compile()
    _restore(worker)
    wrap(worker)
    position = worker.position
    text = "one of %d workers, on %s with %d threads, goes on after step %d of epoch %d"
    _LOG.info(text, world_size, device, torch.get_num_threads(), position.step, position.epoch + 1)
    return worker


def wrap(worker: Worker) -> None:
    """Makes the gradients of the parameters that learn now those of all workers together."""
    if worker.world_size == 1:
        return
    device = worker.setting.device
    worker.module = worker.detector.model  # lets go of an earlier one, with its hooks, before the next is made
    module = DistributedDataParallel(
        worker.detector.model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
    )
    module.register_comm_hook(worker.last_bucket, _all_reduce)
    worker.module = module


def _all_reduce(
    last_bucket: _LastBucket,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    if bucket.is_last():
        last_bucket.ready_at = time.perf_counter()
    return default_hooks.allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


def next_images(stream: Stream, kind: Kind, epoch: int, step: int, part: int, rank: int) -> list[ReadyImage]:
    """Takes the next micro-batch and makes sure that it is the one the plan says."""
    got, images = next(stream)
    assert got == MicroBatch(kind, epoch, step, part, rank, ()), f"the stream is out of step: got {got}"
    return images


def examples_of(images: list[ReadyImage]) -> list[Example]:
    """Those that can be read, for the model."""
    return [
        Example(image.image_id, image.image, image.original_size_hw, image.boxes_cxcywh, image.categories)
        for image in images
        if image.image is not None
    ]


@contextlib.contextmanager
def averaged(worker: Worker) -> Iterator[None]:
    """For the time of a `with`, the model is the one to be validated and saved."""
    model = worker.detector.model
    if worker.average is None:
        _average_statistics(worker)
        yield
        return
    own_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(worker.average.shadow)
    _average_statistics(worker)
    try:
        yield
    finally:
        model.load_state_dict(own_weights)


def _average_statistics(worker: Worker) -> None:
    """Makes the batch-norm statistics, which each rank gathers over its own images, the same on all ranks."""
    if worker.world_size == 1:
        return
    for buffer in worker.detector.model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= worker.world_size


def capture(worker: Worker) -> TrainingState | None:
    """All that the run needs to go on, on rank 0; null on the others, who must take part."""
    model, average = worker.detector.model, worker.average
    buffers = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
    if average is not None:
        buffers |= {f"average.{name}": average.shadow[name] for name in buffers if name in average.shadow}
    # On one worker they are in the model already.
    own = {name: value.detach().cpu() for name, value in buffers.items()} if worker.world_size > 1 else {}
    gathered = worker.gather((worker.meter.to_state(), own))
    if gathered is None:
        return None
    return TrainingState(
        position=worker.position,
        history=worker.history,
        meters=[meter for meter, _ in gathered] if worker.position.step else [],
        model=model.state_dict(),
        buffers=[buffers for _, buffers in gathered],
        parts={name: part.state_dict() for name, part in _parts(worker).items()},
    )


def _restore(worker: Worker) -> None:
    """Goes on from the newest state, if there is one; rank 0 says which, so that it is the same for all."""
    out, device = worker.config.out, worker.setting.device
    name = broadcast_from_rank_zero(newest_state(out) if worker.rank == 0 else None)
    if name is None:
        return
    state = load_state(out, name, device)
    worker.position, worker.history = state.position, state.history
    worker.detector.model.load_state_dict(state.model)
    for part_name, part in _parts(worker).items():
        part.load_state_dict(state.parts[part_name])
    as_many = len(state.buffers) == worker.world_size
    if as_many:
        _load_buffers(worker, state.buffers[worker.rank])
    else:
        names = state.buffers[0]
        _load_buffers(worker, {key: torch.stack([each[key] for each in state.buffers]).mean(0) for key in names})
    if state.meters and as_many:
        worker.meter = EpochMeter.from_state(state.meters[worker.rank], device)
    elif state.meters and worker.rank == 0:
        worker.meter = EpochMeter.from_state(merge_states(state.meters), device)


def _parts(worker: Worker) -> dict[str, Any]:
    parts = {
        "optimizer": worker.optimizer,
        "schedule": worker.schedule,
        "scaler": worker.setting.scaler,
        "average": worker.average,
    }
    return {name: part for name, part in parts.items() if part is not None}


def _load_buffers(worker: Worker, buffers: dict[str, Tensor]) -> None:
    own = dict(worker.detector.model.named_buffers())
    for name, value in buffers.items():
        if not name.startswith("average."):
            own[name].copy_(value)
        elif worker.average is not None:
            worker.average.shadow[name.removeprefix("average.")].copy_(value)
