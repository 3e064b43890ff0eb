"""The distillation loss of D-FINE and DEIMv2, whose decoder layers learn box distributions from the last layer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert, box_iou
from transformers.loss.loss_deimv2 import Deimv2Loss

from raydet.models.detector import Detector
from raydet.models.losses.criterion import Matching, uses_dense_matching
from raydet.models.losses.terms import Labels

_DISTILLATION_TEMPERATURE = 5.0
"""Temperature of D-FINE and DEIMv2; transformers has it as a default argument rather than in the config."""

DENSE_TERMS = ("loss_bbox", "loss_giou", "loss_fgl")
"""Prefixes of the terms that a query learns as soon as any layer has matched it."""


def is_dense(detector: Detector) -> bool:
    """Return True if every layer learns the boxes that any layer matches to a query, as in D-FINE and DEIMv2."""
    return uses_dense_matching(detector.model.config, detector.family)


def matchings_of_layers(detector: Detector, outputs: Any) -> list[Matching]:
    """Return the matching that the box and distribution terms of each auxiliary output of the latest pass learn."""
    keeper: Any = detector.model.loss_function
    last, *own = keeper.matchings
    assert len(own) == len(outputs.auxiliary_outputs), "the criterion matches each output once, in order"
    if not is_dense(detector):
        return list(own)
    union: Matching = Deimv2Loss._get_dense_o2o_indices(None, last, own)  # type: ignore[arg-type]
    return [union] * len(own)


def distillation_terms(
    detector: Detector,
    outputs: Any,
    labels: Labels,
    matchings: Sequence[Matching],
    *,
    num_matched: float,
    num_queries: float,
) -> dict[str, Tensor]:
    """Compute the loss of each decoder layer's corners against those of the last layer, for the global batch.

    The loss weights the mean over matched queries by the square root of their number, and the mean over the other
    queries in the same way. With both numbers taken from the global batch, the two sums add up over micro-batches.

    Args:
        detector: Detector of a family that distils.
        outputs: Outputs of the forward pass, in training mode.
        labels: Labels of each image.
        matchings: Result of `matchings_of_layers`, one per auxiliary output.
        num_matched: Matched queries in the global batch.
        num_queries: All queries in the global batch.
    """
    config = detector.model.config
    root_matched, root_others = math.sqrt(num_matched), math.sqrt(num_queries - num_matched)
    num_bins = config.max_num_bins + 1
    terms: dict[str, Tensor] = {}
    for layer, (auxiliary, matching) in enumerate(zip(outputs.auxiliary_outputs, matchings, strict=True)):
        if "pred_corners" not in auxiliary:
            continue
        student, teacher = auxiliary["pred_corners"], auxiliary["teacher_corners"].detach()
        confidence = auxiliary["teacher_logits"].detach().sigmoid().amax(-1)
        is_matched = torch.zeros_like(confidence, dtype=torch.bool)
        for image, (queries, targets) in enumerate(matching):
            is_matched[image, queries] = True
            iou = box_iou(
                box_convert(auxiliary["pred_boxes"][image, queries].detach(), "cxcywh", "xyxy"),
                box_convert(labels[image]["boxes"][targets], "cxcywh", "xyxy"),
            )
            confidence[image, queries] = iou.diagonal().to(confidence.dtype)
        shape = (*confidence.shape, 4, num_bins)
        divergence = functional.kl_div(
            (student.reshape(shape) / _DISTILLATION_TEMPERATURE).log_softmax(-1),
            (teacher.reshape(shape) / _DISTILLATION_TEMPERATURE).softmax(-1),
            reduction="none",
        ).sum(-1)
        per_query = confidence * _DISTILLATION_TEMPERATURE**2 * divergence.mean(-1)
        matched_mean = per_query[is_matched].sum() / max(root_matched, 1.0)
        others_mean = per_query[~is_matched].sum() / max(root_others, 1.0)
        value = (matched_mean + others_mean) / (root_matched + root_others)
        terms[f"loss_ddf_aux_{layer}"] = value * config.weight_loss_ddf
    return terms
