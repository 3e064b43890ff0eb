"""Batch norms: frozen, or with statistics over the images of all ranks, and two workarounds."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode. Its weights keep their names, in saved folders too."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stay in evaluation mode, regardless of `mode`."""
        return super().train(False)


def freeze_batch_norms(model: nn.Module) -> None:
    """Fix the statistics and weights of a model's batch norms, in training too."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = FrozenBatchNorm2d
            module.train(False)
            for parameter in module.parameters():
                parameter.requires_grad_(False)


def synchronise_batch_norms(model: nn.Module, device: torch.device) -> None:
    """Make batch norms normalise over the images of all ranks, which may differ in their number of images.

    Call it on every rank, inside the process group, after moving the model to its device and before wrapping it in
    DistributedDataParallel. Parameters and buffers keep their names and memory. Batch norms frozen by
    `freeze_batch_norms` or by transformers stay frozen. The statistics cover one micro-batch over all ranks, not the
    other micro-batches of the same step. On a single rank the function does nothing.

    Args:
        model: The model, already on `device`.
        device: Its device. CUDA uses torch's own `SyncBatchNorm`; torch has none for the CPU, where raydet uses its
            own.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    # A separate group: DistributedDataParallel reduces gradients while the backward pass reduces statistics, and
    # within one group all ranks would have to issue both in the same order.
    group: Any = dist.new_group()
    kind: Any = nn.SyncBatchNorm if device.type == "cuda" else _RanksBatchNorm2d
    module: Any
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = kind
            module.process_group = group


class RunningStatistics:
    """The running means and variances of a model's batch norms, which a skipped step must leave as they were."""

    def __init__(self, model: nn.Module) -> None:
        """Refer to the statistics of a model that is on its device."""
        names = ("running_mean", "running_var")
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        values = [getattr(module, name) for module in norms for name in names]
        self._values = [value for value in values if value is not None]
        self._saved: Tensor | None = None

    def save(self) -> None:
        """Keep a copy of the statistics before a step."""
        self._saved = self._joined() if self._values else None

    def restore(self, *, unless: Tensor) -> None:
        """Restore the copy, unless a boolean scalar on the model's device is True; the host does not wait for it."""
        if self._saved is None:
            return
        kept = torch.where(unless, self._joined(), self._saved).split([value.numel() for value in self._values])
        torch._foreach_copy_(self._values, list(kept))
        self._saved = None

    def _joined(self) -> Tensor:
        return torch.cat([value.detach() for value in self._values])


def reset_batch_norm_scales(model: nn.Module) -> None:
    """Set the scale of every batch norm to one, for a model that is built from scratch.

    transformers initialises the scales of the RT-DETR family to about 0.01, for a checkpoint to overwrite. A model
    that starts from there learns several times more slowly.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)


def keep_batch_norm_gradients_contiguous(model: nn.Module) -> None:
    """Work around a wrong gradient of torch's batch norm for a batch of one image on the CPU.

    The batch norm of torch 2.15 mistakes a gradient of shape [1, C, H, W] that is laid out as [1, H, W, C] for one
    laid out as [1, C, H, W]. A model that flattens to [1, H·W, C] after the batch norm sends back such a gradient.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(_make_gradient_contiguous)


def _make_gradient_contiguous(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if output.shape[0] == 1 and output.requires_grad:
        output.register_hook(Tensor.contiguous)


class _RanksBatchNorm2d(nn.BatchNorm2d):
    """A batch norm over the images of all ranks, on any device whose backend supports sums."""

    process_group: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        values = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        # The mean and variance of each rank are exact; merging in double precision keeps them exact.
        variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        count = values.numel() / values.shape[1]
        moments = torch.stack([mean.double(), variance.double() + mean.double() ** 2, torch.ones_like(mean).double()])
        sums: Tensor = _SumOverRanks.apply(moments * count, self.process_group)
        total = sums[2]
        mean = sums[0] / total
        variance = (sums[1] / total - mean**2).clamp(min=0.0)
        self._update_statistics(mean.detach(), (variance * total / (total - 1)).detach())
        scale = torch.rsqrt(variance + self.eps) * self.weight.double()
        shift = self.bias.double() - mean * scale
        scale, shift = (part.to(values.dtype)[:, None, None] for part in (scale, shift))
        return torch.addcmul(shift, values, scale).to(input.dtype)

    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        part = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), part)
        self.running_var.lerp_(variance.to(self.running_var.dtype), part)


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over ranks. Its gradient is the sum of the gradients of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
