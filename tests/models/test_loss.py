"""The gradient of a batch does not depend on its division, and the loss is that of transformers."""

import copy
import datetime
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from raydet.config import BatchNorm
from raydet.engines.torch_engine import TorchEngine
from raydet.models.batch_norm import synchronise_batch_norms
from raydet.models.collate import Batch, Example, collate
from raydet.models.detector import Detector
from raydet.models.loading import build_detector
from raydet.models.losses.global_batch import Normaliser, compute_loss, local_normaliser
from raydet.models.small import SMALL_MODELS
from raydet.models.step import StepSetting, compute_gradients, step_normaliser
from raydet.tables.schema import Category
from tests.local_head import free_port
from tests.random_examples import empty_batch
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

CATEGORIES = (Category(1, "circle"), Category(2, "square"), Category(3, "star"))
TINY = sorted(set(SMALL_MODELS) - {"rt_detr_v2_small"})
WITH_DENOISING = ("rt_detr", "d_fine", "deimv2")
# transformers always computes their targets in single precision, so they cannot run in double precision.
SINGLE_ONLY = ("d_fine_tiny", "deimv2_tiny")
SIDE = 96
UNEVEN = (1, 1, 2, 0, 5, 0, 3, 4)

Gradient = dict[str, Tensor]


@pytest.fixture
def double_precision() -> Iterator[None]:
    """Set the default dtype, in which transformers creates the class weights of its criterion."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(
    name: str, *, is_deterministic: bool = True, is_additive: bool = True, batch_norm: BatchNorm | None = None
) -> Detector:
    """Build a detector in training mode.

    Deterministic means without dropout, denoising and batch statistics; additive, without terms that are not exact
    over several micro-batches.
    """
    detector = build_detector(
        name, CATEGORIES, image_size=SIDE, seed=0, batch_norm=batch_norm or ("freeze" if is_deterministic else "as_is")
    )
    with torch.no_grad():  # breaks the symmetry of new heads, with which matching is ambiguous
        generator = torch.Generator().manual_seed(1)
        for key, parameter in detector.model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                # DEIMv2's decoder layers must match differently, so that the union of their matches matters.
                scale = 0.3 if name == "deimv2_tiny" and "decoder.bbox_embed" in key else 0.05
                parameter.add_(noise.to(parameter.dtype) * scale)
    if is_deterministic:
        detector.model.config.num_denoising = 0
        if is_additive and name in SINGLE_ONLY:
            detector.model.config.use_dense_one_to_one = False
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
    """Make images of one size with these numbers of boxes."""
    generator = np.random.default_rng(seed)
    return [
        Example(
            image_id=number,
            image=generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
            original_size_hw=(SIDE, SIDE),
            boxes=generator.uniform(0.15, 0.5, (count, 4)).astype(np.float32),
            categories=generator.integers(0, len(CATEGORIES), count),
        )
        for number, count in enumerate(counts)
    ]


def teach(batch: Batch, counts: Sequence[int] | None = None, *, num_teachers: int = 2) -> Batch:
    """Add what teachers found, with random class scores, to the labels of a batch; it depends on the image's id only.

    Args:
        batch: The batch.
        counts: Number of boxes of each image; by default image 7 has no teacher, and the others 0 to 4 boxes.
        num_teachers: One or two teachers, which found the boxes of an image in turn.
    """
    for place, (image_id, label) in enumerate(zip(batch.image_ids, batch.labels, strict=True)):
        if counts is None and image_id == 7:
            continue
        rng = np.random.default_rng([image_id, 5])
        count = (2 * image_id + 1) % 5 if counts is None else counts[place]
        label["teacher_boxes"] = torch.tensor(rng.uniform(0.15, 0.5, (count, 4)), dtype=torch.float32)
        label["teacher_scores"] = torch.tensor(rng.uniform(0, 1, (count, len(CATEGORIES))) ** 3, dtype=torch.float16)
        label["teacher_owners"] = torch.arange(count) % num_teachers
        label["teacher_weights"] = torch.tensor([1.0, 0.5][:num_teachers])
        label["teacher_known"] = torch.ones((num_teachers, len(CATEGORIES)), dtype=torch.bool)
    return batch


def whole(detector: Detector, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    local = local_normaliser(detector, batch)
    loss = compute_loss(detector, batch, global_normaliser=local, local=local, world_size=1)
    return loss.total, loss.terms


def gradient(detector: Detector, parts: Sequence[Batch]) -> tuple[Gradient, dict[str, float]]:
    """Return gradient and loss terms of one optimizer step over these micro-batches."""
    model = detector.model
    model.zero_grad(set_to_none=True)
    locals_ = [local_normaliser(detector, part) for part in parts]
    total = step_normaliser(detector, parts)
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
    """Return ‖g₁ − g₂‖ / ‖g₁‖ over all parameters."""
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


def make_layers_differ(detector: Detector) -> None:
    """Change the boxes of each decoder layer, so that the layers match boxes to different queries."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in detector.model.named_parameters():
            if "decoder.bbox_embed" in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def transformers_own(detector: Detector, batch: Batch) -> Tensor:
    """Return transformers' own loss of a batch, with the authors' weight of the class terms.

    For two-stage models the proposal loss is added, which transformers lacks.
    """
    model = copy.deepcopy(detector.model)
    model.__dict__.pop("_loss_function", None)
    outputs = model(**detector.model_inputs(batch), labels=batch.labels)
    loss: Tensor = outputs.loss
    if detector.family.model_type in ("conditional_detr", "deformable_detr"):  # Meng et al. 2021, Zhu et al. 2021
        loss = loss + sum(value for name, value in outputs.loss_dict.items() if name.startswith("loss_ce"))
    return loss + loss_of_proposals(outputs, batch) if getattr(model.config, "two_stage", False) else loss


