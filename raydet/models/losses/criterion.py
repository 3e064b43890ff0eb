"""The criterion of a model: that of transformers, always in single precision, with what raydet needs beside it."""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel
from transformers.loss.loss_d_fine import DFineForObjectDetectionLoss, DFineLoss
from transformers.loss.loss_deimv2 import Deimv2Loss
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from raydet.models.collate import LABELLED, TAUGHT
from raydet.models.detector import at_least_single
from raydet.models.families import Family, family_of
from raydet.models.losses.grouped import grouped_loss
from raydet.models.losses.not_finite import loss_or_nan, mapped
from raydet.models.losses.partial_labels import without_unknown

_ARGUMENTS = ("outputs_class", "outputs_coord", "enc_outputs_class", "enc_outputs_coord")
"""Names of what models pass by position after their config."""

Matching = list[tuple[Tensor, Tensor]]
"""Per image: the matched queries and the boxes that they are matched to."""


def install_criterion(model: PreTrainedModel) -> None:
    """Replace the loss function of a model by its `Criterion`."""
    model.loss_function = Criterion(model)


def uses_dense_matching(config: Any, family: Family) -> bool:
    """Return True if every layer learns the boxes that any layer matches to a query."""
    return family.dense_matching and bool(getattr(config, "use_dense_one_to_one", True))


class Criterion:
    """A loss function with the arguments and results of transformers'.

    - It computes in single precision under every autocast: a score that half precision rounds to 1 makes the loss
      infinite, and boxes would move.
    - For families that distil, it keeps the matchings, which the distillation term must not repeat: matching runs on
      the CPU and waits for the device.
    - D-FINE learns boxes by the union of the matchings of all layers, as its authors have it; transformers matches each
      layer by itself.
    - The criterion of LW-DETR and RF-DETR does not sum over ranks.
    - It learns nothing from classes that an image is not labelled for; see `partial_labels.py`.

    Attributes:
        matchings: Of the latest call: those of the last decoder layer, then those of each auxiliary output.
        auxiliary: Auxiliary outputs of the latest call for teachers, if those of the model lack scores for them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._family = family_of(model.config.model_type, where="this model")
        self._loss: Callable[..., Any] = grouped_loss if self._family.local_criterion else model.loss_function
        self.matchings: list[Matching] = []
        self.auxiliary: Any = None

    def __call__(
        self, logits: Tensor, labels: Any, device: Any, pred_boxes: Tensor, config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss of a micro-batch; it is NaN if the outputs cannot be matched, because they are not finite.

        Raises:
            NotFiniteError: As described, and gradients are disabled.
        """
        loss = self._loss
        if self._loss is DFineForObjectDetectionLoss and uses_dense_matching(config, self._family):
            loss = _d_fine_loss
        outputs = {"logits": logits, "pred_boxes": pred_boxes, **dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        hook = register_module_forward_hook(self._keep) if self._family.distils else None

        def compute(outputs: Any, labels: Any) -> Any:
            self.matchings = []
            known = without_unknown(
                outputs, labels, softmax=self._family.softmax, layers_first=not self._family.images_before_layers
            )
            return loss(known.pop("logits"), labels, device, known.pop("pred_boxes"), config, **known)

        try:
            with torch.autocast(logits.device.type, enabled=False):
                outputs = mapped(outputs, at_least_single)
                self.auxiliary = None
                if _is_taught(labels):
                    # transformers builds these outputs together with a loss, here that of no boxes.
                    nothing = [{name: label[name][:0] for name in ("class_labels", "boxes")} for label in labels]
                    _, _, self.auxiliary = loss_or_nan(partial(compute, labels=nothing), outputs)
                return loss_or_nan(partial(compute, labels=labels), outputs)
        finally:
            if hook is not None:
                hook.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, RTDetrHungarianMatcher):
            self.matchings.append(output)


def _is_taught(labels: Any) -> bool:
    """Return True if teachers have scored an image that is not labelled for all classes."""
    is_partial = any(LABELLED in label for label in labels)
    return is_partial and any(TAUGHT["boxes_cxcywh"] in label for label in labels)


class _DenseDFineLoss(Deimv2Loss):
    """D-FINE's terms with the matching that DEIMv2 took over from D-FINE."""

    def __init__(self, config: Any) -> None:
        DFineLoss.__init__(self, config)
        self.use_dense_one_to_one = True


# transformers' function looks up the class of its criterion among its globals.
_d_fine_loss = types.FunctionType(
    DFineForObjectDetectionLoss.__code__,
    {**DFineForObjectDetectionLoss.__globals__, "DFineLoss": _DenseDFineLoss},
    argdefs=DFineForObjectDetectionLoss.__defaults__,
)
