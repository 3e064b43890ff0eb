"""Batch norms that stay as they are, or that take their statistics over the images of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode; its weights keep their names, so that folders stay the same."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stays in evaluation mode, whatever the mode."""
        return super().train(False)


def freeze_batch_norms(model: nn.Module) -> None:
    """Keeps the statistics and weights of a model's batch norms as they are, also in training."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = FrozenBatchNorm2d
            module.train(False)
            for parameter in module.parameters():
                parameter.requires_grad_(False)


def synchronise_batch_norms(model: nn.Module, device: torch.device) -> None:
    """Makes a model's batch norms normalise by the images of all ranks, which may have different numbers of them.

    Call it on every rank, inside the process group, once the model is on its device and before it is wrapped in
    DistributedDataParallel. Parameters and buffers keep their names and places. Batch norms that are frozen, by
    `freeze_batch_norms` or by transformers, stay so. All images of a micro-batch take part, over all ranks, but not
    those of other micro-batches of the same step. On one rank nothing changes.

    Args:
        model: Already on the device.
        device: CUDA takes torch's own `SyncBatchNorm`; the CPU, for which torch has none, takes one of ours.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    # A group of its own: DistributedDataParallel reduces gradients while the backward pass reduces statistics, and
    # within one group the ranks would have to do both in the same order.
    group: Any = dist.new_group()
    kind: Any = nn.SyncBatchNorm if device.type == "cuda" else _RanksBatchNorm2d
    module: Any
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = kind
            module.process_group = group


class _RanksBatchNorm2d(nn.BatchNorm2d):
    """A batch norm over the images of all ranks, on any device and backend that can sum."""

    process_group: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        values = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        # Each rank's own mean and variance are exact; merging them in double precision keeps them so.
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
    """Sums a tensor over ranks; its gradient is the sum of the ranks' gradients, each being of its own loss."""

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