def loss_of_proposals(outputs: Any, batch: Batch) -> Tensor:
    """Reimplement the loss of Deformable DETR's first stage, which treats every object as the first class.

    Weights are those of its authors: 2 for classes, 5 for corners, 2 for overlap.
    """
    boxes, logits = outputs.enc_outputs_coord_logits.sigmoid(), outputs.enc_outputs_class
    num_boxes = max(sum(len(label["boxes"]) for label in batch.labels), 1)
    total = torch.zeros(())
    for image, label in enumerate(batch.labels):
        truth = label["boxes"].to(boxes.dtype)
        corners, truth_corners = (box_convert(one, "cxcywh", "xyxy") for one in (boxes[image], truth))
        overlap = generalized_box_iou(corners, truth_corners)
        likely = logits[image].sigmoid()
        focal = 0.25 * (1 - likely) ** 2 * -(likely + 1e-8).log() - 0.75 * likely**2 * -(1 - likely + 1e-8).log()
        cost = focal[:, :1] + 5 * torch.cdist(boxes[image], truth, p=1) - 2 * overlap
        chosen, matched = linear_sum_assignment(cost.detach().numpy())
        target = torch.zeros_like(logits[image])
        target[chosen, 0] = 1.0
        total = total + 2 * sigmoid_focal_loss(logits[image], target, alpha=0.25, gamma=2, reduction="sum") / num_boxes
        total = total + 5 * (boxes[image][chosen] - truth[matched]).abs().sum() / num_boxes
        total = total + 2 * (1 - overlap[chosen, matched]).sum() / num_boxes
    return total


def test_proposals_of_two_stages_learn() -> None:
    """Check that proposal scores, which select the queries, are trained; transformers has no term for them."""
    detector = build("deformable_detr_two_stage_tiny")
    of_proposals, terms = gradient(detector, [collate(examples((2, 3)))])
    assert {"loss_ce_enc", "loss_bbox_enc", "loss_giou_enc"} < terms.keys()
    assert float(of_proposals["model.decoder.class_embed.2.weight"][0].norm()) > 0.1
    assert float(of_proposals["model.decoder.bbox_embed.2.layers.0.weight"].norm()) > 0.1


def check_own_loss(detector: Detector, counts: tuple[int, ...]) -> None:
    batch = collate(examples(counts))
    own = transformers_own(detector, batch)
    total, terms = whole(detector, batch)
    assert torch.isfinite(total)
    torch.testing.assert_close(total, own, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(), own, rtol=1e-6, atol=1e-6)
    assert not any("cardinality" in term for term in terms)
    assert not any(value.requires_grad for value in terms.values())


@pytest.mark.parametrize("name", TINY)
def test_loss_with_denoising_and_dropout_is_transformers_own(name: str) -> None:
    detector = build(name, is_deterministic=False)
    if name == "d_fine_tiny":  # transformers lacks the dense matching
        detector.model.config.use_dense_one_to_one = False
    batch = collate(examples((2, 3, 0, 1)))
    torch.manual_seed(3)
    own = transformers_own(detector, batch)
    torch.manual_seed(3)
    total, terms = whole(detector, batch)
    torch.testing.assert_close(total, own, rtol=1e-6, atol=1e-6)
    assert any("_dn_" in term for term in terms) == name.startswith(WITH_DENOISING)


