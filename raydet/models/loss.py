"""The loss in units of the global batch, whichever way the batch is cut into ranks and micro-batches.

transformers divides each term by what its own micro-batch holds: the number of boxes, or, where classes are a
softmax, the weights of its queries. The mean of such quotients over ranks is not the quotient of the whole batch. So
each term is multiplied by (local divisor / global divisor), after which terms add up over ranks and micro-batches.
Three things need more than that:

- LW-DETR's and RF-DETR's criterion sums its divisor over the ranks, so that a forward pass on one rank would hang,
  and always thinks that it is training. It is given a loop of its own, with the same terms (`keep_loss_local`).
- The distillation term of D-FINE and DEIMv2 is no such quotient; it is computed anew from the model's outputs.
- DEIMv2 divides the terms of boxes by the number of queries that any decoder layer matches to a box, which only the
  forward pass tells. The ranks sum it up after theirs. A step of several micro-batches would need those of all of
  them before the first backward pass; so here, and only here, each micro-batch is divided by its own number and
  weighed by its boxes. `use_dense_one_to_one: false` in the model's config has no such number and no such exception.

One thing transformers leaves out: a two-stage Deformable DETR chooses its queries among boxes that the encoder
proposes, by a score that no term of transformers' loss reaches. Here the proposals learn as its authors have it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_convert, box_iou
from transformers import PreTrainedModel
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.loss.loss_deimv2 import Deimv2Loss
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from raydet.models.collate import Batch
from raydet.models.detector import Detector

_DISTILLATION_TEMPERATURE = 5.0
"""D-FINE's and DEIMv2's; transformers has it as a default argument, not in the config."""

_Labels = Sequence[Mapping[str, Tensor]]
_Matching = list[tuple[Tensor, Tensor]]
"""For each image, the queries that are matched and the boxes that they are matched to."""


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
        world_size: Ranks over which gradients are averaged. Where there are several, each must call this once for each
            of its micro-batches: DEIMv2 has a number to sum up.
        module: What to call instead of `detector.model`, such as the DistributedDataParallel around it.
    """
    dtype = detector.model.dtype
    labels = [{"class_labels": label["class_labels"], "boxes": label["boxes"].to(dtype)} for label in batch.labels]
    outputs = (module or detector.model)(**detector.model_inputs(batch, dtype), labels=labels)
    values = _weighted_terms(detector, outputs.loss_dict | _proposal_terms(detector, outputs, labels))
    ratios = _ratios(detector, values, global_normaliser, local)
    if detector.family.distils:
        matchings, num_matched = _matchings(detector, outputs, labels), global_normaliser.num_matched
        if _is_dense(detector):
            ratio, num_matched = _dense_ratio(matchings[0], local, global_normaliser, world_size)
            ratios |= {name: ratio for name in values if name.startswith(_DENSE_TERMS) and "_dn_" not in name}
        exact = _distillation_terms(detector, outputs, labels, matchings, num_matched, global_normaliser.num_queries)
        values |= exact
        ratios |= dict.fromkeys(exact, 1.0)
    scaled = {name: value * ratios[name] for name, value in values.items()}
    total = torch.stack(list(scaled.values())).sum() * world_size + _no_loss_over_all_parameters(detector.model)
    return LossTerms(total, {name: value.detach() for name, value in scaled.items()})


def _proposal_terms(detector: Detector, outputs: Any, labels: _Labels) -> dict[str, Tensor]:
    """What the boxes that a two-stage Deformable DETR proposes are to learn, without weights; nothing for other models.

    The first class of a proposal says that there is an object, of whichever class (Zhu et al. 2021, appendix A.4).
    """
    config = detector.model.config
    if config.model_type != "deformable_detr" or not config.two_stage:
        return {}
    criterion = DeformableDetrImageLoss(
        matcher=DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
        num_classes=config.num_labels,
        focal_alpha=config.focal_alpha,
        losses=["labels", "boxes"],
    )
    proposals = {
        "logits": _at_least_single(outputs.enc_outputs_class),
        "pred_boxes": _at_least_single(outputs.enc_outputs_coord_logits).sigmoid(),
    }
    objects = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    return {f"{name}_enc": value for name, value in criterion(proposals, objects).items()}


def keep_loss_local(model: PreTrainedModel) -> None:
    """Gives LW-DETR and RF-DETR a loss that talks to no other rank; leaves other models as they are."""
    if model.config.model_type in ("lw_detr", "rf_detr"):
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
    """What transformers' loss of LW-DETR and RF-DETR is on one rank, in training and in evaluation mode alike.

    In single precision at least: a score that half precision rounds to 1 would make the loss infinite.
    """
    # The queries are there once for each group in training, else once.
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
        layer = {"logits": _at_least_single(classes), "pred_boxes": _at_least_single(boxes)}
        matching = criterion.matcher(layer, labels, num_groups)
        for kind in criterion.losses:
            found = criterion.get_loss(kind, layer, labels, matching, num_boxes)
            terms |= {f"{name}{suffix}": value for name, value in found.items()}
    weights = _weights(config)
    total = torch.stack([value * weights[_kind(name)] for name, value in terms.items()]).sum()
    return total, terms, auxiliary


