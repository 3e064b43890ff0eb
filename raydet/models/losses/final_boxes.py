"""The loss of a model's final boxes over many batches: the same number, however the images are cut into batches."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from torch import Tensor

from raydet.models.detector import Detector
from raydet.models.losses.distillation import DENSE_TERMS, is_dense
from raydet.models.losses.global_batch import Normaliser, divisor, normaliser_of
from raydet.models.losses.not_finite import NotFiniteError
from raydet.models.losses.terms import Labels, weighted_terms


@dataclass
class FinalLoss:
    """Sums over images of the loss terms of the last layer, in evaluation mode.

    Auxiliary layers, denoising and distillation serve the gradient, so that their terms are left out.

    Attributes:
        sums: Of each batch, the weighted terms multiplied by their divisors.
        counts: Of each batch, its divisors.
    """

    sums: list[dict[str, float]] = field(default_factory=list)
    counts: list[Normaliser] = field(default_factory=list)

    def add(self, detector: Detector, logits: Tensor, boxes_cxcywh: Tensor, labels: Labels) -> None:
        """Add a batch.

        Args:
            detector: The detector, in evaluation mode.
            logits: Its outputs [B, Q, C].
            boxes_cxcywh: Its boxes [B, Q, 4], relative to the image.
            labels: Labels of each image, on the device of the outputs.
        """
        config = copy.copy(detector.model.config)
        config.auxiliary_loss = False
        own = normaliser_of(detector, [len(label["class_labels"]) for label in labels])
        self.counts.append(own)
        criterion: Any = detector.model.loss_function
        try:
            _, terms, _ = criterion(logits, labels, detector.device, boxes_cxcywh, config)
        except NotFiniteError:
            self.sums.append({"loss": math.inf})
            return
        values = weighted_terms(detector, terms)
        self.sums.append({name: float(value) * _divisor(detector, name, own) for name, value in values.items()})


def mean_loss(detector: Detector, parts: Sequence[FinalLoss]) -> float | None:
    """Return the loss over all batches of several parts; None if it is not finite or there is no batch.

    The result depends neither on the order of the batches nor on their distribution over the parts, to the last bit.

    Args:
        detector: The detector, in evaluation mode.
        parts: The sums of each rank.
    """
    counts = [astuple(count) for part in parts for count in part.counts]
    if not counts:
        return None
    total = Normaliser(*map(math.fsum, zip(*counts, strict=True)))
    batches = [batch for part in parts for batch in part.sums]
    names = sorted({name for batch in batches for name in batch})
    value = _exact_sum(
        _exact_sum(batch.get(name, 0.0) for batch in batches) / _divisor(detector, name, total) for name in names
    )
    return value if math.isfinite(value) else None


def _divisor(detector: Detector, name: str, normaliser: Normaliser) -> float:
    """Return the number by which the criterion divides the sum of a term of the last layer."""
    if is_dense(detector) and name.startswith(DENSE_TERMS):
        return max(normaliser.num_matched, 1.0)
    return divisor(detector, name, normaliser)


def _exact_sum(values: Iterable[float]) -> float:
    """Return the correctly rounded sum, which does not depend on the order."""
    numbers = list(values)
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.inf
