"""The rows of a model's class heads: kept by class name when the classes change, and started at the focal prior.

A class tensor is one whose first dimension counts the classes: weights and biases of the heads of decoder layers, of
auxiliary heads and of the encoder's score head, and the class embedding of denoising queries.
"""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from raydet.common.class_names import is_unused, match_names
from raydet.models.families import Family

PRIOR = 0.01
"""Score with which every class of a sigmoid head starts (Lin et al. 2017, section 4.1): with scores of one half, the
loss of the many queries without an object would drown all others."""
_PRIOR_BIAS = -math.log((1 - PRIOR) / PRIOR)

NewModel = Callable[[PreTrainedConfig], PreTrainedModel]


@dataclass(frozen=True)
class ClassRows:
    """Start of each class in the heads of a model that was trained on other classes.

    Attributes:
        kept: Classes whose rows are those of the checkpoint.
        new: Classes that the checkpoint does not have.
        num_averaged: Number of the checkpoint's classes whose mean the new classes start with in the encoder's score
            head; None if the model has no such head.
        is_softmax: New classes start at random, not at the prior.
    """

    kept: tuple[str, ...]
    new: tuple[str, ...]
    num_averaged: int | None
    is_softmax: bool

    def lines(self) -> list[str]:
        """Return one line in words for each kind of start that occurs."""
        lines = []
        if self.kept:
            lines.append(f"classes that keep the checkpoint's weights: {', '.join(self.kept)}")
        if self.new and self.num_averaged is not None:
            lines.append(
                f"classes that start as the mean of the checkpoint's {self.num_averaged} classes in the score head of "
                f"the encoder: {', '.join(self.new)}"
            )
        if self.new:
            score = "" if self.is_softmax else f", at a score of {PRIOR}"
            lines.append(f"classes that start anew{score}: {', '.join(self.new)}")
        return lines


def class_tensor_names(config: PreTrainedConfig, new_model: NewModel) -> list[str]:
    """Return the names, as in `state_dict`, of the tensors whose shape depends on the number of classes, sorted.

    Args:
        config: Config of the model; its number of labels does not matter.
        new_model: Function that builds a model from a config.
    """
    shapes: list[dict[str, torch.Size]] = []
    for extra in (0, 1):
        other = copy.deepcopy(config)
        other.num_labels = (config.num_labels or 0) + extra
        with torch.device("meta"):
            shapes.append({name: value.shape for name, value in new_model(other).state_dict().items()})
    return sorted(name for name, shape in shapes[0].items() if shape != shapes[1][name])


def start_at_prior(model: PreTrainedModel, family: Family, new_model: NewModel) -> None:
    """Set the biases of a new model's sigmoid class heads to the prior; leave softmax heads alone."""
    if family.softmax:
        return
    state = model.state_dict()
    for name in class_tensor_names(model.config, new_model):
        if name.endswith("bias"):
            state[name].fill_(_PRIOR_BIAS)


def change_classes(
    model: PreTrainedModel,
    family: Family,
    own_names: Sequence[str],
    names: Sequence[str],
    *,
    mapping: Mapping[str, str] | None,
    new_model: NewModel,
    missing: Collection[str] = (),
) -> ClassRows:
    """Replace the class heads of a loaded model by those for other classes, and keep everything that was learnt.

    A class with a namesake keeps its rows, and a softmax head its row of "no object". Any other class starts, in the
    encoder's score head, as the mean of the checkpoint's classes, because a pretrained decoder needs proposals that
    score objects of any kind, and in other sigmoid heads at the prior.

    Args:
        model: The model with the classes of its checkpoint; changed in place, its config included.
        family: Its family.
        own_names: Classes of the checkpoint, in the order of their indices.
        names: New classes, in the order of their indices.
        mapping: Class of the checkpoint → new class, for classes that have been renamed.
        new_model: Function that builds a model from a config.
        missing: Tensors that the checkpoint lacks, so that they have nothing to keep.
    """
    sources = match_names(names, own_names, mapping=mapping)
    used = [index for index, name in enumerate(own_names) if not is_unused(name, index)] or list(range(len(own_names)))
    old = {name: value.detach().clone() for name, value in _class_state(model, new_model).items()}
    set_labels(model.config, names)
    fresh = new_model(model.config)
    tensors = fresh.state_dict()
    for name, before in old.items():
        value = tensors[name]
        if not family.softmax and name.endswith("bias"):
            value.fill_(_PRIOR_BIAS)
        if name in missing:
            continue
        if _is_objectness(model.config, family, name):
            _keep_first(value, before)
            continue
        if family.score_head is not None and family.score_head in name:
            value.copy_(before[used].mean(0).expand_as(value))
        for row, source in enumerate(sources):
            if source is not None:
                value[row] = before[source]
        # "No object", or the padding of the denoising embedding.
        value[len(names) :] = before[len(own_names) :]
    for path in {name.rpartition(".")[0] for name in old}:
        model.set_submodule(path, fresh.get_submodule(path))
    return ClassRows(
        kept=tuple(name for name, source in zip(names, sources, strict=True) if source is not None),
        new=tuple(name for name, source in zip(names, sources, strict=True) if source is None),
        num_averaged=None if family.score_head is None else len(used),
        is_softmax=family.softmax,
    )


def set_labels(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Set the classes of a config, in the order of their indices."""
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def _class_state(model: PreTrainedModel, new_model: NewModel) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: state[name] for name in class_tensor_names(model.config, new_model)}


def _is_objectness(config: PreTrainedConfig, family: Family, name: str) -> bool:
    """Return True for the head that scores proposals of a two-stage Deformable DETR: its first row means any object."""
    if not (family.scores_proposals and getattr(config, "two_stage", False)):
        return False
    return f"class_embed.{config.decoder_layers}." in name


def _keep_first(value: Tensor, before: Tensor) -> None:
    """Keep the first row; the others have learnt nothing but to be off."""
    value[0] = before[0]
    if len(before) > 1:
        value[1:] = before[1:].mean(0)
