"""The loss terms that transformers returns, their weights, and one term that it lacks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from raydet.models.detector import Detector, at_least_single
from raydet.models.families import Family
from raydet.models.losses.not_finite import loss_or_nan
from raydet.models.losses.partial_labels import not_labelled, silenced

Labels = Sequence[Mapping[str, Tensor]]
"""Per image: `class_labels` int64 [N] and `boxes` [N, 4], centre form relative to the image; optionally `labelled`."""


def weighted_terms(detector: Detector, loss_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weighted terms whose sum is transformers' own loss of the micro-batch."""
    if not detector.family.weights_in_config:
        return dict(loss_dict)
    weights = term_weights(detector.model.config, detector.family)
    # cardinality_error is a metric, not a loss.
    return {name: value * weights[term_kind(name)] for name, value in loss_dict.items() if term_kind(name) in weights}


def term_weights(config: Any, family: Family) -> dict[str, float]:
    """Return the weights of the terms by their kind."""
    class_weight = family.class_weight
    return {
        "loss_ce": getattr(config, "class_loss_coefficient", 1.0) if class_weight is None else class_weight,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }


def term_kind(name: str) -> str:
    """Strip the layer from the name of a term: loss_ce for loss_ce_0 and loss_ce_enc."""
    return name.removesuffix("_enc").rstrip("0123456789").rstrip("_")


class _ProposalLoss(DeformableDetrImageLoss):
    """The loss of proposals, the first class of which means "any object".

    In an image that is not labelled for all classes, a proposal that no box is matched to may be an object all the
    same, so that its classes learn nothing.
    """

    def loss_labels(self, outputs: Any, targets: Any, indices: Any, num_boxes: Any) -> Any:
        """Compute the class term, without what is unknown."""
        usual: Any = super()
        logits = outputs["logits"]
        unknown = not_labelled(targets, logits.shape[-1], logits.device)
        if unknown is not None:
            is_matched = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
            is_matched[usual._get_source_permutation_idx(indices)] = True
            is_partial = unknown.any(dim=1, keepdim=True)
            unknown[:, 0] = False
            mask = unknown[:, None] | (is_partial & ~is_matched)[..., None]
            outputs = {**outputs, "logits": silenced(logits, mask)}
        return usual.loss_labels(outputs, targets, indices, num_boxes)


def proposal_terms(detector: Detector, outputs: Any, labels: Labels) -> dict[str, Tensor]:
    """Compute the unweighted loss of the boxes that a two-stage Deformable DETR proposes; empty for other models.

    The model picks its queries among boxes that the encoder proposes, by a score that no term of transformers' loss
    trains. Its authors train the first class of a proposal to mean "any object" (Zhu et al. 2021, appendix A.4).
    """
    config = detector.model.config
    if not (detector.family.scores_proposals and config.two_stage):
        return {}
    criterion = _ProposalLoss(  # type: ignore[no-untyped-call]
        matcher=DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
        num_classes=config.num_labels,
        focal_alpha=config.focal_alpha,
        losses=["labels", "boxes"],
    )
    proposals = {
        "logits": at_least_single(outputs.enc_outputs_class),
        "pred_boxes": outputs.enc_outputs_coord_logits.sigmoid(),
    }
    objects = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    terms = loss_or_nan(lambda outputs: criterion(outputs, objects), proposals)
    return {f"{name}_enc": value for name, value in terms.items()}
