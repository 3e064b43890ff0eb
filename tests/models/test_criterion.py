"""Precision, matching and failures of the criterion, and the loss of the final boxes in validation."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from raydet.models.collate import collate
from raydet.models.detector import Detector
from raydet.models.losses.final_boxes import FinalLoss, mean_loss
from raydet.models.losses.global_batch import compute_loss, local_normaliser
from raydet.models.losses.not_finite import NotFiniteError
from tests.models.test_loss import TINY, build, examples, make_layers_differ

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = (3, 0, 2, 4)


def forward(detector: Detector, counts: Sequence[int] = COUNTS) -> Any:
    batch = collate(examples(counts))
    return detector.model(**detector.model_inputs(batch), labels=batch.labels)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_boxes_are_not_rounded_under_autocast(name: str, mode: bool) -> None:
    """Check the final boxes and, in training, those of the encoder; centres round to 1/512 in bf16."""
    detector = build(name, is_deterministic=False)
    detector.model.train(mode)
    batch = collate(examples(COUNTS))
    labels = batch.labels if mode else None
    with torch.autocast("cpu", torch.bfloat16):
        outputs = detector.model(**detector.model_inputs(batch), labels=labels)
    found = {key: value for key, value in outputs.items() if key in ("pred_boxes", "enc_topk_bboxes")}
    assert "pred_boxes" in found
    for key, boxes in found.items():
        assert boxes.dtype == torch.float32, key
        is_rounded = boxes.bfloat16().float() == boxes
        assert is_rounded.double().mean() < 0.1, key


@pytest.mark.parametrize("name", TINY)
def test_the_loss_is_computed_in_single_precision_under_autocast(name: str) -> None:
    detector = build(name, is_additive=True)
    batch = collate(examples(COUNTS))
    num_calls = 0
    criterion: Any = detector.model.loss_function
    inner = criterion._loss

    def spy(logits: Tensor, labels: Any, device: Any, boxes: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert not torch.is_autocast_enabled("cpu")
        assert logits.dtype == boxes.dtype == torch.float32
        nonlocal num_calls
        num_calls += 1
        return inner(logits, labels, device, boxes, *args, **kwargs)

    criterion._loss = spy
    local = local_normaliser(detector, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute_loss(detector, batch, global_normaliser=local, local=local, world_size=1)
    assert num_calls == 1
    assert {value.dtype for value in loss.terms.values()} == {torch.float32}


@pytest.mark.parametrize("name", TINY)
def test_outputs_that_are_not_finite_give_every_parameter_a_gradient_as_others_do(name: str) -> None:
    """Check what the other ranks of a step wait for: gradients of the same parameters."""
    detector = build(name, is_additive=True)
    batch = collate(examples(COUNTS))
    local = local_normaliser(detector, batch)

    def with_gradients() -> set[str]:
        loss = compute_loss(detector, batch, global_normaliser=local, local=local, world_size=1)
        totals.append(float(loss.total))
        detector.model.zero_grad(set_to_none=True)
        loss.total.backward()
        return {name for name, value in detector.model.named_parameters() if value.grad is not None}

    totals: list[float] = []
    usual = with_gradients()
    with torch.no_grad():
        next(value for value in detector.model.parameters() if value.ndim > 1).fill_(torch.nan)
    assert with_gradients() == usual
    assert math.isfinite(totals[0]) and math.isnan(totals[1])


def test_values_that_are_not_finite_have_a_type_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = build("detr_tiny")
    head: Any = detector.model.get_submodule("bbox_predictor")
    with torch.no_grad():
        head.layers[-1].bias.fill_(torch.nan)
    with torch.no_grad(), pytest.raises(NotFiniteError):
        forward(detector)
    healthy: Any = build("detr_tiny")

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("an unrelated error that says nan, inf and information")

    healthy.model.loss_function._loss = broken
    with pytest.raises(ValueError, match="unrelated"):
        forward(healthy)


def matched(logits: Tensor, boxes: Tensor, label: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Match queries to the boxes of an image, with the costs of D-FINE: 2 for classes, 5 for corners, 2 for overlap."""
    likely = logits.sigmoid()[:, label["class_labels"]]
    focal = 0.25 * (1 - likely) ** 2 * -(likely + 1e-8).log() - 0.75 * likely**2 * -(1 - likely + 1e-8).log()
    corners, truth = (box_convert(one, "cxcywh", "xyxy") for one in (boxes, label["boxes"]))
    cost = 2 * focal + 5 * torch.cdist(boxes, label["boxes"], p=1) - 2 * generalized_box_iou(corners, truth)
    return [(int(query), int(target)) for query, target in zip(*linear_sum_assignment(cost.detach()), strict=True)]


