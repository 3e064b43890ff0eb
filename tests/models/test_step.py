"""Optimizer steps without Ray: precisions, loss scaling, another size, compilation, recomputed activations."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from raydet.models.batch_norm import RunningStatistics
from raydet.models.collate import collate
from raydet.models.detector import Detector
from raydet.models.loading import build_detector
from raydet.models.optim.moving_average import MovingAverage
from raydet.models.processors import resize_rule_of, resized_processor
from raydet.models.step import StepSetting, apply_gradients, compute_gradients
from raydet.tables.schema import Category
from tests.random_examples import empty_batch, random_examples

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
    average, statistics = MovingAverage(model, 0.9), RunningStatistics(model)

    def step() -> tuple[float, Tensor]:
        statistics.save()
        result = compute_gradients(detector, model, batches, _setting(dtype))
        norm = apply_gradients(model, optimizer, max_grad_norm=0.1, average=average, statistics=statistics)
        return float(torch.stack(list(result.terms.values())).sum()), norm

    def weights_and_moments() -> list[Tensor]:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [*model.parameters(), *model.buffers(), *moments, *average.shadow.values()]

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


# transformers asks in training, after each layer of an encoder, whether its values are finite, which ends a graph.
@pytest.mark.parametrize(("name", "num_graphs"), [("rt_detr_v2_tiny", 10), ("detr_tiny", 4)])
def test_compiled_parts_have_the_same_graphs_whatever_the_number_of_boxes(name: str, num_graphs: int) -> None:
    def losses(detector: Detector, graphs: list[int]) -> Iterator[float]:
        for number, num_images in enumerate((3, 3, 2, 3)):
            torch.manual_seed(number)
            examples = [
                dataclasses.replace(one, boxes=one.boxes[:number], categories=one.categories[:number])
                for one in random_examples(num_images, SIDE)
            ]
            result = compute_gradients(detector, detector.model, [collate(examples)], _setting())
            graphs.append(counter.frame_count)
            yield float(torch.stack(list(result.terms.values())).sum())

    torch._dynamo.reset()
    plain, compiled, counter = _detector(name), _detector(name), CompileCounter()
    compiled.compile(backend=counter)
    graphs: list[int] = []
    assert list(losses(compiled, graphs)) == pytest.approx(list(losses(plain, [])), rel=1e-4)
    first, same_shape, fewer_images, first_shape = graphs
    assert first == num_graphs and same_shape == first  # a repeated shape compiles nothing
    assert first < fewer_images <= 2 * first and first_shape == fewer_images
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
    batches = [collate(random_examples(3, 96), pad_to_hw=rule.pad_to_hw), empty_batch(96)]
    compute_gradients(detector, detector.model, batches, _setting())
    assert seen == [(96, 96), (96, 96)]
