"""The gradient of a batch is the same however it is cut, and its loss is transformers' own."""

import copy
import datetime
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForObjectDetection

from raydet.collate import Batch, Example, collate
from raydet.detector import Detector
from raydet.loss import Normaliser, compute_loss, local_normaliser
from raydet.models import SMALL_MODELS, build_detector
from raydet.schema import Category
from raydet.step import StepSetting, compute_gradients

CATEGORIES = (Category(1, "circle"), Category(2, "square"), Category(3, "star"))
TINY = sorted(set(SMALL_MODELS) - {"rt_detr_v2_small"})
SIDE = 96

Gradient = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are faster without the traffic between threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def double_precision() -> Iterator[None]:
    """transformers makes the class weights of its criterion in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(name: str, *, is_deterministic: bool = True) -> Detector:
    """A detector in training mode; deterministic means without dropout, denoising and batch statistics."""
    detector = build_detector(name, CATEGORIES, image_size=SIDE, seed=0, freeze_batch_norm=is_deterministic)
    with torch.no_grad():  # away from the symmetry of new heads, where matching is a draw
        generator = torch.Generator().manual_seed(1)
        for parameter in detector.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(noise.to(parameter.dtype) * 0.05)
    if is_deterministic:
        detector.model.config.num_denoising = 0
        module: Any
        for module in detector.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
    nn.Module.to(detector.model, torch.get_default_dtype())
    detector.model.train()
    return detector


def examples(counts: Sequence[int], seed: int = 0) -> list[Example]:
    """Pictures of one size with so many boxes each."""
    generator = np.random.default_rng(seed)
    return [
        Example(
            image_id=number,
            image=generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
            original_size_hw=(SIDE, SIDE),
            boxes=generator.uniform(0.15, 0.5, (count, 4)).astype(np.float32),
            labels=generator.integers(0, len(CATEGORIES), count),
        )
        for number, count in enumerate(counts)
    ]


def whole(detector: Detector, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    local = local_normaliser(detector, batch)
    loss = compute_loss(detector, batch, global_normaliser=local, local=local, world_size=1)
    return loss.total, loss.terms


def gradient(detector: Detector, parts: Sequence[Batch]) -> tuple[Gradient, dict[str, float]]:
    """Gradient and loss terms of one optimizer step over these micro-batches."""
    model = detector.model
    model.zero_grad(set_to_none=True)
    locals_ = [local_normaliser(detector, part) for part in parts]
    total = sum(locals_, Normaliser(0.0, 0.0))
    terms: dict[str, float] = {}
    for part, local in zip(parts, locals_, strict=True):
        loss = compute_loss(detector, part, global_normaliser=total, local=local, world_size=1)
        loss.total.backward()
        for name, value in loss.terms.items():
            terms[name] = terms.get(name, 0.0) + float(value)
    return gradient_of(model), terms


def gradient_of(model: nn.Module) -> Gradient:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(first: Gradient, second: Gradient) -> float:
    """‖g₁ − g₂‖ / ‖g₁‖ over all parameters."""
    names = first.keys() | second.keys()
    reference = {name: first.get(name, second.get(name)) for name in names}
    zeros = {name: torch.zeros_like(value) for name, value in reference.items() if value is not None}
    difference = torch.cat([(first.get(name, zeros[name]) - second.get(name, zeros[name])).flatten() for name in names])
    norm = torch.cat([value.flatten() for value in first.values()]).norm()
    assert norm > 0
    return float(difference.norm() / norm)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("counts", [(2, 3, 0, 1), (0, 0), (30, 2)], ids=["some", "none", "more than queries"])
def test_loss_of_one_batch_is_transformers_own(name: str, counts: tuple[int, ...]) -> None:
    check_own_loss(build(name), counts)


def check_own_loss(detector: Detector, counts: tuple[int, ...]) -> None:
    batch = collate(examples(counts))
    own = detector.model(**detector.model_inputs(batch), labels=batch.labels).loss
    total, terms = whole(detector, batch)
    assert torch.isfinite(total)
    torch.testing.assert_close(total, own, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(), own, rtol=1e-6, atol=1e-6)
    assert not any("cardinality" in term for term in terms)
    assert not any(value.requires_grad for value in terms.values())


@pytest.mark.parametrize("name", TINY)
def test_loss_with_denoising_and_dropout_is_transformers_own(name: str) -> None:
    detector = build(name, is_deterministic=False)
    batch = collate(examples((2, 3, 0, 1)))
    torch.manual_seed(3)
    own = detector.model(**detector.model_inputs(batch), labels=batch.labels).loss
    torch.manual_seed(3)
    total, terms = whole(detector, batch)
    torch.testing.assert_close(total, own, rtol=1e-6, atol=1e-6)
    assert any("_dn_" in term for term in terms) == name.startswith(("rt_detr", "d_fine"))


@pytest.mark.parametrize("name", TINY)
def test_a_training_step_keeps_all_finite_and_lowers_the_loss(name: str) -> None:
    detector = build(name)
    batch = collate(examples((3, 0, 2, 1)))
    optimizer = torch.optim.AdamW(detector.model.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        total, _ = whole(detector, batch)
        total.backward()
        nn.utils.clip_grad_norm_(detector.model.parameters(), 0.1, error_if_nonfinite=True)
        optimizer.step()
        losses.append(float(total.detach()))
    assert all(torch.isfinite(parameter).all() for parameter in detector.model.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("counts", [(3, 0, 2, 1), (0, 0)], ids=["some", "none"])
def test_autocast_gives_nearly_the_same_loss(name: str, counts: tuple[int, ...]) -> None:
    detector = build(name)
    batch = collate(examples(counts))
    precise, _ = whole(detector, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = whole(detector, batch)
    total.backward()
    assert float(total.detach()) == pytest.approx(float(precise.detach()), rel=0.1)
    assert total.dtype == torch.float32
    assert {value.dtype for value in terms.values()} == {torch.float32}
    detector.model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = detector.predict(batch)
    assert all(np.isfinite(item.boxes_xywh).all() and len(item.scores) > 0 for item in found)


CUTS = [
    pytest.param((1, 1, 2, 0, 5, 0, 3, 4), 4, id="4 and 12 boxes"),
    pytest.param((0, 0, 0, 0, 2, 1, 5, 0), 4, id="0 and 8 boxes"),
    pytest.param((2, 1, 30, 0, 0, 25, 1, 1), 3, id="uneven, more boxes than queries"),
    pytest.param((0, 0, 0, 0), 2, id="no box at all"),
    pytest.param((3, 1, 2), 2, id="a part of one image"),
]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("counts", "cut"), CUTS)
def test_gradient_of_a_cut_batch_in_single_precision(name: str, counts: tuple[int, ...], cut: int) -> None:
    check_cut(name, counts, cut, 1e-5)


# transformers computes D-FINE's targets in single precision whatever the model's, so it cannot run in double.
@pytest.mark.parametrize("name", [name for name in TINY if name != "d_fine_tiny"])
@pytest.mark.parametrize(("counts", "cut"), CUTS)
@pytest.mark.usefixtures("double_precision")
def test_gradient_of_a_cut_batch_in_double_precision(name: str, counts: tuple[int, ...], cut: int) -> None:
    check_cut(name, counts, cut, 1e-12)


def test_distillation_of_d_fine_is_divided_by_the_whole_batch() -> None:
    """Its share in the gradient of an untrained model is too small for the other tests to see."""
    detector = build("d_fine_tiny")
    detector.model.config.weight_loss_ddf = 1e5
    items = examples((1, 1, 2, 0, 5, 0, 3, 4))
    once, terms = gradient(detector, [collate(items)])
    assert sum(value for term, value in terms.items() if "ddf" in term) > 10
    parts, _ = gradient(detector, [collate(items[:4]), collate(items[4:])])
    assert relative_difference(once, parts) <= 1e-5


def check_cut(name: str, counts: tuple[int, ...], cut: int, tolerance: float) -> None:
    detector = build(name)
    items = examples(counts)
    once, once_terms = gradient(detector, [collate(items)])
    parts, parts_terms = gradient(detector, [collate(items[:cut]), collate(items[cut:])])
    assert relative_difference(once, parts) <= tolerance
    assert once_terms.keys() == parts_terms.keys()
    for term, value in once_terms.items():
        assert parts_terms[term] == pytest.approx(value, rel=1e-4, abs=1e-5), term


@pytest.mark.parametrize("model_type", ["table-transformer", "deformable_detr", "dab-detr"])
def test_families_that_come_as_checkpoints_only(model_type: str, tmp_path: Path) -> None:
    widths = [8, 16, 24, 32]
    resnet = {"embedding_size": 8, "hidden_sizes": widths, "depths": [1] * 4, "layer_type": "basic"}
    backbone = AutoConfig.for_model("resnet", out_features=["stage4"], **resnet)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= {"d_model": 32, "hidden_size": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 20}
    sizes |= {"num_feature_levels": 1} if model_type == "deformable_detr" else {}
    config = AutoConfig.for_model(model_type, backbone_config=backbone, **sizes)
    AutoModelForObjectDetection.from_config(config).save_pretrained(tmp_path)
    check_own_loss(build(str(tmp_path)), (2, 3, 0, 1))
    check_cut(str(tmp_path), (1, 1, 2, 0, 5, 0, 3, 4), 4, 1e-5)


def test_plain_averaging_would_fail_these_tests() -> None:
    """Guards the comparison itself: the local normalisers must matter on this data."""
    detector = build("detr_tiny")
    items = examples((1, 1, 2, 0, 5, 0, 3, 4))
    once, _ = gradient(detector, [collate(items)])
    detector.model.zero_grad(set_to_none=True)
    for half in (items[:4], items[4:]):
        (whole(detector, collate(half))[0] / 2).backward()
    assert relative_difference(once, gradient_of(detector.model)) > 0.01


def test_padded_families_learn_boxes_of_the_image() -> None:
    """The same target boxes reach the criterion whether or not the image is padded."""
    detector = build("detr_tiny")
    item = examples((2,))[0]
    narrow = Example(0, item.image[:, :48], item.original_size_hw, item.boxes, item.labels)
    batch = collate([narrow], pad_to_hw=detector.resize_rule.pad_to_hw)
    assert batch.pixels.shape[-2:] == (SIDE, SIDE)
    np.testing.assert_array_equal(batch.labels[0]["boxes"].numpy(), item.boxes)
    assert detector.model_inputs(batch)["pixel_mask"][0, 0].sum() == 48


class TestNormaliser:
    def test_adds_and_survives_the_tensor(self) -> None:
        first, second = Normaliser(3.0, 4.5, 2.0, 20.0), Normaliser(1.0, 0.25, 1.0, 20.0)
        assert first + second == Normaliser(4.0, 4.75, 3.0, 40.0)
        assert Normaliser.from_tensor(first.to_tensor() + second.to_tensor()) == first + second
        assert first.to_tensor().dtype == torch.float64

    def test_counts_boxes_and_class_weights(self) -> None:
        detector = build("detr_tiny")
        counted = local_normaliser(detector, collate(examples((3, 0, 30))))
        assert detector.num_queries == 20
        assert counted.class_weight == pytest.approx(23 + 0.1 * 37)
        assert counted == Normaliser(33.0, counted.class_weight, 23.0, 60.0)


UNEVEN = (1, 1, 2, 0, 5, 0, 3, 4)
ONE_RANK_EMPTY = (0, 0, 0, 0, 5, 0, 3, 4)

# Model, boxes of each picture, how many are the first rank's, whether without denoising and in double precision.
DISTRIBUTED_CASES = [
    ("detr_tiny", UNEVEN, 4, True),
    ("rt_detr_v2_tiny", UNEVEN, 4, True),
    ("rt_detr_v2_tiny", ONE_RANK_EMPTY, 4, True),
    ("detr_tiny", (3, 1), 2, True),
    ("rt_detr_v2_tiny", (3, 1, 2), 3, True),
    ("rt_detr_v2_tiny", ONE_RANK_EMPTY, 4, False),
]


def run_rank(rank: int, port: int, out: str) -> None:
    """One of two ranks that take real distributed steps; runs in a process of its own."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    timeout = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timeout)
    for number, (name, counts, num_first, is_deterministic) in enumerate(DISTRIBUTED_CASES):
        torch.set_default_dtype(torch.float64 if is_deterministic else torch.float32)
        items = examples(counts)[num_first:] if rank else examples(counts)[:num_first]
        result = distributed_gradient(build(name, is_deterministic=is_deterministic), items)
        torch.save(result, f"{out}/{number}-{rank}.pt")
    torch.distributed.destroy_process_group()