@pytest.mark.parametrize("name", TINY)
def test_a_training_step_keeps_all_finite_and_lowers_the_loss(name: str) -> None:
    detector = build(name)
    batch = collate(examples((3, 0, 2, 1)))
    # Small enough that no step makes the model pick other proposals, with which the loss jumps.
    optimizer = torch.optim.AdamW(detector.model.parameters(), 3e-4)
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
    engine = TorchEngine(detector, precision="bf16")
    found = engine.predict(engine.prepare_resized(examples(counts)))
    assert all(np.isfinite(item.boxes_xywh).all() and len(item.scores) > 0 for item in found)


CUTS = [
    pytest.param((1, 1, 2, 0, 5, 0, 3, 4), 4, id="4 and 12 boxes"),
    pytest.param((0, 0, 0, 0, 2, 1, 5, 0), 4, id="0 and 8 boxes"),
    pytest.param((2, 1, 30, 0, 0, 25, 1, 1), 3, id="uneven, more boxes than queries"),
    pytest.param((0, 0, 0, 0), 2, id="no box at all"),
    pytest.param((3, 1, 2), 2, id="a part of one image"),
]


# One model of each kind: class weights, sums over boxes with and without denoising, groups of queries.
OF_EACH_KIND = ("detr_tiny", "conditional_detr_tiny", "rt_detr_v2_tiny", "lw_detr_tiny")


@pytest.mark.parametrize("name", TINY)
def test_gradient_of_a_cut_batch_in_single_precision(name: str) -> None:
    check_cut(name, UNEVEN, 4, 1e-5)


@pytest.mark.parametrize(("counts", "cut"), CUTS[1:])
@pytest.mark.parametrize("name", SINGLE_ONLY)
def test_gradient_of_a_cut_batch_where_double_precision_cannot_be_had(
    name: str, counts: tuple[int, ...], cut: int
) -> None:
    check_cut(name, counts, cut, 1e-5)


@pytest.mark.parametrize("name", OF_EACH_KIND)
@pytest.mark.parametrize(("counts", "cut"), CUTS)
@pytest.mark.usefixtures("double_precision")
def test_gradient_of_a_cut_batch_in_double_precision(name: str, counts: tuple[int, ...], cut: int) -> None:
    check_cut(name, counts, cut, 1e-12)


@pytest.mark.parametrize("name", SINGLE_ONLY)
def test_distillation_is_divided_by_the_whole_batch(name: str) -> None:
    """Check the distillation term separately, because its share of an untrained model's gradient is small."""
    detector = build(name)
    detector.model.config.weight_loss_ddf = 1e5
    detector.model.config.use_dense_one_to_one = False
    items = examples(UNEVEN)
    once, terms = gradient(detector, [collate(items)])
    assert sum(value for term, value in terms.items() if "ddf" in term) > 10
    parts, _ = gradient(detector, [collate(items[:4]), collate(items[4:])])
    assert relative_difference(once, parts) <= 1e-5


@pytest.mark.parametrize("name", SINGLE_ONLY)
def test_dense_matching_is_nearly_additive_over_micro_batches(name: str) -> None:
    """Check the dense terms, whose divisor is known only after the forward pass of each micro-batch."""
    detector = build(name)
    if name == "d_fine_tiny":
        make_layers_differ(detector)
    detector.model.config.use_dense_one_to_one = True
    items = examples(UNEVEN)
    once, _ = gradient(detector, [collate(items)])
    parts, _ = gradient(detector, [collate(items[:4]), collate(items[4:])])
    assert 1e-5 < relative_difference(once, parts) < 0.2


def check_cut(name: str, counts: tuple[int, ...], cut: int, tolerance: float) -> None:
    detector = build(name)
    items = examples(counts)
    once, once_terms = gradient(detector, [collate(items)])
    parts, parts_terms = gradient(detector, [collate(items[:cut]), collate(items[cut:])])
    assert relative_difference(once, parts) <= tolerance
    assert once_terms.keys() == parts_terms.keys()
    for term, value in once_terms.items():
        assert parts_terms[term] == pytest.approx(value, rel=1e-4, abs=1e-5), term


