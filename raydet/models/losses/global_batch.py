"""The loss in units of the global batch, however the batch is cut into ranks and micro-batches.

transformers divides each term by the size of its own micro-batch: the number of boxes or, for softmax families, the
class weights of the queries. The mean of such quotients over ranks is not the quotient of the complete batch. This
module therefore multiplies each term by (local divisor / global divisor), after which terms add up over ranks and
micro-batches. Three cases need more:

- The criterion of LW-DETR and RF-DETR sums its divisor over the ranks, so that a forward pass on a single rank would
  hang, and it always assumes training mode. `grouped.py` replaces it.
- The distillation term of D-FINE and DEIMv2 is not such a quotient. `distillation.py` recomputes it.
- D-FINE and DEIMv2 divide the box terms by the number of queries that any decoder layer matches to a box, which is
  known only after the forward pass; the ranks then sum it. A step of several micro-batches would need the counts of all
  of them before the first backward pass. Here, and only here, each micro-batch is divided by its own number and
  weighted by its boxes. With `use_dense_one_to_one: false` in the model's config the exception does not apply.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydet.models.collate import Batch
from raydet.models.detector import Detector
from raydet.models.losses.criterion import Matching
from raydet.models.losses.distillation import DENSE_TERMS, distillation_terms, is_dense, matchings_of_layers
from raydet.models.losses.left_out import zero_over_left_out_parameters
from raydet.models.losses.teachers import teacher_terms
from raydet.models.losses.terms import Labels, proposal_terms, weighted_terms


@dataclass(frozen=True)
class Normaliser:
    """Divisors of loss terms. All are sums over images, so that they add up over micro-batches and ranks.

    Attributes:
        num_boxes: Labelled boxes.
        class_weight: For softmax families: 1 per query matched to a box plus the config's weight of "no object" per
            other query.
        num_matched: Queries matched to a box; fewer than boxes if an image has more boxes than queries.
        num_queries: All queries.
        taught_weight: Sum of the squared highest scores of the boxes of teachers.
    """

    num_boxes: float
    class_weight: float
    num_matched: float = 0.0
    num_queries: float = 0.0
    taught_weight: float = 0.0

    def to_tensor(self) -> Tensor:
        """Return the divisors as float64 [5] on the CPU, to be summed over ranks."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    def __add__(self, other: "Normaliser") -> "Normaliser":
        return Normaliser(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class LossTerms:
    """The loss of one micro-batch.

    Attributes:
        total: Scalar to call `backward` on. Its gradients, summed over micro-batches and averaged over ranks as
            DistributedDataParallel does, equal those of the global batch.
        terms: Each weighted term, detached. Summed over micro-batches and ranks it is the global batch's value.
    """

    total: Tensor
    terms: dict[str, Tensor]


def local_normaliser(detector: Detector, batch: Batch) -> Normaliser:
    """Count the divisors of one micro-batch from its labels and the number of queries, without those of teachers."""
    return normaliser_of(detector, [len(label["class_labels"]) for label in batch.labels])


def normaliser_of(detector: Detector, counts: Sequence[int]) -> Normaliser:
    """Count the divisors of images with these numbers of boxes."""
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
    """Run the forward pass with labels and scale its loss terms to the global batch.

    Args:
        detector: The detector in training.
        batch: This rank's micro-batch, on the model's device.
        global_normaliser: Sum of `step_normaliser` over all ranks of the optimizer step.
        local: `local_normaliser` of this micro-batch.
        world_size: Ranks over which gradients are averaged. All ranks must call this function equally often, since
            D-FINE and DEIMv2 sum a number over them.
        module: Called instead of `detector.model`: the DistributedDataParallel around it.
    """
    dtype = detector.model.dtype
    labels = [{**label, "boxes": label["boxes"].to(dtype)} for label in batch.labels]
    outputs = (module or detector.model)(**detector.model_inputs(batch, dtype), labels=labels)
    with torch.autocast(detector.device.type, enabled=False):  # the loss is in single precision, whatever the model is
        return _scaled_terms(detector, outputs, labels, global_normaliser, local, world_size)


def _scaled_terms(
    detector: Detector, outputs: Any, labels: Labels, global_normaliser: Normaliser, local: Normaliser, world_size: int
) -> LossTerms:
    values = weighted_terms(detector, outputs.loss_dict | proposal_terms(detector, outputs, labels))
    ratios = _ratios(detector, values, global_normaliser, local)
    if detector.family.distils:
        matchings, num_matched = matchings_of_layers(detector, outputs), global_normaliser.num_matched
        if is_dense(detector):
            ratio, num_matched = _dense_ratio(matchings[0], local, global_normaliser, world_size)
            ratios |= {name: ratio for name in values if name.startswith(DENSE_TERMS) and "_dn_" not in name}
        exact = distillation_terms(
            detector,
            outputs,
            labels,
            matchings,
            num_matched=num_matched,
            num_queries=global_normaliser.num_queries,
        )
        values |= exact
        ratios |= dict.fromkeys(exact, 1.0)
    taught = teacher_terms(detector, outputs, labels, weight=global_normaliser.taught_weight)
    values |= taught
    ratios |= dict.fromkeys(taught, 1.0)
    scaled = torch._foreach_mul(list(values.values()), [ratios[name] for name in values])
    total = torch.stack(scaled).sum() * world_size
    if total.requires_grad:
        total = total + zero_over_left_out_parameters(detector, total)
    return LossTerms(total, {name: value.detach() for name, value in zip(values, scaled, strict=True)})


def _ratios(
    detector: Detector, names: Iterable[str], global_normaliser: Normaliser, local: Normaliser
) -> dict[str, float]:
    """Return, for each term, the ratio of transformers' divisor for this micro-batch to that of the global batch."""
    return {name: divisor(detector, name, local) / divisor(detector, name, global_normaliser) for name in names}


def divisor(detector: Detector, name: str, normaliser: Normaliser) -> float:
    """Return the number by which transformers divides the sum of a loss term over these images."""
    if detector.family.softmax and name.startswith("loss_ce"):
        return normaliser.class_weight
    if name.startswith("loss_ddf"):
        # The number of denoising queries depends on the micro-batch, so that only their mean can be averaged.
        return normaliser.num_queries
    num_groups = float(getattr(detector.model.config, "group_detr", 1)) if detector.model.training else 1.0
    return max(num_groups * normaliser.num_boxes, 1.0)


def _dense_ratio(
    union: Matching, local: Normaliser, global_normaliser: Normaliser, world_size: int
) -> tuple[float, float]:
    """Return the local divisor of the dense terms over the global one, and the global number of matched queries.

    The ranks sum their matched queries. With one micro-batch per step this is the number for the global batch. With
    several, the function assumes that the global batch has as many matched queries per box as this round.
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
