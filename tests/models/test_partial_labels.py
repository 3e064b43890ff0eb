"""Images that are not labelled for all classes teach nothing about the others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raydet.models.collate import Batch, collate
from raydet.models.detector import Detector
from raydet.models.losses.final_boxes import FinalLoss, mean_loss
from raydet.models.losses.partial_labels import joined_to_no_object, not_labelled
from tests.models.test_loss import CATEGORIES, SINGLE_ONLY, TINY, build, examples, gradient, relative_difference, whole

pytestmark = pytest.mark.usefixtures("one_thread")

SOFTMAX = ("detr_tiny", "table_transformer_tiny", "yolos_tiny")
SIGMOID = [name for name in TINY if name not in SOFTMAX]
UNKNOWN = 1
"""The class that the images below are not labelled for."""


def batch_of(*, known: tuple[int, ...] | None, counts: tuple[int, ...] = (3, 0, 2, 4)) -> Batch:
    """Make images without boxes of the unknown class, labelled for the known classes only."""
    labelled = None if known is None else np.array(known)
    return collate(
        [
            replace(
                one, categories=np.where(one.categories == UNKNOWN, 0, one.categories), labelled_categories=labelled
            )
            for one in examples(counts)
        ]
    )


@contextmanager
def class_scores(detector: Detector) -> Iterator[list[Tensor]]:
    """Collect the outputs, with gradients, of every layer that scores classes in the decoder, encoder and denoising."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            found.append(output)

    width = len(CATEGORIES) + detector.family.softmax
    heads = [
        module
        for name, module in detector.model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == width
    ]
    hooks = [head.register_forward_hook(keep) for head in heads]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def precise(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    def choose(name: str) -> None:
        torch.set_default_dtype(torch.float32 if name in SINGLE_ONLY else torch.float64)

    yield choose
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", SIGMOID)
def test_classes_without_labels_get_exactly_no_gradient(name: str, precise: Callable[[str], None]) -> None:
    precise(name)
    detector = build(name, is_deterministic=False)
    with class_scores(detector) as scores:
        total, _ = whole(detector, batch_of(known=(0, 2)))
        total.backward()
    reached = [one.grad for one in scores if one.grad is not None]
    assert len(reached) >= 2, "the last layer, and auxiliary or encoder scores"
    assert all((one[..., UNKNOWN] == 0).all() for one in reached)
    assert sum(bool((one[..., 2] != 0).any()) for one in reached) >= 2
    assert torch.isfinite(total)


@pytest.mark.parametrize("name", SIGMOID)
def test_only_images_that_lack_labels_are_changed(name: str) -> None:
    """Check that a class, unknown in one image, still learns from the others."""
    detector = build(name)
    batch = batch_of(known=None)
    batch.labels[0]["labelled"] = torch.tensor([0, 2])
    with class_scores(detector) as scores:
        whole(detector, batch)[0].backward()
    reached = [one.grad for one in scores if one.grad is not None]
    of_images = [one if one.shape[0] == len(batch) else one.transpose(0, 1) for one in reached]
    assert all((one[0, ..., UNKNOWN] == 0).all() for one in of_images)
    assert any((one[1:, ..., UNKNOWN] != 0).any() for one in of_images)


@pytest.mark.parametrize("name", TINY)
def test_labels_of_all_classes_give_the_usual_loss_to_the_last_bit(name: str) -> None:
    detector = build(name)
    totals = [whole(detector, batch_of(known=known))[0] for known in (None, tuple(range(len(CATEGORIES))))]
    assert torch.equal(*totals)


@pytest.mark.parametrize("name", ["rt_detr_tiny", "lw_detr_tiny", "deformable_detr_tiny", "detr_tiny"])
def test_the_gradient_does_not_depend_on_the_division_of_the_batch(name: str, precise: Callable[[str], None]) -> None:
    precise(name)
    detector = build(name)
    counts = (1, 2, 0, 3)
    both = batch_of(known=None, counts=counts)
    known = [torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([2, 0, 1]), torch.tensor([], dtype=torch.int64)]
    for label, own in zip(both.labels, known, strict=True):
        label["labelled"] = own
    halves = [
        replace(
            both,
            image_ids=both.image_ids[part],
            pixels=both.pixels[part],
            sizes_hw=both.sizes_hw[part],
            original_sizes_hw=both.original_sizes_hw[part],
            labels=both.labels[part],
        )
        for part in (slice(0, 2), slice(2, 4))
    ]
    one, its_terms = gradient(detector, [both])
    two, terms = gradient(detector, halves)
    assert relative_difference(one, two) <= 1e-12
    assert terms == pytest.approx(its_terms, rel=1e-12)


@pytest.mark.parametrize("name", SOFTMAX)
def test_probability_may_move_between_no_object_and_unknown_classes(name: str, precise: Callable[[str], None]) -> None:
    """Check the loss of given scores, of which the probability of one class moves to "no object"."""
    precise(name)
    detector = build(name)
    detector.model.eval()
    batch = batch_of(known=(0, 2))
    generator = torch.Generator().manual_seed(0)
    shape = (len(batch), detector.num_queries)
    likely = torch.rand((*shape, len(CATEGORIES) + 1), generator=generator).softmax(-1)
    boxes = torch.rand((*shape, 4), generator=generator) * 0.4 + 0.1
    moved = likely.clone()
    moved[..., -1] += 0.9 * moved[..., UNKNOWN]
    moved[..., UNKNOWN] *= 0.1

    def loss_of(probabilities: Tensor, known: tuple[int, ...] | None) -> float:
        loss, labels = FinalLoss(), batch_of(known=known).labels
        with torch.no_grad():
            double = [{**label, "boxes": label["boxes"].double()} for label in labels]
            loss.add(detector, probabilities.log(), boxes, double)
        value = mean_loss(detector, [loss])
        assert value is not None
        return value

    assert loss_of(moved, (0, 2)) == pytest.approx(loss_of(likely, (0, 2)), rel=1e-12)
    assert loss_of(moved, None) < loss_of(likely, None)


def test_the_target_of_a_query_without_an_object_is_a_set() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn((2, 5, 4), generator=generator, dtype=torch.float64, requires_grad=True)
    unknown = not_labelled([{"labelled": torch.tensor([0])}, {}], 3, scores.device)
    assert unknown is not None
    joined = joined_to_no_object(scores, unknown[:, None])
    likely = scores.softmax(-1)
    loss = functional.cross_entropy(joined.transpose(1, 2), torch.full((2, 5), 3), reduction="none")
    torch.testing.assert_close(loss[0], -likely[0, :, 1:].sum(-1).log())
    torch.testing.assert_close(loss[1], -likely[1, :, 3].log())
    assert torch.equal(joined[1], scores[1])
    matched = functional.cross_entropy(joined.transpose(1, 2), torch.zeros((2, 5), dtype=torch.int64), reduction="none")
    usual = functional.cross_entropy(scores.transpose(1, 2), torch.zeros((2, 5), dtype=torch.int64), reduction="none")
    torch.testing.assert_close(matched, usual)
    (its,), (plain,) = (torch.autograd.grad(one.sum(), scores, retain_graph=True) for one in (matched, usual))
    torch.testing.assert_close(its, plain)