def test_plain_averaging_would_fail_these_tests() -> None:
    """Check that the comparison is sensitive: local normalisers must matter on this data."""
    detector = build("detr_tiny")
    items = examples((1, 1, 2, 0, 5, 0, 3, 4))
    once, _ = gradient(detector, [collate(items)])
    detector.model.zero_grad(set_to_none=True)
    for half in (items[:4], items[4:]):
        (whole(detector, collate(half))[0] / 2).backward()
    assert relative_difference(once, gradient_of(detector.model)) > 0.01


def test_padded_families_learn_boxes_of_the_image() -> None:
    """Check that the criterion gets the same target boxes with and without padding."""
    detector = build("detr_tiny")
    item = examples((2,))[0]
    narrow = Example(0, item.image[:, :48], item.original_size_hw, item.boxes, item.categories)
    batch = collate([narrow], pad_to_hw=detector.resize_rule.pad_to_hw)
    assert batch.pixels.shape[-2:] == (SIDE, SIDE)
    np.testing.assert_array_equal(batch.labels[0]["boxes"].numpy(), item.boxes)
    assert detector.model_inputs(batch)["pixel_mask"][0, 0].sum() == 48


class TestNormaliser:
    def test_adds_and_survives_the_tensor(self) -> None:
        first, second = Normaliser(3.0, 4.5, 2.0, 20.0), Normaliser(1.0, 0.25, 1.0, 20.0)
        assert first + second == Normaliser(4.0, 4.75, 3.0, 40.0)
        assert Normaliser(*(first.to_tensor() + second.to_tensor()).tolist()) == first + second
        assert first.to_tensor().dtype == torch.float64

    def test_counts_boxes_and_class_weights(self) -> None:
        detector = build("detr_tiny")
        counted = local_normaliser(detector, collate(examples((3, 0, 30))))
        assert detector.num_queries == 20
        assert counted.class_weight == pytest.approx(23 + 0.1 * 37)
        assert counted == Normaliser(33.0, counted.class_weight, 23.0, 60.0)


ONE_RANK_EMPTY = (0, 0, 0, 0, 5, 0, 3, 4)


@dataclass(frozen=True)
class Case:
    """A step of two ranks: boxes per image, number of images of the first rank, and number of micro-batches."""

    name: str
    counts: tuple[int, ...] = UNEVEN
    num_first: int = 4
    num_parts: int = 1
    is_deterministic: bool = True
    batch_norm: BatchNorm = "freeze"
    is_taught: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.is_deterministic and self.name not in SINGLE_ONLY else torch.float32

    @property
    def is_additive(self) -> bool:
        return self.num_parts > 1


EXACT_CASES = [
    *(Case(name, num_parts=num_parts) for name in TINY for num_parts in (1, 2)),
    *(Case(name, ONE_RANK_EMPTY) for name in ("detr_tiny", "dab_detr_tiny", "rt_detr_v2_tiny", "rf_detr_tiny")),
    *(Case(name, ONE_RANK_EMPTY) for name in SINGLE_ONLY),
    *(Case(name, is_taught=True) for name in ("detr_tiny", "rt_detr_v2_tiny", "lw_detr_tiny", "d_fine_tiny")),
    Case("rt_detr_v2_tiny", num_parts=2, is_taught=True),
    *(Case(name, (3, 1), 2) for name in ("detr_tiny", "rt_detr_v2_tiny", "lw_detr_tiny", "deimv2_tiny")),
]
WITHOUT_BOXES = Case("rt_detr_v2_tiny", ONE_RANK_EMPTY, is_deterministic=False, batch_norm="as_is")
LIVE_NORMS = [Case("rt_detr_v2_tiny", num_first=num_first, batch_norm="sync") for num_first in (4, 3)]
CASES = [*EXACT_CASES, WITHOUT_BOXES, *LIVE_NORMS]


