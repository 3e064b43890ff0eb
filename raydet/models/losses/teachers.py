"""Loss terms of what teachers found: soft classes and boxes, of any family, for a student of any family.

A teacher's boxes are matched one to one to the queries of each decoder layer and, where the model has them, of the
encoder, by the costs of the student's own matcher with a soft class instead of a label. A matched query learns the
teacher's class scores and box, weighted by the square of the teacher's highest score for it. Unsquared, the dozens of
faint boxes that a teacher has in each image would have half of the weight:

- Sigmoid scores learn by the quality focal loss, |y − σ|² · BCE(σ, y) (Li et al. 2020, "Generalized Focal Loss"). The
  factor |y − σ|² counts as a constant in the gradient, as the weights of RT-DETR's varifocal loss do.
- Softmax scores learn by the Kullback-Leibler divergence from the teacher's distribution, whose rest is "no object".

In classes that an image is not labelled for, all queries count fully: those with a box learn its scores, however low,
and the others that they show none of these classes. Classes that the teacher does not know learn nothing from it.

All terms are sums over boxes, weighted by the teacher's weight and the squared score, and divided by the sum of the
squared scores in the global batch, so that they add up over ranks and micro-batches.
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

_BOXES, _SCORES, _OWNERS = (TAUGHT[name] for name in ("boxes_cxcywh", "class_scores", "owners"))
_WEIGHTS, _KNOWN = TAUGHT["weights"], TAUGHT["known"]
_ALPHA, _GAMMA = 0.25, 2.0
"""Of the focal class cost, in all families."""
_EPSILON = 1e-8
_WEIGHTS_OF_TERMS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
"""In families whose own terms come weighted."""


def taught_weight(batch: Batch) -> float:
    """Return the sum of the squared scores of a micro-batch's teacher boxes, the divisor of their loss terms."""
    return sum(float(_squared(label).sum()) for label in batch.labels if _BOXES in label)


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
    layers = [(outputs.logits, outputs.pred_boxes)]
    criterion: Any = detector.model.loss_function
    auxiliary = criterion.auxiliary or getattr(outputs, "auxiliary_outputs", None) or ()
    layers += [(one["logits"], one["pred_boxes"]) for one in auxiliary]
    unlabelled = not_labelled(labels, outputs.logits.shape[-1] - detector.family.softmax, outputs.logits.device)
    sums = {name: at_least_single(outputs.logits).sum() * 0.0 for name in ("class", "bbox", "giou")}
    for layer_logits, layer_boxes in layers:
        groups = _groups(detector, at_least_single(layer_logits), at_least_single(layer_boxes))
        for logits, boxes in groups:
            for image, label in enumerate(labels):
                if _BOXES in label:
                    unknown = None if unlabelled is None else unlabelled[image]
                    values = _of_image(detector, logits[image], boxes[image], label, unknown)
                    sums = {name: sums[name] + value / len(groups) for name, value in values.items()}
    family = detector.family
    weights = term_weights(detector.model.config, family) if family.weights_in_config else _WEIGHTS_OF_TERMS
    names = {"class": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou"}
    return {f"teacher_{name}": value * (weights[names[name]] / max(weight, 1.0)) for name, value in sums.items()}


def _groups(detector: Detector, logits: Tensor, boxes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the queries of a layer without those of denoising, which come first, one group after another.

    Only LW-DETR and RF-DETR have several groups.
    """
    num_queries = detector.num_queries
    num_groups = logits.shape[1] // num_queries if detector.family.local_criterion else 1
    both = (values[:, -num_groups * num_queries :].split(num_queries, dim=1) for values in (logits, boxes))
    return list(zip(*both, strict=True))


def _squared(label: Any) -> Tensor:
    """Return the square of the highest score of each of an image's teacher boxes, float32 [T]."""
    scores = label[_SCORES].float()
    squared: Tensor = scores.amax(dim=1).square() if len(scores) else scores.new_zeros(0)
    return squared


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
    weights = _squared(label) * label[_WEIGHTS][label[_OWNERS]]
    for number, teacher_weight in enumerate(label[_WEIGHTS].tolist()):
        if teacher_weight == 0:
            continue
        own = label[_OWNERS] == number
        targets, scores = label[_BOXES][own].to(boxes.dtype), label[_SCORES][own].to(logits.dtype)
        queries, places = _matched(detector, logits, boxes, targets, scores)
        sums["class"] = sums["class"] + _class_loss(
            detector,
            logits,
            queries,
            scores[places],
            weights[own][places],
            known=label[_KNOWN][number],
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
    """Match the boxes of one teacher to queries; return the indices of both, int64 [M].

    The score of a box weights its costs, so that a query goes to the object rather than to a faint repetition of it. If
    there are more boxes than queries, those with the highest scores are matched.
    """
    config = detector.model.config
    class_cost, bbox_cost, giou_cost = (
        getattr(config, f"matcher_{name}", getattr(config, name, default))
        for name, default in (("class_cost", 2.0), ("bbox_cost", 5.0), ("giou_cost", 2.0))
    )
    best = scores.amax(dim=1).topk(min(len(scores), len(logits))).indices if len(targets) else None
    if best is None:
        nothing = torch.zeros(0, dtype=torch.int64, device=logits.device)
        return nothing, nothing
    targets, scores = targets[best], scores[best]
    if detector.family.softmax:
        of_class = -logits.softmax(-1)[:, :-1] @ scores.T
    else:
        found = logits.sigmoid()
        gain = _ALPHA * (1 - found) ** _GAMMA * -(found + _EPSILON).log()
        loss = (1 - _ALPHA) * found**_GAMMA * -(1 - found + _EPSILON).log()
        of_class = (gain - loss) @ scores.T
    distance = torch.cdist(boxes, targets, p=1)
    overlap = generalized_box_iou(*(box_convert(one, "cxcywh", "xyxy") for one in (boxes, targets)))
    cost = (class_cost * of_class + bbox_cost * distance - giou_cost * overlap) * scores.amax(dim=1)
    rows, columns = linear_sum_assignment(cost.nan_to_num(1e4).cpu().numpy())
    return torch.as_tensor(rows, device=logits.device), best[torch.as_tensor(columns, device=logits.device)]


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
    taught_alone = None if unlabelled is None else unlabelled & known  # classes of which the labels say nothing
    if detector.family.softmax:
        if taught_alone is None or not taught_alone.any():
            return (weights * _divergence(logits[queries], scores, known)).sum()
        nothing = -joined_to_no_object(logits[others], ~taught_alone).log_softmax(-1)[:, -1]
        weight = getattr(detector.model.config, "eos_coefficient", 1.0)
        return teacher_weight * (_divergence(logits[queries], scores, known).sum() + weight * nothing.sum())
    of_matched = _quality_focal(logits[queries], scores)
    if taught_alone is None:
        return (weights[:, None] * of_matched * known).sum()
    of_others = _quality_focal(logits[others], torch.zeros_like(logits[others]))
    matched = (torch.where(taught_alone, teacher_weight, weights[:, None]) * of_matched * known).sum()
    return matched + teacher_weight * (of_others * taught_alone).sum()


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
