"""A criterion for LW-DETR and RF-DETR that needs no communication between ranks."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

from raydet.models.families import family_of
from raydet.models.losses.terms import at_least_single, term_kind, term_weights


def keep_loss_local(model: PreTrainedModel) -> None:
    """Replace a criterion that sums over ranks with one that does not; leave other models alone."""
    if family_of(model.config.model_type, where="this model").local_criterion:
        model.loss_function = _grouped_loss


def _grouped_loss(
    logits: Tensor,
    labels: list[dict[str, Tensor]],
    device: torch.device,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor,
    outputs_coord: Tensor,
    enc_outputs_class: Tensor,
    enc_outputs_coord: Tensor,
    **_: Any,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]]]:
    """Compute the terms that transformers' criterion has on a single rank, in training and in evaluation mode.

    The computation is at least in single precision: a score that half precision rounds to 1 makes the loss infinite.
    """
    # In training the queries are repeated for each group.
    num_groups = logits.shape[1] // config.num_queries
    criterion = LwDetrImageLoss(
        matcher=LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
        num_classes=config.num_labels,
        focal_alpha=config.focal_alpha,
        losses=["labels", "boxes"],
        group_detr=num_groups,
    )
    layers = {"": (logits, pred_boxes)}
    auxiliary: list[dict[str, Tensor]] = []
    if config.auxiliary_loss:
        pairs = list(zip(outputs_class[:-1], outputs_coord[:-1], strict=True))
        auxiliary = [{"logits": classes, "pred_boxes": boxes} for classes, boxes in pairs]
        layers |= {f"_{number}": pair for number, pair in enumerate(pairs)}
    layers["_enc"] = (enc_outputs_class, enc_outputs_coord)
    num_boxes = max(num_groups * sum(len(label["class_labels"]) for label in labels), 1)
    terms: dict[str, Tensor] = {}
    for suffix, (classes, boxes) in layers.items():
        layer = {"logits": at_least_single(classes), "pred_boxes": at_least_single(boxes)}
        matching = criterion.matcher(layer, labels, num_groups)
        for kind in criterion.losses:
            found = criterion.get_loss(kind, layer, labels, matching, num_boxes)
            terms |= {f"{name}{suffix}": value for name, value in found.items()}
    weights = term_weights(config)
    total = torch.stack([value * weights[term_kind(name)] for name, value in terms.items()]).sum()
    return total, terms, auxiliary
