"""A criterion for LW-DETR and RF-DETR that needs no communication between ranks."""

from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

from raydet.models.families import family_of
from raydet.models.losses.terms import term_kind, term_weights


def grouped_loss(
    logits: Tensor,
    labels: list[dict[str, Tensor]],
    device: torch.device,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    enc_outputs_class: Tensor | None = None,
    enc_outputs_coord: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]]]:
    """Compute the terms that transformers' criterion has on a single rank, in training and in evaluation mode."""
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
        assert outputs_class is not None and outputs_coord is not None
        pairs = list(zip(outputs_class[:-1], outputs_coord[:-1], strict=True))
        auxiliary = [{"logits": classes, "pred_boxes": boxes} for classes, boxes in pairs]
        layers |= {f"_{number}": pair for number, pair in enumerate(pairs)}
    if enc_outputs_class is not None and enc_outputs_coord is not None:
        layers["_enc"] = (enc_outputs_class, enc_outputs_coord)
    num_boxes = max(num_groups * sum(len(label["class_labels"]) for label in labels), 1)
    terms: dict[str, Tensor] = {}
    for suffix, (classes, boxes) in layers.items():
        layer = {"logits": classes, "pred_boxes": boxes}
        matching = criterion.matcher(layer, labels, num_groups)
        for kind in criterion.losses:
            found = criterion.get_loss(kind, layer, labels, matching, num_boxes)
            terms |= {f"{name}{suffix}": value for name, value in found.items()}
    weights = term_weights(config, family_of(config.model_type, where="this model"))
    total = torch.stack([value * weights[term_kind(name)] for name, value in terms.items()]).sum()
    return total, terms, auxiliary