def distributed_gradient(detector: Detector, items: Sequence[Example]) -> Gradient:
    """This rank's share of a step, in two micro-batches."""
    module = DistributedDataParallel(detector.model)
    setting = StepSetting(
        device=torch.device("cpu"), autocast_dtype=None, world_size=2, sum_over_ranks=_sum_over_two_ranks
    )
    for _ in range(2):  # a parameter without a gradient makes the second round fail or hang
        module.zero_grad(set_to_none=True)
        compute_gradients(detector, module, [items[:2], items[2:]], setting)
    return gradient_of(detector.model)


def _sum_over_two_ranks(tensor: Tensor) -> Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor


@pytest.fixture(scope="module")
def ranks_gradients(tmp_path_factory: pytest.TempPathFactory) -> list[list[Gradient]]:
    """Gradients of each distributed case on each of two ranks; they start once, for importing torch takes long."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, port, str(out)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + 120
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [
        [torch.load(out / f"{number}-{rank}.pt", weights_only=True) for rank in range(2)]
        for number in range(len(DISTRIBUTED_CASES))
    ]


@pytest.mark.parametrize(
    "case",
    range(5),
    ids=[
        "detr",
        "rt_detr_v2",
        "rt_detr_v2, one rank without boxes",
        "detr, one rank without images",
        "rt_detr_v2, one rank without images",
    ],
)
@pytest.mark.usefixtures("double_precision")
def test_two_real_ranks_have_the_gradient_of_one(case: int, ranks_gradients: list[list[Gradient]]) -> None:
    name, counts, _, _ = DISTRIBUTED_CASES[case]
    once, _ = gradient(build(name), [collate(examples(counts))])
    for rank in ranks_gradients[case]:
        assert once.keys() <= rank.keys()
        assert relative_difference(once, rank) <= 1e-12


def test_a_rank_without_boxes_does_not_hang_the_others(ranks_gradients: list[list[Gradient]]) -> None:
    """With denoising, whose class embedding a rank without boxes never touches."""
    first, second = ranks_gradients[5]
    assert first["model.denoising_class_embed.weight"].abs().sum() > 0
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_all_parameters_take_part_when_there_are_several_ranks() -> None:
    for name in TINY:
        detector = build(name, is_deterministic=False)
        batch = collate(examples((0, 0)))
        local = local_normaliser(detector, batch)
        alone = copy.deepcopy(detector)
        compute_loss(alone, batch, global_normaliser=local, local=local, world_size=1).total.backward()
        compute_loss(detector, batch, global_normaliser=local, local=local, world_size=2).total.backward()
        missing = [key for key, p in detector.model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        if name.startswith(("rt_detr", "d_fine")):
            assert alone.model.model.denoising_class_embed.weight.grad is None
