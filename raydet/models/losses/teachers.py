"""Loss terms of what teachers found: soft classes and boxes, of any family, for a student of any family.

A teacher's boxes are matched one to one to the queries of the student's last decoder layer, by the costs of the
student's own matcher with a soft class instead of a label. A matched query learns the teacher's class scores and box,
weighted by the teacher's highest score:

- Sigmoid scores learn by the quality focal loss, |y − σ|² · BCE(σ, y) (Li et al. 2020, "Generalized Focal Loss").
- Softmax scores learn by the Kullback-Leibler divergence from the teacher's distribution, whose rest is "no object".

Where the labels do not say what else an image shows, the other queries learn that they show none of the classes that
the teacher knows and the image is not labelled for. Classes that the teacher does not know learn nothing from it.

All terms are sums over boxes divided by the sum of their weights in the global batch, so that they add up over ranks
and micro-batches.
"""

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert, generalized_box_iou

from raydet.models.collate import TAUGHT, Batch
from raydet.models.detector import Detector, at_least_single
from raydet.models.losses.partial_labels import joined_to_no_object, not_labelled
from raydet.models.losses.terms import Labels, term_weights

_BOXES, _SCORES, _OWNERS, _WEIGHTS = (TAUGHT[name] for name in ("boxes_cxcywh", "class_scores", "owners", "weights"))
_ALPHA, _GAMMA = 0.25, 2.0
"""Of the focal class cost, in all families."""
_EPSILON = 1e-8


def taught_weight(batch: Batch) -> float:
    """Return the sum of the weights of a micro-batch's teacher boxes, the divisor of their loss terms."""
    return sum(float(_weights_of(label).sum()) for label in batch.labels if _BOXES in label)


