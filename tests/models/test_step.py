"""Optimizer steps without Ray: precisions, loss scaling, another size, compilation, recomputed activations."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from raydet.models.collate import collate
from raydet.models.detector import Detector
from raydet.models.loading import build_detector
from raydet.models.optim.moving_average import MovingAverage
from raydet.models.processors import resize_rule_of, resized_processor
from raydet.models.step import StepSetting, apply_gradients, compute_gradients, empty_batch
from raydet.tables.schema import Category
from tests.random_examples import random_examples

SIDE = 64


def _detector(name: str = "rt_detr_v2_tiny") -> Detector:
    detector = build_detector(name, (Category(1, "circle"), Category(2, "square")), image_size=SIDE, seed=0)
    detector.model.train()
    return detector


def _setting(dtype: torch.dtype | None = None, scaler: torch.amp.GradScaler | None = None) -> StepSetting:
    return StepSetting(device=torch.device("cpu"), autocast_dtype=dtype, world_size=1, scaler=scaler)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_steps_lower_the_loss_in_every_precision(dtype: torch.dtype | None) -> None:
    detector = _detector()
    scaler = torch.amp.GradScaler("cpu") if dtype == torch.float16 else None
    setting, optimizer = _setting(dtype, scaler), torch.optim.AdamW(detector.model.parameters(), 1e-3, fused=True)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        result = compute_gradients(detector, detector.model, [collate(random_examples(3, SIDE))], setting)
        apply_gradients(detector.model, optimizer, max_grad_norm=0.1, scaler=scaler)
        losses.append(float(torch.stack(list(result.terms.values())).sum()))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert {parameter.dtype for parameter in detector.model.parameters()} == {torch.float32}


def test_a_gradient_that_overflows_is_left_out_and_the_scale_falls() -> None:
    detector = _detector()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.AdamW(detector.model.parameters(), 1e-3, fused=True)
    before = [parameter.detach().clone() for parameter in detector.model.parameters()]
    compute_gradients(detector, detector.model, [collate(random_examples(3, SIDE))], _setting(torch.float16, scaler))
    norm = apply_gradients(detector.model, optimizer, max_grad_norm=0.1, scaler=scaler)
    assert not torch.isfinite(norm)
    assert all(torch.equal(old, new) for old, new in zip(before, detector.model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_infinite_gradient_of_a_finite_loss_changes_nothing(dtype: torch.dtype | None) -> None:
    detector = _detector()
    model, batches = detector.model, [collate(random_examples(3, SIDE))]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    average = MovingAverage(model, 0.9)

    def step() -> tuple[float, Tensor]:
        result = compute_gradients(detector, model, batches, _setting(dtype))
        norm = apply_gradients(model, optimizer, max_grad_norm=0.1, average=average)
        return float(torch.stack(list(result.terms.values())).sum()), norm

    def weights_and_moments() -> list[Tensor]:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [*model.parameters(), *moments, *average.shadow.values()]

    step()
    before = [value.detach().clone() for value in weights_and_moments()]
    hook = next(model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    loss, norm = step()
    assert np.isfinite(loss) and not torch.isfinite(norm)
    of_counters = [value.dtype == torch.int64 for value in before]  # batches that batch norms have seen
    same = [torch.equal(old, new) for old, new in zip(before, weights_and_moments(), strict=True)]
    assert all(is_same or is_counter for is_same, is_counter in zip(same, of_counters, strict=True))
    hook.remove()
    loss, norm = step()
    assert np.isfinite(loss) and torch.isfinite(norm)
    assert not torch.equal(before[0], next(model.parameters()))


@pytest.mark.parametrize("name", ["rt_detr_v2_tiny", "deimv2_tiny", "detr_tiny", "lw_detr_tiny", "yolos_tiny"])
def test_compiled_parts_have_one_graph_per_shape_and_leave_the_loss_alone(name: str) -> None:
    torch._dynamo.reset()
    plain, detector, counter = _detector(name), _detector(name), CompileCounter()
    detector.compile(backend=counter)
    num_parts = len(detector.family.compiled_modules)
    losses = []
    for each in (plain, detector):
        for seed, num_images in enumerate((3, 3, 2, 3)):
            torch.manual_seed(seed)
            # Numbers of boxes differ from batch to batch, which must not concern the compiled parts.
            examples = random_examples(num_images, SIDE)[:num_images]
            examples = [
                dataclasses.replace(one, boxes=one.boxes[: seed % 3], categories=one.categories[: seed % 3])
                for one in examples
            ]
            result = compute_gradients(each, each.model, [collate(examples)], _setting())
            losses.append(float(torch.stack(list(result.terms.values())).sum()))
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-4)
    assert counter.frame_count == 2 * num_parts  # three images, two images
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["rt_detr_v2_tiny", "detr_tiny"])
def test_a_step_of_another_size_pads_to_that_size(name: str) -> None:
    detector = _detector(name)
    rule = resize_rule_of(resized_processor(detector.processor, detector.family, 96), where=name)
    seen: list[tuple[int, ...]] = []
    detector.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["pixel_values"].shape[-2:])), with_kwargs=True
    )
    # The second micro-batch is empty; its placeholder image must have the size of the step.
    batches = [collate(random_examples(3, 96), pad_to_hw=rule.pad_to_hw), empty_batch((96, 96))]
    compute_gradients(detector, detector.model, batches, _setting())
    assert seen == [(96, 96), (96, 96)]