def bins(num_bins: int, up: float, scale: float) -> np.ndarray[Any, Any]:
    """Return the values of D-FINE's bins (Peng et al. 2024, equation 6)."""
    limit = up * scale
    step = (limit + 1) ** (2 / (num_bins - 2))
    right = [step**number - 1 for number in range(1, num_bins // 2)]
    return np.array([-2 * limit, *(-value for value in reversed(right)), 0.0, *right, 2 * limit])


def fine_grained(output: dict[str, Tensor], image: int, query: int, truth: Tensor, iou: float, config: Any) -> float:
    """Return the fine-grained localisation loss of one query, unweighted."""
    values, total = bins(config.max_num_bins, config.up, config.reg_scale), 0.0
    corners = output["pred_corners"][image, query].reshape(4, -1).detach().log_softmax(-1).numpy()
    x, y, width, height = output["ref_points"][image, query].detach().tolist()
    left, top, right, bottom = box_convert(truth, "cxcywh", "xyxy").tolist()
    sides = ((x - left) / width, (y - top) / height, (right - x) / width, (bottom - y) / height)
    for logs, side in zip(corners, sides, strict=True):
        distance = (side - 0.5) * config.reg_scale
        place = int(np.searchsorted(values, distance, side="right")) - 1
        if place < 0:
            place, part = 0, 0.0
        elif place >= len(values) - 1:
            place, part = len(values) - 2, 1.0
        else:
            part = float((distance - values[place]) / (values[place + 1] - values[place]))
        total -= iou * float((1 - part) * logs[place] + part * logs[place + 1])
    return total


def test_d_fine_learns_the_union_of_what_its_layers_match() -> None:
    """Check all box terms against an independent computation; transformers matches each layer by itself."""
    detector = build("d_fine_tiny", is_additive=False)
    make_layers_differ(detector)
    config = detector.model.config
    batch = collate(examples(COUNTS))
    local = local_normaliser(detector, batch)
    torch.manual_seed(0)
    outputs = forward(detector)
    terms = compute_loss(detector, batch, global_normaliser=local, local=local, world_size=1).terms
    last = {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes.clamp(0, 1)}
    layers = [last, *outputs.auxiliary_outputs]
    union: list[dict[int, int]] = []
    for image, label in enumerate(batch.labels):
        pairs = Counter(
            pair for layer in layers for pair in matched(layer["logits"][image], layer["pred_boxes"][image], label)
        )
        chosen: dict[int, int] = {}
        for query, target in sorted(pairs, key=lambda pair: (-pairs[pair], pair)):
            chosen.setdefault(query, target)
        union.append(chosen)
    num_matched = sum(map(len, union))
    assert num_matched > sum(COUNTS), "the layers must match differently"
    for number, layer in enumerate(layers):
        suffix = f"_aux_{number - 1}" if number else ""
        corners = overlap = fine = 0.0
        for image, chosen in enumerate(union):
            for query, target in chosen.items():
                box, truth = layer["pred_boxes"][image, query].detach(), batch.labels[image]["boxes"][target]
                one, other = (box_convert(each, "cxcywh", "xyxy")[None] for each in (box, truth))
                corners += float((box - truth).abs().sum())
                overlap += 1 - float(generalized_box_iou(one, other))
                if "pred_corners" in layer:
                    fine += fine_grained(layer, image, query, truth, float(box_iou(one, other)), config)
        assert float(terms[f"loss_bbox{suffix}"]) == pytest.approx(5 * corners / num_matched, rel=1e-5)
        assert float(terms[f"loss_giou{suffix}"]) == pytest.approx(2 * overlap / num_matched, rel=1e-5)
        if "pred_corners" in layer:
            expected = config.weight_loss_fgl * fine / num_matched
            assert float(terms[f"loss_fgl{suffix}"]) == pytest.approx(expected, rel=1e-4)


def final_loss(detector: Detector, parts: Sequence[Sequence[int]], order: Sequence[int] | None = None) -> FinalLoss:
    """Return the sums over images, cut into batches with these indices."""
    detector.model.eval()
    items, loss = examples(COUNTS), FinalLoss()
    for number in order or range(len(parts)):
        batch = collate([items[index] for index in parts[number]])
        with torch.inference_mode():
            outputs = detector.model(**detector.model_inputs(batch))
            loss.add(detector, outputs.logits, outputs.pred_boxes, batch.labels)
    return loss


@pytest.mark.parametrize("name", TINY)
def test_loss_of_the_final_boxes_does_not_depend_on_the_batches(name: str) -> None:
    detector = build(name, is_additive=False)
    whole = mean_loss(detector, [final_loss(detector, [[0, 1, 2, 3]])])
    parts = [[0, 1], [2], [3]]
    cut = mean_loss(detector, [final_loss(detector, parts)])
    assert whole is not None and cut == pytest.approx(whole, rel=1e-5)
    # The same batches on any ranks, in any order: the same bits.
    ranks = [final_loss(detector, parts[::-1][:1]), FinalLoss(), final_loss(detector, parts[:2], [1, 0])]
    assert mean_loss(detector, ranks) == cut


@pytest.mark.parametrize("name", TINY)
def test_loss_of_the_final_boxes_is_that_of_the_last_layer(name: str) -> None:
    """Check against the terms of the last layer in a pass with labels; the union of D-FINE's layers is switched off."""
    detector = build(name, is_additive=True)
    detector.model.eval()
    if name in ("d_fine_tiny", "deimv2_tiny"):  # without labels they have no outputs of earlier layers
        detector.model.config.auxiliary_loss = False
    batch = collate(examples(COUNTS))
    local = local_normaliser(detector, batch)
    with torch.no_grad():
        outputs = detector.model(**detector.model_inputs(batch), labels=batch.labels)
    last = {key: float(value) for key, value in outputs.loss_dict.items() if key in LAST}
    weights = {"loss_ce": detector.family.class_weight or 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    if not detector.family.weights_in_config:
        weights = dict.fromkeys(weights, 1.0)
    expected = math.fsum(value * weights.get(key, 1.0) for key, value in last.items())
    assert local.num_boxes == sum(COUNTS)
    assert mean_loss(detector, [final_loss(detector, [[0, 1, 2, 3]])]) == pytest.approx(expected, rel=1e-5)


LAST = ("loss_ce", "loss_vfl", "loss_mal", "loss_bbox", "loss_giou")


def test_loss_of_values_that_are_not_finite_is_undefined() -> None:
    detector = build("detr_tiny")
    loss = final_loss(detector, [[0, 1]])
    boxes = torch.full((1, 20, 4), torch.nan)
    loss.add(detector, torch.zeros((1, 20, 4)), boxes, collate(examples((1,))).labels)
    assert mean_loss(detector, [loss]) is None
    assert mean_loss(detector, []) is None
