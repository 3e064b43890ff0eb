"""Batch norms on one rank; `test_loss.py` tests them over several ranks together with the gradients."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydet.models.batch_norm import FrozenBatchNorm2d, _RanksBatchNorm2d, freeze_batch_norms, synchronise_batch_norms

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=None)).double()


def run(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Return output, gradients and statistics of a step."""
    output = model(pixels)
    (output**3).sum().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


@pytest.fixture
def alone_in_a_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_other_ranks_nothing_changes() -> None:
    model = network()
    synchronise_batch_norms(model, CPU)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.usefixtures("alone_in_a_group")
def test_over_one_rank_it_is_a_batch_norm() -> None:
    plain, ours = network(), network()
    synchronise_batch_norms(ours, CPU)
    assert type(ours[1]) is nn.BatchNorm2d  # a single rank keeps the plain batch norm
    group: Any = dist.group.WORLD
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = _RanksBatchNorm2d
            module.process_group = group
    assert ours.state_dict().keys() == plain.state_dict().keys()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        pixels = torch.rand((2, 3, 8, 8), generator=generator, dtype=torch.float64) * 5 + 2
        for one, other in zip(run(plain, pixels), run(ours, pixels), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plain.eval()(pixels), ours.eval()(pixels), rtol=1e-9, atol=1e-9)
    half = ours.float().train()[1](torch.rand((2, 4, 8, 8)).bfloat16())
    assert half.dtype == torch.bfloat16


def test_frozen_ones_stay_frozen() -> None:
    model = network()
    freeze_batch_norms(model)
    before = [value.clone() for value in model.buffers()]
    model.train()
    pixels = torch.rand((2, 3, 8, 8), dtype=torch.float64)
    run(model, pixels)
    assert all(torch.equal(one, other) for one, other in zip(before, model.buffers(), strict=True))
    assert [parameter.requires_grad for parameter in model.parameters()] == [True] * 2 + [False] * 4
    synchronise_batch_norms(model, CPU)
    assert type(model[1]) is FrozenBatchNorm2d