def _at_least_single(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _ratios(
    detector: Detector, names: Iterable[str], global_normaliser: Normaliser, local: Normaliser
) -> dict[str, float]:
    """What transformers divides each term by in this micro-batch, over what the global batch is to be divided by."""
    config = detector.model.config
    num_groups = float(getattr(config, "group_detr", 1)) if detector.model.training else 1.0
    box_ratio = max(num_groups * local.num_boxes, 1.0) / max(num_groups * global_normaliser.num_boxes, 1.0)
    class_ratio = local.class_weight / global_normaliser.class_weight
    image_ratio = local.num_queries / global_normaliser.num_queries
    ratios = {}
    for name in names:
        if detector.family.softmax and name.startswith("loss_ce"):
            ratios[name] = class_ratio
        elif name.startswith("loss_ddf"):
            # Denoising queries are random and their number follows the micro-batch: their mean can only be averaged.
            ratios[name] = image_ratio
        else:
            ratios[name] = box_ratio
    return ratios


def _weighted_terms(detector: Detector, loss_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The terms that add up to transformers' own loss for the micro-batch."""
    if not detector.family.weights_in_config:
        return dict(loss_dict)
    weights = _weights(detector.model.config)
    # cardinality_error is a measurement, not a loss
    return {name: value * weights[_kind(name)] for name, value in loss_dict.items() if _kind(name) in weights}


def _weights(config: Any) -> dict[str, float]:
    return {
        "loss_ce": getattr(config, "class_loss_coefficient", 1.0),
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }


def _kind(name: str) -> str:
    """A term's name without its layer: loss_ce of loss_ce_0 and of loss_ce_enc."""
    return name.removesuffix("_enc").rstrip("0123456789").rstrip("_")


_DENSE_TERMS = ("loss_bbox", "loss_giou", "loss_fgl")
"""DEIMv2's terms that each query learns by which any layer has matched."""


def _is_dense(detector: Detector) -> bool:
    return bool(getattr(detector.model.config, "use_dense_one_to_one", False))


def _matchings(detector: Detector, outputs: Any, labels: _Labels) -> list[_Matching]:
    """For each auxiliary output, which boxes its queries learn in the terms of boxes and of distributions."""
    config = detector.model.config
    matcher = RTDetrHungarianMatcher(config)
    own: list[_Matching] = [matcher(auxiliary, labels) for auxiliary in outputs.auxiliary_outputs]
    if not _is_dense(detector):
        return own
    last = {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes.clamp(0, 1)}
    if outputs.denoising_meta_values is not None:
        num_split = outputs.denoising_meta_values["dn_num_split"]
        last = {name: value.split(num_split, dim=1)[1] for name, value in last.items()}
    union: _Matching = Deimv2Loss(config)._get_dense_o2o_indices(matcher(last, labels), own)
    return [union] * len(own)


def _dense_ratio(
    union: _Matching, local: Normaliser, global_normaliser: Normaliser, world_size: int
) -> tuple[float, float]:
    """Local divisor over global divisor of DEIMv2's dense terms, and the matched queries of the global batch.

    The ranks sum up their matched queries. With one micro-batch a step these are the global batch's; with more, the
    global batch is taken to have as many for each box as this round.
    """
    counts = torch.tensor([float(sum(len(queries) for queries, _ in union)), local.num_boxes], dtype=torch.float64)
    num_local = float(counts[0])
    if world_size > 1:
        backend_device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        counts = counts.to(backend_device)
        dist.all_reduce(counts)
    num_round, num_boxes_round = counts.tolist()
    rounds = global_normaliser.num_boxes / num_boxes_round if num_boxes_round else 1.0
    num_matched = min(num_round * rounds, global_normaliser.num_queries)
    return max(num_local, 1.0) / max(num_matched, 1.0), num_matched


def _distillation_terms(
    detector: Detector,
    outputs: Any,
    labels: _Labels,
    matchings: Sequence[_Matching],
    num_matched: float,
    num_queries: float,
) -> dict[str, Tensor]:
    """Distillation of each decoder layer's corners from the last layer's, divided by the global batch.

    The term weighs the mean over matched queries by the root of their number, and that over the others alike; both
    numbers are known for the whole batch, so that the two sums add up over micro-batches.
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


def _no_loss_over_all_parameters(model: nn.Module) -> Tensor:
    """Zero, computed from every trainable parameter, so that each has a gradient.

    DistributedDataParallel waits for each of them on every rank, and a rank without boxes never uses some, such as
    the class embedding of the denoising queries. On one rank too: an optimizer treats a gradient of zero otherwise
    than none.
    """
    return torch.stack([parameter.sum() for parameter in model.parameters() if parameter.requires_grad]).sum() * 0.0
