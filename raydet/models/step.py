"""One optimizer step: micro-batches → one gradient, the same for any number of workers.

Loss terms are sums over the global batch divided by its normaliser, so that the gradient depends neither on the number
of ranks nor on the number of micro-batches per rank.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raydet.models.collate import Example, collate
from raydet.models.detector import Detector
from raydet.models.geometry import ResizeRule
from raydet.models.losses.global_batch import Normaliser, compute_loss, local_normaliser

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""dtype of autocast by precision; None for no autocast."""

SumOverRanks = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks; the identity for a single rank."""


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step.

    Attributes:
        terms: Each loss term in units of the global batch, summed over this rank's micro-batches; the sum over ranks
            is the value of the global batch. Scalars on the device.
        normaliser: Normaliser of the global batch.
    """

    terms: dict[str, Tensor]
    normaliser: Normaliser


@dataclass(frozen=True, kw_only=True)
class StepSetting:
    """Device, precision and ranks of an optimizer step."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    world_size: int
    sum_over_ranks: SumOverRanks
    scaler: torch.amp.GradScaler | None = None
    """Prevents small gradients from vanishing in fp16; None for other precisions."""


def compute_gradients(
    detector: Detector,
    module: nn.Module,
    examples: Sequence[Sequence[Example]],
    setting: StepSetting,
    *,
    rule: ResizeRule | None = None,
) -> StepResult:
    """Run forward and backward over this rank's micro-batches; the parameters then hold the global gradient.

    Args:
        detector: The detector in training.
        module: Its model, or the DistributedDataParallel around it.
        examples: This rank's micro-batches, equally many on every rank. A micro-batch may be empty, if there are fewer
            images than ranks or none could be read.
        setting: Device, precision, ranks.
        rule: Resize rule of the images; the detector's own by default.
    """
    # The others wait for a rank without images, so it runs a black image of weight zero.
    weights = [1.0 if micro_batch else 0.0 for micro_batch in examples]
    rule = rule or detector.resize_rule
    batches = [
        collate(micro_batch or [_blank(rule.target_size_hw((64, 64)))], pad_to_hw=rule.pad_to_hw)
        for micro_batch in examples
    ]
    normalisers = [local_normaliser(detector, batch) for batch in batches]
    total = Normaliser(0.0, 0.0)
    for normaliser, weight in zip(normalisers, weights, strict=True):
        if weight:
            total += normaliser
    total = Normaliser.from_tensor(setting.sum_over_ranks(total.to_tensor().to(setting.device)))
    if total.num_queries == 0:  # no rank has a readable image: any value but zero will do, as the weight is zero
        total = normalisers[0]
    terms: dict[str, Tensor] = {}
    for number, (batch, local, weight) in enumerate(zip(batches, normalisers, weights, strict=True)):
        is_last = number == len(batches) - 1
        with _synchronise(module, when=is_last), autocast(setting):
            loss = compute_loss(
                detector,
                batch.to(setting.device),
                module=module,
                global_normaliser=total,
                local=local,
                world_size=setting.world_size,
            )
            scaled = loss.total * weight
            (scaled if setting.scaler is None else setting.scaler.scale(scaled)).backward()
        for name, value in loss.terms.items():
            terms[name] = terms.get(name, torch.zeros((), device=setting.device)) + value.float() * weight
    return StepResult(terms, total)


def apply_gradients(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Clip the gradient, take the optimizer's step, clear the gradient, and return the norm before clipping.

    With a scaler, an overflowed gradient is skipped and the scale of the next loss is lowered.
    """
    if scaler is None:
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
        optimizer.step()
    else:
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks in place and return it."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _blank(size_hw: tuple[int, int]) -> Example:
    return Example(
        image_id=-1,
        image=np.zeros((*size_hw, 3), np.uint8),
        original_size_hw=size_hw,
        boxes=np.zeros((0, 4), np.float32),
        categories=np.zeros(0, np.int64),
    )


def _synchronise(module: nn.Module, *, when: bool) -> contextlib.AbstractContextManager[None]:
    if isinstance(module, DistributedDataParallel) and not when:
        return module.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def autocast(setting: StepSetting) -> Iterator[None]:
    """Context manager: enable the autocast of a setting, if any, while the block runs."""
    if setting.autocast_dtype is None:
        yield
    else:
        with torch.autocast(setting.device.type, dtype=setting.autocast_dtype):
            yield
