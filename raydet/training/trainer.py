"""A detector in training, with all state that changes from step to step. This module does not import Ray."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from raydet.config import ResolvedTrainConfig
from raydet.engines.torch_engine import TorchEngine
from raydet.models.backbone import backbone_parameter_names, freeze_backbone
from raydet.models.batch_norm import RunningStatistics, synchronise_batch_norms
from raydet.models.detector import AUTOCAST_DTYPES
from raydet.models.loading import build_detector
from raydet.models.optim.moving_average import MovingAverage
from raydet.models.optim.optimizer import build_optimizer
from raydet.models.optim.schedules import after_validation, build_schedule, set_peaks
from raydet.models.step import StepSetting, apply_gradients, compute_gradients, step_normaliser
from raydet.tables.schema import Category
from raydet.training.history import EpochRecord
from raydet.training.in_flight import DeviceCopy, PendingSum, StepInputs, StepOutcome
from raydet.training.meter import EpochMeter
from raydet.training.recovery.overrides import Override, changed_rate, settings_at
from raydet.training.state import Position

if TYPE_CHECKING:
    from raydet.training.feeding.batches import ReadyBatch


@dataclass
class _LastBucket:
    """Time at which the last gradients were ready to send, after which the backward pass waits for other ranks."""

    ready_at: float = 0.0


class Trainer:
    """One rank's model, optimizer and progress; `state_dict` holds all of it.

    Attributes:
        config: Configuration with which the run began.
        settings: Configuration that holds for the next step: overrides may have changed it since.
        rank: Rank of this worker.
        detector: The model in training.
        position: The next step.
        history: Records of the finished epochs.
        meter: Sums over the epoch so far.
        average: Moving average of the weights; None if the config does not request one.
        optimizer: Optimizer with named parameter groups.
        schedule: Learning-rate schedule, advanced after each step.
    """

    def __init__(
        self,
        config: ResolvedTrainConfig,
        categories: Sequence[Category],
        *,
        steps_per_epoch: int,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        """Build the model, the optimizer and the schedule, positioned at the first step of a run.

        Args:
            config: Configuration of the run.
            categories: The classes in the order of their indices.
            steps_per_epoch: Optimizer steps per epoch, for the schedule.
            device: Device of this worker.
            rank: Rank of this worker, from 0.
            world_size: Number of workers; if above one, their process group must exist.

        Raises:
            UserError: The model cannot be built with this config.
        """
        self.config, self.settings, self.rank = config, config, rank
        self._overrides: tuple[Override, ...] = ()
        self._is_frozen = config.unfreeze_epoch is not None
        self.detector = build_detector(
            config.model,
            categories,
            image_size=config.image_size,
            seed=config.seed,
            class_mapping=config.class_mapping,
            batch_norm=config.batch_norm,
            freeze_backbone="none" if self._is_frozen else config.freeze_backbone,
            gradient_checkpointing=config.gradient_checkpointing,
            lora=config.lora,
        ).to(device)
        model = self.detector.model
        if device.type == "cuda":  # the layout of the fast convolutions
            nn.Module.to(model, memory_format=torch.channels_last)
        if config.batch_norm == "sync" and world_size > 1:
            synchronise_batch_norms(model, device)
        self._setting = StepSetting(
            device=device,
            autocast_dtype=AUTOCAST_DTYPES[config.precision],
            world_size=world_size,
            scaler=torch.amp.GradScaler(device.type) if config.precision == "fp16" else None,
        )
        self.optimizer = build_optimizer(model, config, backbone_parameter_names(model))
        self.schedule = build_schedule(self.optimizer, config, steps_per_epoch)
        self._peaks = [float(rate) for rate in self.schedule.base_lrs]
        self.average: MovingAverage | None = None
        if config.ema_decay:
            self.average = MovingAverage(model, config.ema_decay, rise_steps=config.ema_rise_steps)
        self._statistics = RunningStatistics(model)
        if self._is_frozen:  # after the optimizer, which must hold every parameter that will be trained later
            freeze_backbone(model, config.freeze_backbone)
        if config.compile:
            self.detector.compile(num_sizes=len(config.multi_scale) + 1)
        self._copy = DeviceCopy(device)
        # A separate CPU group, whose sums run concurrently with the collectives of a step.
        self._group: Any = dist.new_group(backend="gloo") if world_size > 1 else None
        self.position, self.meter = Position(0, 0), EpochMeter()
        self.history: list[EpochRecord] = []
        self._module: nn.Module | None = None
        self._last_bucket = _LastBucket()

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._setting.device

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return self._setting.world_size

    def follow(self, overrides: Sequence[Override]) -> None:
        """Apply overrides, each from its step on; call it before `load_state_dict`."""
        self._overrides = tuple(overrides)
        self._use_settings()

    def _use_settings(self) -> None:
        """Apply the settings that hold for the next step."""
        if not self._overrides:
            return
        old, position = self.settings, self.position
        new = self.settings = settings_at(self.config, self._overrides, position.epoch, position.step)
        if new.precision != old.precision:
            self._setting = replace(
                self._setting,
                autocast_dtype=AUTOCAST_DTYPES[new.precision],
                scaler=torch.amp.GradScaler(self.device.type) if new.precision == "fp16" else None,
            )
        groups = zip(self.optimizer.param_groups, self._peaks, strict=True)
        peaks = [changed_rate(peak, group["name"], self.config, new) for group, peak in groups]
        if peaks != self.schedule.base_lrs:
            set_peaks(self.schedule, peaks)

    def begin_epoch(self) -> bool:
        """Put the model into training mode; return True if the backbone is unfrozen in this epoch."""
        unfreezes = self._is_frozen and self.position.epoch + 1 >= (self.config.unfreeze_epoch or 0)
        if unfreezes:
            freeze_backbone(self.detector.model, "none")
            self._is_frozen = False
        if unfreezes or self._module is None:
            self._module = None  # releases the earlier module with its hooks before the next one is built
            self._module = self._synchronised()
        self.detector.model.train()
        return unfreezes

    def _synchronised(self) -> nn.Module:
        """Wrap the model so that the gradients of its trainable parameters are averaged over all workers."""
        model, device = self.detector.model, self.device
        if self.world_size == 1:
            return model
        module = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        module.register_comm_hook(self._last_bucket, _all_reduce)
        return module

    def prepare(self, batches: "Sequence[ReadyBatch]", *, others: Sequence[float] = ()) -> StepInputs:
        """Start copying this rank's micro-batches of a step to the device, and summing their counts over the ranks.

        Collective: every rank must call it for the same steps in the same order. It does not block; call it while the
        device computes the previous step.

        Args:
            batches: The micro-batches.
            others: Other numbers to sum over the ranks.
        """
        collated = [batch.batch for batch in batches]
        counts = step_normaliser(self.detector, collated).to_tensor().tolist()
        return StepInputs(
            batches=self._copy.start(collated),
            image_ids=[image_id for batch in batches for image_id in batch.image_ids],
            sums=PendingSum([*counts, *others], self._group),
        )

    def step(self, inputs: StepInputs) -> StepOutcome:
        """Take the optimizer step at `position` and advance `position`, without waiting for the device.

        If the gradient is not finite, the step changes neither the weights, nor the statistics of batch norms, nor the
        moving average.
        """
        assert self._module is not None, "an epoch must have begun"
        self._statistics.save()
        position = self.position
        with self.meter.communicating():
            normaliser = inputs.normaliser
        # Dropout and denoising are seeded by (seed, epoch, step, rank), so that a resumed run repeats their draws.
        entropy = [self.config.seed, position.epoch, position.step, self.rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        with _fast_matrix_products(self.device):
            result = compute_gradients(
                self.detector, self._module, inputs.batches.use(), self._setting, total=normaliser
            )
        if self.world_size > 1:
            self.meter.communication_s += time.perf_counter() - self._last_bucket.ready_at
        learning_rates = {f"learning_rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        norm = apply_gradients(
            self._module,
            self.optimizer,
            max_grad_norm=self.settings.max_grad_norm,
            scaler=self._setting.scaler,
            average=self.average,
            statistics=self._statistics,
        )
        self.meter.add_losses(result.terms, unless_skipped=torch.isfinite(norm))
        self.schedule.step()
        self.meter.num_steps += 1
        self.position = Position(position.epoch, position.step + 1)
        scale = None if self._setting.scaler is None else self._setting.scaler._scale
        outcome = StepOutcome(position, inputs.image_ids, learning_rates, result.terms, norm, scale)
        self._use_settings()
        return outcome

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context manager: while the block runs, the model holds the state to validate and save. Collective.

        This is the moving average, if there is one, and always with batch-norm statistics averaged over all ranks.
        """
        model = self.detector.model
        if self.average is None:
            self._average_statistics()
            yield
            return
        own_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.average.shadow)
        self._average_statistics()
        try:
            yield
        finally:
            model.load_state_dict(own_weights)

    def _average_statistics(self) -> None:
        """Average the batch-norm statistics, which each rank gathers over its own images, over all ranks."""
        if self.world_size == 1:
            return
        for buffer in self.detector.model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world_size

    def engine(self) -> TorchEngine:
        """Wrap the current model in the engine that `predict` uses."""
        return TorchEngine(self.detector, precision=self.settings.precision)

    def end_epoch(self, record: EpochRecord) -> None:
        """Add a finished epoch to the history and move `position` to the next epoch."""
        self.history.append(record)
        after_validation(self.schedule, record.score(self.config.metric_for_best_model))
        self.position, self.meter = Position(self.position.epoch + 1, 0), EpochMeter()
        self._use_settings()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state for resuming. The tensors are not copied."""
        buffers = {name: value for name, value in self.detector.model.named_buffers() if value.is_floating_point()}
        if self.average is not None:
            shadow = self.average.shadow
            buffers |= {f"average.{name}": shadow[name] for name in buffers if name in shadow}
        return {
            "position": self.position,
            "history": [record.to_json() for record in self.history],
            "meter": self.meter.to_state(),
            "model": self.detector.model.state_dict(),
            # A single worker already has them in the model.
            "buffers": {name: value.detach().cpu() for name, value in buffers.items()} if self.world_size > 1 else {},
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state from `state_dict` or `TrainingState.of_rank`; a `meter` of None starts from zero."""
        self.position = state["position"]
        self._use_settings()  # the precision decides whether there is a scaler
        self.history = [EpochRecord.from_json(content) for content in state["history"]]
        self.detector.model.load_state_dict(state["model"])
        for name, part in self._parts().items():
            if name in state["parts"]:  # a state from before an override to fp16 has no scaler
                part.load_state_dict(state["parts"][name])
        self._use_settings()  # an override may begin with the next step, and the state has the rates before it
        own = dict(self.detector.model.named_buffers())
        for name, value in state["buffers"].items():
            if not name.startswith("average."):
                own[name].copy_(value)
            elif self.average is not None:
                self.average.shadow[name.removeprefix("average.")].copy_(value)
        meter = state["meter"]
        self.meter = EpochMeter() if meter is None else EpochMeter.from_state(meter, self.device)

    def _parts(self) -> dict[str, Any]:
        parts = {
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self._setting.scaler,
            "average": self.average,
        }
        return {name: part for name, part in parts.items() if part is not None}


@contextlib.contextmanager
def _fast_matrix_products(device: torch.device) -> Iterator[None]:
    """Context manager: allow TensorFloat-32 on a GPU while the block runs; validation stays in full precision."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _all_reduce(
    last_bucket: _LastBucket,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    if bucket.is_last():
        last_bucket.ready_at = time.perf_counter()
    return default_hooks.allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]
