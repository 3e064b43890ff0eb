"""Parameter groups and the optimizer."""

import math
import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn
from torch.optim import AdamW

from raydet.common.errors import UserError
from raydet.config import ResolvedTrainConfig

_LAYER = re.compile(r"\.layers?\.(\d+)\.")
"""The number of a layer in the name of a vision transformer's parameter."""


def parameter_groups(
    model: nn.Module, config: ResolvedTrainConfig, backbone_names: Iterable[str]
) -> list[dict[str, object]]:
    """Split the trainable parameters by learning rate and by weight decay.

    The backbone learns at its own rate, which `layer_decay` lowers from layer to layer, and other parts at the rate of
    the head times their `learning_rate_factors`. One-dimensional parameters (biases and the weights of norms) have no
    weight decay.

    Raises:
        UserError: `layer_decay` is below 1, but the backbone is no vision transformer.
    """
    backbone = set(backbone_names)
    depths = layer_depths(backbone) if config.layer_decay < 1 else {}
    groups: dict[tuple[bool, str, bool], tuple[float, list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in backbone:
            depth = depths.get(name, 0)
            part, rate = f"backbone_{depth}" if depth else "backbone", config.backbone_rate * config.layer_decay**depth
        else:
            factor = math.prod(factor for key, factor in config.learning_rate_factors.items() if key in name)
            part, rate = "head" if factor == 1 else f"head_x{factor:g}", config.learning_rate * factor
        key = (name in backbone, part, parameter.ndim > 1)
        groups.setdefault(key, (rate, []))[1].append(parameter)
    return [
        {
            "name": f"{part}{'' if decayed else '_no_decay'}",
            "params": parameters,
            "lr": rate,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (_, part, decayed), (rate, parameters) in sorted(groups.items(), key=lambda item: item[0])
    ]


def layer_depths(names: Collection[str]) -> Mapping[str, int]:
    """Return the depth of each parameter of a vision transformer, counted from its output.

    It is 0 for what follows the layers, 1 for the last layer, and one more than that of the first layer for the
    embeddings.

    Raises:
        UserError: These are not the parameters of a vision transformer.
    """
    if not any("embeddings." in name for name in names):
        raise UserError("--layer-decay below 1 needs a vision transformer as backbone; omit it for this model")
    layers = {name: int(match[1]) for name in names if (match := _LAYER.search(name))}
    num_layers = max(layers.values(), default=-1) + 1
    return {
        name: num_layers - layers[name] if name in layers else (num_layers + 1 if "embeddings." in name else 0)
        for name in names
    }


def build_optimizer(model: nn.Module, config: ResolvedTrainConfig, backbone_names: Iterable[str]) -> AdamW:
    """Make an AdamW optimizer over `parameter_groups`."""
    return AdamW(parameter_groups(model, config, backbone_names), lr=config.learning_rate, fused=True)
