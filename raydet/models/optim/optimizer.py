"""Parameter groups and the optimizer."""

from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW

from raydet.config import TrainConfig


def parameter_groups(model: nn.Module, config: TrainConfig, backbone_names: Iterable[str]) -> list[dict[str, object]]:
    """Split the trainable parameters by learning rate (backbone or head) and by weight decay.

    One-dimensional parameters (biases and the weights of norms) have no weight decay.
    """
    backbone = set(backbone_names)
    backbone_rate = config.backbone_learning_rate
    rates = {True: config.learning_rate / 10 if backbone_rate is None else backbone_rate, False: config.learning_rate}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in backbone, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "name": f"{'backbone' if in_backbone else 'head'}{'' if decayed else '_no_decay'}",
            "params": parameters,
            "lr": rates[in_backbone],
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (in_backbone, decayed), parameters in sorted(groups.items())
    ]


def build_optimizer(model: nn.Module, config: TrainConfig, backbone_names: Iterable[str]) -> AdamW:
    """Make an AdamW optimizer over `parameter_groups`."""
    return AdamW(parameter_groups(model, config, backbone_names), lr=config.learning_rate, fused=True)