def teacher_terms(detector: Detector, outputs: Any, labels: Labels, *, weight: float) -> dict[str, Tensor]:
    """Compute the weighted loss terms of the teachers for the global batch.

    Args:
        detector: The student, in training mode.
        outputs: Outputs of the forward pass.
        labels: Labels of each image, with what teachers found.
        weight: Sum of `taught_weight` over the global batch.

    Returns:
        Scalars `teacher_class`, `teacher_bbox` and `teacher_giou`; empty if no image has a teacher.
    """
    if not any(_BOXES in label for label in labels):
        return {}
    num_queries, softmax = detector.num_queries, detector.family.softmax
    logits, boxes = at_least_single(outputs.logits), at_least_single(outputs.pred_boxes)
    # Denoising queries come first; LW-DETR and RF-DETR repeat their queries for each group.
    num_groups = logits.shape[1] // num_queries if detector.family.local_criterion else 1
    logits, boxes = (values[:, -num_groups * num_queries :] for values in (logits, boxes))
    unlabelled = not_labelled(labels, logits.shape[-1] - softmax, logits.device)
    sums = {name: logits.sum() * 0.0 for name in ("class", "bbox", "giou")}
    for group in range(num_groups):
        own = slice(group * num_queries, (group + 1) * num_queries)
        for image, label in enumerate(labels):
            if _BOXES in label:
                unknown = None if unlabelled is None else unlabelled[image]
                values = _of_image(detector, logits[image, own], boxes[image, own], label, unknown)
                sums = {name: sums[name] + value for name, value in values.items()}
    weights = term_weights(detector.model.config, detector.family) if _has_coefficients(detector) else _DEFAULTS
    names = {"class": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou"}
    divisor = max(weight, 1.0) * num_groups
    return {f"teacher_{name}": value * (weights[names[name]] / divisor) for name, value in sums.items()}


_DEFAULTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def _has_coefficients(detector: Detector) -> bool:
    return hasattr(detector.model.config, "bbox_loss_coefficient")


def _weights_of(label: Any) -> Tensor:
    """Return the weight of each of an image's teacher boxes, float32 [T]."""
    scores = label[_SCORES].float().nan_to_num(0.0)
    highest = scores.amax(dim=1) if len(scores) else scores.new_zeros(0)
    weights: Tensor = highest * label[_WEIGHTS][label[_OWNERS]]
    return weights


def _of_image(
    detector: Detector, logits: Tensor, boxes: Tensor, label: Any, unlabelled: Tensor | None
) -> dict[str, Tensor]:
    """Return the sums of the terms over the teachers of one image.

    Args:
        detector: The student.
        logits: [Q, C], for softmax families with "no object" as the last class.
        boxes: Relative to the image, centre form [Q, 4].
        label: What the teachers found.
        unlabelled: Mask of the classes that the image is not labelled for, [C]; None if it is labelled for all.
    """
    sums = {name: logits.new_zeros(()) for name in ("class", "bbox", "giou")}
    weights = _weights_of(label)
    for number, teacher_weight in enumerate(label[_WEIGHTS].tolist()):
        if teacher_weight == 0:
            continue
        own = label[_OWNERS] == number
        targets, scores = label[_BOXES][own].to(boxes.dtype), label[_SCORES][own].to(logits.dtype)
        known = ~scores[0].isnan() if len(scores) else torch.ones_like(logits[0, : scores.shape[-1]], dtype=torch.bool)
        queries, places = _matched(detector, logits, boxes, targets, scores.nan_to_num(0.0))
        sums["class"] = sums["class"] + _class_loss(
            detector,
            logits,
            queries,
            scores[places].nan_to_num(0.0),
            weights[own][places],
            known=known,
            unlabelled=unlabelled,
            teacher_weight=teacher_weight,
        )
        if len(queries):
            weight, found, wanted = weights[own][places], boxes[queries], targets[places]
            sums["bbox"] = sums["bbox"] + (weight * (found - wanted).abs().sum(-1)).sum()
            overlap = generalized_box_iou(*(box_convert(one, "cxcywh", "xyxy") for one in (found, wanted))).diagonal()
            sums["giou"] = sums["giou"] + (weight * (1 - overlap)).sum()
    return sums


@torch.no_grad()
def _matched(
    detector: Detector, logits: Tensor, boxes: Tensor, targets: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Match the boxes of one teacher to queries; return the indices of both, int64 [M]."""
    config = detector.model.config
    class_cost, bbox_cost, giou_cost = (
        getattr(config, f"matcher_{name}", getattr(config, name, default))
        for name, default in (("class_cost", 2.0), ("bbox_cost", 5.0), ("giou_cost", 2.0))
    )
    if not len(targets):
        nothing = torch.zeros(0, dtype=torch.int64, device=logits.device)
        return nothing, nothing
    if detector.family.softmax:
        of_class = -logits.softmax(-1)[:, :-1] @ scores.T
    else:
        found = logits.sigmoid()
        gain = _ALPHA * (1 - found) ** _GAMMA * -(found + _EPSILON).log()
        loss = (1 - _ALPHA) * found**_GAMMA * -(1 - found + _EPSILON).log()
        of_class = (gain - loss) @ scores.T
    distance = torch.cdist(boxes, targets, p=1)
    overlap = generalized_box_iou(*(box_convert(one, "cxcywh", "xyxy") for one in (boxes, targets)))
    cost = class_cost * of_class + bbox_cost * distance - giou_cost * overlap
    rows, columns = linear_sum_assignment(cost.nan_to_num(1e4).cpu().numpy())
    return torch.as_tensor(rows, device=logits.device), torch.as_tensor(columns, device=logits.device)


def _class_loss(
    detector: Detector,
    logits: Tensor,
    queries: Tensor,
    scores: Tensor,
    weights: Tensor,
    *,
    known: Tensor,
    unlabelled: Tensor | None,
    teacher_weight: float,
) -> Tensor:
    """Return the sum of the class loss of matched and of other queries.

    Args:
        detector: The student.
        logits: [Q, C].
        queries: Matched queries, [M].
        scores: The teacher's scores for them, [M, C].
        weights: Weights of the matched queries, [M].
        known: Mask of the classes that the teacher knows, [C].
        unlabelled: Mask of the classes that the image is not labelled for, [C]; None if it is labelled for all.
        teacher_weight: Weight of the teacher, and of a query without a match.
    """
    others = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    others[queries] = False
    if detector.family.softmax:
        loss = (weights * _divergence(logits[queries], scores, known)).sum()
        if unlabelled is not None and bool((unlabelled & known).any()):
            silent = joined_to_no_object(logits[others], ~(unlabelled & known))
            nothing = -silent.log_softmax(-1)[:, -1]
            weight = getattr(detector.model.config, "eos_coefficient", 1.0) * teacher_weight
            loss = loss + weight * nothing.sum()
        return loss
    loss = (weights[:, None] * _quality_focal(logits[queries], scores) * known).sum()
    if unlabelled is not None:
        wanted = torch.zeros_like(logits[others])
        loss = loss + teacher_weight * (_quality_focal(logits[others], wanted) * (unlabelled & known)).sum()
    return loss


def _quality_focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the quality focal loss of each score, [N, C]."""
    difference = (wanted - logits.sigmoid().detach()).abs()
    return difference**_GAMMA * functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def _divergence(logits: Tensor, scores: Tensor, known: Tensor) -> Tensor:
    """Return the divergence of each query's distribution from the teacher's, [M]; unknown classes count as no object.

    The scores of a sigmoid family may add up to more than 1 and are then divided by their sum.
    """
    found = joined_to_no_object(logits, ~known).log_softmax(-1)
    wanted = scores * known
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1.0)
    wanted = torch.cat([wanted, 1 - wanted.sum(-1, keepdim=True)], dim=-1).clamp(min=0.0)
    return functional.kl_div(found, wanted, reduction="none").sum(-1)
