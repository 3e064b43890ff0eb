"""The pretrained backbone of a model: names of its parameters, and partial freezing."""

import re
from typing import Any

from torch import nn

from raydet.common.errors import UserError
from raydet.config import Backbone
from raydet.models.batch_norm import FrozenBatchNorm2d
from raydet.models.families import family_of

_STEM = re.compile(
    r"(^|\.)(embedder|embeddings|mid_position_embeddings|stem(_\d+)?|stages[._]0|patch_embed|pos_embed|cls_token"
    r"|reg_token|(model|_backbone)\.(conv1|bn1|layer1))(\.|$)"
)
"""Matches the names of the first parameters of a backbone, as transformers and timm name them."""


def backbone_parameter_names(model: nn.Module) -> set[str]:
    """Return the names, as in `named_parameters`, of the backbone's parameters, which learn at a lower rate.

    For YOLOS these are the parameters of the vision transformer without its detection tokens.
    """
    config: Any = model.config
    family = family_of(config.model_type, where="this model")
    return {
        name
        for name, _ in model.named_parameters()
        if name.startswith(family.backbone_prefixes) and (family.head_tokens is None or family.head_tokens not in name)
    }


def freeze_backbone(model: nn.Module, part: Backbone, *, where: str = "this model") -> None:
    """Freeze a part of the backbone and unfreeze the rest. Can be called again at any time.

    The function sets `requires_grad` of parameters and overrides the default of transformers, which freezes all of
    the backbone or none of it depending on its origin. It leaves the statistics of batch norms alone (see
    `raydet.models.batch_norm`), and frozen batch norms stay frozen. Rebuild any DistributedDataParallel around the
    model afterwards, and any optimizer that holds trainable parameters only.

    Args:
        model: Model of any family.
        part: `none`: the complete backbone learns. `stem`: its first layers do not; in a vision transformer the patch
            and position embeddings, in a ResNet, HGNet or another network of stages the stem and the first stage, as
            the authors of DETR freeze `conv1`, `bn1` and `layer1`. `all`: none of it learns.
        where: The model, for the error message.

    Raises:
        UserError: raydet cannot identify the stem of this backbone.
    """
    names = backbone_parameter_names(model)
    stem = {name for name in names if _STEM.search(name)}
    if part == "stem" and not stem:
        raise UserError(
            f"--freeze-backbone stem: raydet cannot identify the stem of the backbone of {where}; use none or all"
        )
    frozen = {"none": set(), "stem": stem, "all": names}[part]
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, FrozenBatchNorm2d)
        for name, _ in module.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(name not in frozen | norms)
