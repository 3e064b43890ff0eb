"""The loss in units of the global batch, whichever way the batch is cut into ranks and micro-batches.

transformers divides each term by what its own micro-batch holds: the number of boxes, or, where classes are a
softmax, the weights of its queries. The mean of such quotients over ranks is not the quotient of the whole batch. So
each term is multiplied by (local divisor / global divisor), after which terms add up over ranks and micro-batches.
D-FINE's distillation term alone is no such quotient; it is computed anew from the model's outputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from raydet.collate import Batch
from raydet.models import Detector

_DISTILLATION_TEMPERATURE = 5.0
"""D-FINE's; transformers has it as a default argument, not in the config."""


@dataclass(frozen=True)
class Normaliser:
    """What loss terms are divided by: sums over images, and so additive over micro-batches and ranks.

    Attributes:
        num_boxes: Boxes to learn.
        class_weight: For softmax families: 1 for each query that is matched to a box, the config's weight of "no
            object" for each other.
        num_matched: Queries that are matched to a box; fewer than boxes where an image has more of these than queries.
        num_queries: All queries.
    """

    num_boxes: float
    class_weight: float
    num_matched: float = 0.0
    num_queries: float = 0.0

    def to_tensor(self) -> Tensor:
        """float64 [4] on the CPU, to be summed over ranks."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> "Normaliser":
        """Reads back `to_tensor`."""
        return cls(*values.tolist())

    def __add__(self, other: "Normaliser") -> "Normaliser":
        return Normaliser(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class LossTerms:
    """The loss of one micro-batch.

    Attributes:
        total: Scalar to call `backward` on. Gradients summed over micro-batches and averaged over ranks, as
            DistributedDataParallel does, are the global batch's.
        terms: Each weighted term, detached, in units of the global batch: the sum over micro-batches and ranks is the
            global batch's value.
    """

    total: Tensor
    terms: dict[str, Tensor]


def local_normaliser(detector: Detector, batch: Batch) -> Normaliser:
    """Counts one micro-batch, from its labels and the number of queries alone."""
    counts = [len(label["class_labels"]) for label in batch.labels]
    num_matched = float(sum(min(count, detector.num_queries) for count in counts))
    num_queries = float(len(counts) * detector.num_queries)
    no_object_weight = float(getattr(detector.model.config, "eos_coefficient", 1.0))
    return Normaliser(
        num_boxes=float(sum(counts)),
        class_weight=num_matched + no_object_weight * (num_queries - num_matched),
        num_matched=num_matched,
        num_queries=num_queries,
    )


def compute_loss(
    detector: Detector,
    batch: Batch,
    *,
    global_normaliser: Normaliser,
    local: Normaliser,
    world_size: int,
    module: nn.Module | None = None,
) -> LossTerms:
    """Runs the forward pass with labels and weighs its loss terms by the global batch.

    Args:
        detector: The detector in training.
        batch: This rank's micro-batch, on the model's device.
        global_normaliser: Sum of `local_normaliser` over all ranks and micro-batches of the optimizer step.
        local: `local_normaliser` of this micro-batch.
        world_size: Ranks over which gradients are averaged.
        module: What to call instead of `detector.model`, such as the DistributedDataParallel around it.
    """
    dtype = detector.model.dtype
    labels = [{"class_labels": label["class_labels"], "boxes": label["boxes"].to(dtype)} for label in batch.labels]
    outputs = (module or detector.model)(**detector.model_inputs(batch, dtype), labels=labels)
    values = _weighted_terms(detector, outputs.loss_dict)
    box_ratio = max(local.num_boxes, 1.0) / max(global_normaliser.num_boxes, 1.0)
    class_ratio = local.class_weight / global_normaliser.class_weight
    ratios = {
        name: class_ratio if detector.family.softmax and name.startswith("loss_ce") else box_ratio for name in values
    }
    if detector.family.model_type == "d_fine":
        image_ratio = local.num_queries / global_normaliser.num_queries
        exact = _distillation_terms(detector, outputs, labels, global_normaliser)
        values |= exact
        # Denoising queries are random and their number follows the micro-batch: their mean can only be averaged.
        ratios |= {name: 1.0 if name in exact else image_ratio for name in values if name.startswith("loss_ddf")}
    scaled = {name: value * ratios[name] for name, value in values.items()}
    total = torch.stack(list(scaled.values())).sum() * world_size
    if world_size > 1:
        total = total + _no_loss_over_all_parameters(detector.model)
    return LossTerms(total, {name: value.detach() for name, value in scaled.items()})


def _weighted_terms(detector: Detector, loss_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The terms that add up to transformers' own loss for the micro-batch."""
    if not detector.family.weights_in_config:
        return dict(loss_dict)
    config = detector.model.config
    weights = {
        "loss_ce": 1.0,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    terms = {}
    for name, value in loss_dict.items():
        kind = name.rstrip("0123456789").rstrip("_")
        if kind in weights:  # cardinality_error is a measurement, not a loss
            terms[name] = value * weights[kind]
    return terms


def _distillation_terms(
    detector: Detector, outputs: Any, labels: Sequence[Mapping[str, Tensor]], global_normaliser: Normaliser
) -> dict[str, Tensor]:
    """D-FINE's distillation of each decoder layer's corners from the last layer's, divided by the global batch.

    The term weighs the mean over matched queries by the root of their number, and that over the others alike; both
    numbers are known beforehand for the whole batch, so that the two sums add up over micro-batches.
    """
    from torchvision.ops import box_convert, box_iou
    from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

    config = detector.model.config
    matcher = RTDetrHungarianMatcher(config)
    root_matched = math.sqrt(global_normaliser.num_matched)
    root_others = math.sqrt(global_normaliser.num_queries - global_normaliser.num_matched)
    num_bins = config.max_num_bins + 1
    terms: dict[str, Tensor] = {}
    for layer, auxiliary in enumerate(outputs.auxiliary_outputs):
        if "pred_corners" not in auxiliary:
            continue
        student, teacher = auxiliary["pred_corners"], auxiliary["teacher_corners"].detach()
        confidence = auxiliary["teacher_logits"].detach().sigmoid().amax(-1)
        is_matched = torch.zeros_like(confidence, dtype=torch.bool)
        for image, (queries, targets) in enumerate(matcher(auxiliary, labels)):
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


def _no_loss_over_all_parameters(model: nn.Module) -> Tensor:
    """Zero, computed from every trainable parameter.

    DistributedDataParallel waits for each of them on every rank, and a rank without boxes never uses some, such as
    the class embedding of the denoising queries.
    """
    return torch.stack([parameter.sum() for parameter in model.parameters() if parameter.requires_grad]).sum() * 0.0