def run_rank(rank: int, port: int, out: str) -> None:
    """Run one of two ranks, which take real distributed steps in separate processes."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    timeout = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timeout)
    found = []
    for case in CASES:
        torch.set_default_dtype(case.dtype)
        items = examples(case.counts)[case.num_first :] if rank else examples(case.counts)[: case.num_first]
        found.append(distributed_gradient(case, items))
    if rank == 0:  # the other rank does not take part, so this call must not wait for it
        whole(build("lw_detr_tiny"), collate(examples((2, 1))))
    torch.save(found, f"{out}/{rank}.pt")
    torch.save(differences_along_a_training(rank), f"{out}/training-{rank}.pt")
    torch.distributed.destroy_process_group()


def differences_along_a_training(rank: int) -> list[float]:
    """Return, at steps 0, 10, … 50 of a training, the difference of the two ranks' gradient from the batch's gradient.

    Both ranks train on complete batches, so that they have the same state at each comparison.
    """
    torch.set_default_dtype(torch.float64)
    detector = build("rt_detr_v2_tiny")
    module = DistributedDataParallel(detector.model, broadcast_buffers=False)
    setting = StepSetting(device=torch.device("cpu"), autocast_dtype=None, world_size=2)
    optimizer = torch.optim.AdamW(detector.model.parameters(), 1e-3)
    differences = []
    for step in range(51):
        items = examples(UNEVEN, seed=step % 4)
        if step % 10 == 0:
            module.zero_grad(set_to_none=True)
            mine = [collate(items[4:] if rank else items[:4])]
            compute_gradients(detector, module, mine, setting, total=normaliser_of_ranks(detector, mine))
            ours = gradient_of(detector.model)
        once, _ = gradient(detector, [collate(items)])
        if step % 10 == 0:
            differences.append(relative_difference(once, ours))
        torch.nn.utils.clip_grad_norm_(detector.model.parameters(), 0.1)
        optimizer.step()
    return differences


def distributed_gradient(case: Case, items: Sequence[Example]) -> Gradient:
    """Return the gradient of this rank's share of a step, and the statistics of its batch norms."""
    detector = build_case(case)
    if case.batch_norm == "sync":
        synchronise_batch_norms(detector.model, torch.device("cpu"))
    module = DistributedDataParallel(detector.model, broadcast_buffers=False)
    setting = StepSetting(device=torch.device("cpu"), autocast_dtype=None, world_size=2)
    shares = [items[number :: case.num_parts] for number in range(case.num_parts)]
    parts = [collate(share) if share else empty_batch(SIDE) for share in shares]
    if case.is_taught:
        parts = [teach(part) for part in parts]
    # With a parameter that has no gradient, a second round would fail or hang.
    for _ in range(2 if case.counts != UNEVEN else 1):
        module.zero_grad(set_to_none=True)
        compute_gradients(detector, module, parts, setting, total=normaliser_of_ranks(detector, parts))
    return gradient_of(detector.model) | statistics_of(detector.model)


def build_case(case: Case) -> Detector:
    return build(
        case.name,
        is_deterministic=case.is_deterministic,
        is_additive=case.is_additive,
        batch_norm=case.batch_norm,
    )


def statistics_of(model: nn.Module) -> Gradient:
    return {name: value.clone() for name, value in model.named_buffers() if "running_" in name}


