"""A detector in training, with everything that changes from step to step. Imports no Ray."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from raydet.config import TrainConfig
from raydet.engines.torch_engine import TorchEngine
from raydet.models.backbone import backbone_parameter_names, freeze_backbone
from raydet.models.batch_norm import synchronise_batch_norms
from raydet.models.loading import build_detector
from raydet.models.optim.moving_average import MovingAverage
from raydet.models.optim.optimizer import build_optimizer
from raydet.models.optim.schedules import after_validation, build_schedule
from raydet.models.step import (
    AUTOCAST_DTYPES,
    StepResult,
    StepSetting,
    apply_gradients,
    compute_gradients,
    sum_over_ranks,
)
from raydet.tables.schema import Category
from raydet.training.history import EpochRecord
from raydet.training.meter import EpochMeter
from raydet.training.state import Position

if TYPE_CHECKING:
    from raydet.training.batches import ReadyBatch


@dataclass
class _LastBucket:
    """Time at which the last gradients were ready to be sent; the backward pass waits for other ranks from then on."""

    ready_at: float = 0.0


class Trainer:
    """One rank's model, optimizer and progress; `state_dict` holds all of it.

    Attributes:
        config: Of the run.
        rank: Of this worker.
        detector: The model that learns.
        position: The next step to take.
        history: The finished epochs.
        meter: Sums over the epoch so far.
        average: Of the weights; None where the config asks for none.
        optimizer: Its parameter groups have names.
        schedule: Sets the learning rates after each step.
    """

    def __init__(
        self,
        config: TrainConfig,
        categories: Sequence[Category],
        *,
        steps_per_epoch: int,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        """Builds the model and what trains it, at the first step of a run.

        Args:
            config: What to train.
            categories: The classes, by their indices.
            steps_per_epoch: For the schedule.
            device: Of this worker.
            rank: Of this worker, from 0.
            world_size: Number of workers; with more than one, their process group exists.

        Raises:
            UserError: The model cannot be built so.
        """
        self.config, self.rank = config, rank
        self._is_frozen = config.unfreeze_epoch is not None
        self.detector = build_detector(
            config.model,
            categories,
            image_size=config.image_size,
            seed=config.seed,
            batch_norm=config.batch_norm,
            freeze_backbone="none" if self._is_frozen else config.freeze_backbone,
            gradient_checkpointing=config.gradient_checkpointing,
        ).to(device)
        model = self.detector.model
        if config.batch_norm == "sync" and world_size > 1:
            synchronise_batch_norms(model, device)
        self._setting = StepSetting(
            device=device,
            autocast_dtype=AUTOCAST_DTYPES[config.precision],
            world_size=world_size,
            sum_over_ranks=sum_over_ranks,
            scaler=torch.amp.GradScaler(device.type) if config.precision == "fp16" else None,
        )
        self.optimizer = build_optimizer(model, config, backbone_parameter_names(model))
        self.schedule = build_schedule(self.optimizer, config, steps_per_epoch)
        self.average = MovingAverage(model, config.ema_decay) if config.ema_decay else None
        if self._is_frozen:  # after the optimizer was built, which must know everything that will ever learn
            freeze_backbone(model, config.freeze_backbone)
        if config.compile:
            model.compile()
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

    def begin_epoch(self) -> bool:
        """Puts the model into training mode; returns whether the backbone starts to learn now."""
        unfreezes = self._is_frozen and self.position.epoch + 1 >= (self.config.unfreeze_epoch or 0)
        if unfreezes:
            freeze_backbone(self.detector.model, "none")
            self._is_frozen = False
        if unfreezes or self._module is None:
            self._module = None  # lets go of an earlier one, with its hooks, before the next is made
            self._module = self._synchronised()
        self.detector.model.train()
        return unfreezes

    def _synchronised(self) -> nn.Module:
        """The model, such that the gradients of the parameters that learn now are those of all workers together."""
        model, device = self.detector.model, self.device
        if self.world_size == 1:
            return model
        module = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
        )
        module.register_comm_hook(self._last_bucket, _all_reduce)
        return module

    def compute_gradients(self, batches: "Sequence[ReadyBatch]") -> StepResult:
        """Runs forward and backward over this rank's micro-batches of the step at `position`."""
        assert self._module is not None, "an epoch must have begun"
        position = self.position
        # Dropout and denoising draw from (seed, epoch, step, rank), so that a resumed run repeats their draws.
        entropy = [self.config.seed, position.epoch, position.step, self.rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        examples, rule = [batch.examples for batch in batches], batches[0].resize_rule
        result = compute_gradients(self.detector, self._module, examples, self._setting, rule=rule)
        if self.world_size > 1:
            self.meter.communication_s += time.perf_counter() - self._last_bucket.ready_at
        self.meter.add_losses(result.terms)
        return result

    def apply_gradients(self) -> float:
        """Takes the optimizer's step and moves `position` on; returns the gradient's norm before clipping."""
        assert self._module is not None, "an epoch must have begun"
        norm = apply_gradients(
            self._module, self.optimizer, max_grad_norm=self.config.max_grad_norm, scaler=self._setting.scaler
        )
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.detector.model)
        value = norm.item()
        self.meter.gradient_norm += value if np.isfinite(value) else 0.0  # fp16 overflows once in a while
        self.meter.num_steps += 1
        self.position = Position(self.position.epoch, self.position.step + 1)
        return value

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """For the time of a `with`, the model is the one to validate and save: the average, if there is one."""
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
        """Makes the batch-norm statistics, which each rank gathers over its own images, the same on all ranks."""
        if self.world_size == 1:
            return
        for buffer in self.detector.model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world_size

    def engine(self) -> TorchEngine:
        """The engine that `predict` runs, around the model as it is now."""
        return TorchEngine(self.detector, precision=self.config.precision)

    def end_epoch(self, record: EpochRecord) -> None:
        """Enters a finished epoch into the history and moves `position` to the next."""
        self.history.append(record)
        after_validation(self.schedule, record.score(self.config.metric_for_best_model))
        self.position, self.meter = Position(self.position.epoch + 1, 0), EpochMeter()

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, as this rank has it; the tensors are the live ones."""
        buffers = {name: value for name, value in self.detector.model.named_buffers() if value.is_floating_point()}
        if self.average is not None:
            shadow = self.average.shadow
            buffers |= {f"average.{name}": shadow[name] for name in buffers if name in shadow}
        return {
            "position": self.position,
            "history": [record.to_json() for record in self.history],
            "meter": self.meter.to_state(),
            "model": self.detector.model.state_dict(),
            # One worker has them in the model already.
            "buffers": {name: value.detach().cpu() for name, value in buffers.items()} if self.world_size > 1 else {},
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state, of `state_dict` or of `TrainingState.of_rank`; a null `meter` starts anew."""
        self.position = state["position"]
        self.history = [EpochRecord.from_json(content) for content in state["history"]]
        self.detector.model.load_state_dict(state["model"])
        for name, part in self._parts().items():
            part.load_state_dict(state["parts"][name])
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


def _all_reduce(
    last_bucket: _LastBucket,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    if bucket.is_last():
        last_bucket.ready_at = time.perf_counter()
    return default_hooks.allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]
