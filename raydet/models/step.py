"""One optimizer step: micro-batches → one gradient, the same for any number of workers.

Loss terms are sums over the global batch divided by its normaliser, so that the gradient depends neither on the number
of ranks nor on the number of micro-batches per rank. Nothing here waits for the device, except the matching inside the
loss.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raydet.models.batch_norm import RunningStatistics
from raydet.models.collate import Batch
from raydet.models.detector import Detector
from raydet.models.losses.global_batch import Normaliser, compute_loss, local_normaliser
from raydet.models.losses.teachers import taught_weight
from raydet.models.optim.moving_average import MovingAverage


@dataclass(frozen=True)
class StepResult:
    """Result of the forward and backward passes of one optimizer step.

    Attributes:
        terms: Each loss term in units of the global batch, summed over this rank's micro-batches; the sum over ranks
            is the value of the global batch. Scalars on the device.
    """

    terms: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepSetting:
    """Device, precision and ranks of an optimizer step."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    world_size: int
    scaler: torch.amp.GradScaler | None = None
    """Prevents small gradients from vanishing in fp16; None for other precisions."""


def step_normaliser(detector: Detector, batches: Sequence[Batch]) -> Normaliser:
    """Count the divisors of this rank's micro-batches; the sum over ranks is the normaliser of the step."""
    batches = [batch for batch in batches if len(batch)]
    own = [replace(local_normaliser(detector, batch), taught_weight=taught_weight(batch)) for batch in batches]
    return sum(own, Normaliser(0.0, 0.0))


def compute_gradients(
    detector: Detector,
    module: nn.Module,
    batches: Sequence[Batch],
    setting: StepSetting,
    *,
    total: Normaliser | None = None,
) -> StepResult:
    """Run forward and backward over this rank's micro-batches; the parameters then hold the global gradient.

    Args:
        detector: The detector in training.
        module: Its model, or the DistributedDataParallel around it.
        batches: This rank's micro-batches, equally many on every rank. A micro-batch may have no image, if there are
            fewer images than ranks or none could be read.
        setting: Device, precision, ranks.
        total: Sum of `step_normaliser` over all ranks; by default that of this rank, which is right for a single one.
    """
    # The others wait for a rank without images, so it runs a black image of weight zero.
    weights = [1.0 if len(batch) else 0.0 for batch in batches]
    total = total or step_normaliser(detector, batches)
    batches = [batch if len(batch) else _black_image(batch) for batch in batches]
    if total.num_queries == 0:  # no rank has a readable image: any value but zero will do, as the weight is zero
        total = local_normaliser(detector, batches[0])
    terms: dict[str, Tensor] = {}
    for number, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
        is_last = number == len(batches) - 1
        with _synchronise(module, when=is_last):
            dtype = setting.autocast_dtype
            with torch.autocast(setting.device.type, dtype, enabled=dtype is not None):
                loss = compute_loss(
                    detector,
                    batch.to(setting.device),
                    module=module,
                    global_normaliser=total,
                    local=local_normaliser(detector, batch),
                    world_size=setting.world_size,
                )
            # A loss that is not finite makes the whole gradient so, on every rank, and none applies it.
            scaled = loss.total * (weight + 0.0 * loss.total.detach())
            (scaled if setting.scaler is None else setting.scaler.scale(scaled)).backward()
        weighted = torch._foreach_mul([value.float() for value in loss.terms.values()], weight)
        for name, value in zip(loss.terms, weighted, strict=True):
            terms[name] = terms[name] + value if name in terms else value
    return StepResult(terms)


def apply_gradients(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler | None = None,
    average: MovingAverage | None = None,
    statistics: RunningStatistics | None = None,
) -> Tensor:
    """Clip the gradient, take the optimizer's step, clear the gradient, and return the norm before clipping.

    A gradient that is not finite, which every rank then sees, changes neither the weights, nor the statistics of batch
    norms, nor the moving average. The device decides this, without the host. With a scaler, such a gradient also lowers
    the scale of the next loss.

    Args:
        module: The model in training.
        optimizer: A fused optimizer.
        max_grad_norm: Norm to which the gradient is clipped.
        scaler: Scaler of the loss, in fp16.
        average: Moving average to update.
        statistics: Statistics of the batch norms, saved before the forward pass.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    is_finite = torch.isfinite(norm)
    # The protocol between torch's gradient scaler and its fused optimizers.
    vars(optimizer).update(grad_scale=None, found_inf=(~is_finite).float())
    optimizer.step()
    vars(optimizer).update(grad_scale=None, found_inf=None)
    if scaler is not None:
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if statistics is not None:
        statistics.restore(unless=is_finite)
    if average is not None:
        average.update(where=is_finite)
    return norm


def _black_image(empty: Batch) -> Batch:
    """Return a batch of one black image without boxes, of the size of an empty batch."""
    height, width = empty.pixels.shape[-2:]
    label = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros((0, 4), dtype=torch.float32)}
    return Batch([-1], empty.pixels.new_zeros((1, 3, height, width)), [(height, width)], [(height, width)], [label])


def _synchronise(module: nn.Module, *, when: bool) -> contextlib.AbstractContextManager[None]:
    if isinstance(module, DistributedDataParallel) and not when:
        return module.no_sync()
    return contextlib.nullcontext()