def normaliser_of_ranks(detector: Detector, batches: Sequence[Batch]) -> Normaliser:
    counts = step_normaliser(detector, batches).to_tensor()
    torch.distributed.all_reduce(counts)
    return Normaliser(*counts.tolist())


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of two ranks, which start only once, because importing torch is slow."""
    out = tmp_path_factory.mktemp("ranks")
    port = free_port()
    context = multiprocessing.get_context("spawn")
    run_ranks(context, run_rank, [(rank, port, str(out)) for rank in range(2)], timeout_s=270)
    return out


@pytest.fixture(scope="module")
def of_ranks(ranks_folder: Path) -> Mapping[Case, list[Gradient]]:
    """Gradients of each case on each of two ranks."""
    found = [torch.load(ranks_folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return {case: list(both) for case, *both in zip(CASES, *found, strict=True)}


@pytest.mark.parametrize("case", EXACT_CASES, ids=lambda case: f"{case.name}-{case.counts}-{case.num_parts}")
def test_two_real_ranks_have_the_gradient_of_one(case: Case, of_ranks: Mapping[Case, list[Gradient]]) -> None:
    """Check one and two micro-batches per rank."""
    torch.set_default_dtype(case.dtype)
    try:
        detector = build_case(case)
        batch = collate(examples(case.counts))
        once, _ = gradient(detector, [teach(batch) if case.is_taught else batch])
    finally:
        torch.set_default_dtype(torch.float32)
    for rank in of_ranks[case]:
        assert once.keys() <= rank.keys()
        ours = {name: rank[name] for name in once}
        assert relative_difference(once, ours) <= (1e-12 if case.dtype == torch.float64 else 1e-5)


def test_all_along_a_training_two_ranks_have_the_gradient_of_one(ranks_folder: Path) -> None:
    for rank in range(2):
        differences = torch.load(ranks_folder / f"training-{rank}.pt", weights_only=True)
        assert len(differences) == 6 and max(differences) <= 1e-12, differences


@pytest.mark.parametrize("case", LIVE_NORMS, ids=["4 and 4", "3 and 5"])
@pytest.mark.usefixtures("double_precision")
def test_synchronised_batch_norms_have_the_gradient_of_one_rank(
    case: Case, of_ranks: Mapping[Case, list[Gradient]]
) -> None:
    detector = build_case(case)
    once, _ = gradient(detector, [collate(examples(case.counts))])
    statistics = statistics_of(detector.model)
    assert len(statistics) > 20
    for rank in of_ranks[case]:
        assert relative_difference(once, {name: rank[name] for name in once}) <= 1e-12
        for name, value in statistics.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-12, atol=1e-12)


def test_a_rank_without_boxes_does_not_hang_the_others(of_ranks: Mapping[Case, list[Gradient]]) -> None:
    """Check a rank without boxes with denoising, whose class embedding that rank never uses."""
    first, second = of_ranks[WITHOUT_BOXES]
    assert first["model.denoising_class_embed.weight"].abs().sum() > 0
    assert all(torch.equal(value, second[key]) for key, value in first.items() if "running_" not in key)


LEFT_OUT = {name: ["model.denoising_class_embed.weight"] for name in TINY if name.startswith(WITH_DENOISING)}
LEFT_OUT["rf_detr_tiny"] = ["model.backbone.backbone.embeddings.mask_token"]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("counts", [((2, 3), (0, 0)), ((0, 0), (2, 3))], ids=["boxes first", "boxes later"])
def test_the_zero_covers_only_what_a_loss_may_leave_out(name: str, counts: tuple[tuple[int, ...], ...]) -> None:
    """Check that every parameter has a gradient, also without boxes: an optimizer treats zero differently from none."""
    detector = build(name, is_deterministic=False)
    for each in counts:
        detector.model.zero_grad(set_to_none=True)
        whole(detector, collate(examples(each)))[0].backward()
        assert [key for key, p in detector.model.named_parameters() if p.requires_grad and p.grad is None] == []
    left_out = {id(parameter) for parameter in detector.left_out or ()}
    named = [(key, p) for key, p in detector.model.named_parameters() if p.requires_grad]
    assert [key for key, p in named if id(p) in left_out] == LEFT_OUT.get(name, [])


def test_the_zero_covers_everything_if_training_skips_layers() -> None:
    detector = build("table_transformer_tiny", is_deterministic=False)
    detector.model.config.encoder_layerdrop = 0.5
    whole(detector, collate(examples((2, 3))))
    assert len(detector.left_out or ()) == len(list(detector.model.parameters()))


@pytest.mark.parametrize("name", ["d_fine_tiny", "deimv2_tiny"])
def test_each_output_is_matched_once(name: str) -> None:
    detector = build(name, is_deterministic=False, is_additive=False)
    matched: list[object] = []
    hook = register_module_forward_hook(
        lambda module, _, output: matched.append(output) if isinstance(module, RTDetrHungarianMatcher) else None
    )
    try:
        whole(detector, collate(examples((2, 3))))
    finally:
        hook.remove()
    num_layers = detector.model.config.decoder_layers
    assert len(matched) == num_layers + 1  # and the proposals of the encoder


@pytest.mark.parametrize("name", ["lw_detr_tiny", "rf_detr_tiny"])
def test_loss_of_query_groups_means_something_in_evaluation_mode(name: str) -> None:
    """Check evaluation mode, which has a single group of queries; transformers' own criterion still splits it."""
    detector = build(name)
    batch = collate(examples((2, 3, 0, 1)))
    detector.model.eval()
    total, terms = whole(detector, batch)
    parts = [collate(examples((2, 3, 0, 1))[start : start + 2]) for start in (0, 2)]
    _, cut = gradient(detector, parts)
    assert sum(cut.values()) == pytest.approx(float(total.detach()), rel=1e-5)
    detector.model.config.group_detr = 1
    own = transformers_own(detector, batch)
    torch.testing.assert_close(total, own, rtol=1e-6, atol=1e-6)
    assert terms.keys() >= {"loss_ce", "loss_ce_0", "loss_giou_enc"}
