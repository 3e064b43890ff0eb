"""Optimizer steps without Ray: precisions, loss scaling, another size, compilation, recomputed activations."""

import numpy as np
import pytest
import torch

from raydet.models.detector import Detector
from raydet.models.loading import build_detector
from raydet.models.processors import resize_rule_of, resized_processor
from raydet.models.step import StepSetting, apply_gradients, compute_gradients
from raydet.tables.schema import Category
from tests.random_examples import random_examples

SIDE = 64


def _detector(name: str = "rt_detr_v2_tiny") -> Detector:
    detector = build_detector(name, (Category(1, "circle"), Category(2, "square")), image_size=SIDE, seed=0)
    detector.model.train()
    return detector


def _setting(dtype: torch.dtype | None = None, scaler: torch.amp.GradScaler | None = None) -> StepSetting:
    return StepSetting(
        device=torch.device("cpu"), autocast_dtype=dtype, world_size=1, sum_over_ranks=lambda x: x, scaler=scaler
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_steps_lower_the_loss_in_every_precision(dtype: torch.dtype | None) -> None:
    detector = _detector()
    scaler = torch.amp.GradScaler("cpu") if dtype == torch.float16 else None
    setting, optimizer = _setting(dtype, scaler), torch.optim.AdamW(detector.model.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        result = compute_gradients(detector, detector.model, [random_examples(3, SIDE)], setting)
        apply_gradients(detector.model, optimizer, max_grad_norm=0.1, scaler=scaler)
        losses.append(float(torch.stack(list(result.terms.values())).sum()))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert {parameter.dtype for parameter in detector.model.parameters()} == {torch.float32}


def test_a_gradient_that_overflows_is_left_out_and_the_scale_falls() -> None:
    detector = _detector()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.AdamW(detector.model.parameters(), 1e-3)
    before = [parameter.detach().clone() for parameter in detector.model.parameters()]
    compute_gradients(detector, detector.model, [random_examples(3, SIDE)], _setting(torch.float16, scaler))
    norm = apply_gradients(detector.model, optimizer, max_grad_norm=0.1, scaler=scaler)
    assert not torch.isfinite(norm)
    assert all(torch.equal(old, new) for old, new in zip(before, detector.model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("name", ["rt_detr_v2_tiny", "detr_tiny"])
def test_a_step_of_another_size_pads_to_that_size(name: str) -> None:
    detector = _detector(name)
    rule = resize_rule_of(resized_processor(detector.processor, detector.family, 96), where=name)
    seen: list[tuple[int, ...]] = []
    detector.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["pixel_values"].shape[-2:])), with_kwargs=True
    )
    # The second micro-batch is empty; its placeholder image must also have the size of the step.
    compute_gradients(detector, detector.model, [random_examples(3, 96), []], _setting(), rule=rule)
    assert seen == [(96, 96), (96, 96)]
