"""Parameter groups, learning-rate schedules and the moving average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from raydet.config import TrainConfig


def parameter_groups(model: nn.Module, config: TrainConfig, backbone_names: Iterable[str]) -> list[dict[str, object]]:
    """Splits the trainable parameters by learning rate (backbone or not) and by weight decay.

    Biases and the weights of norms, which have one dimension, are not decayed.

    Args:
        model: The detector's model.
        config: Rates and decay.
        backbone_names: Names of the backbone's parameters.
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


def build_optimizer(model: nn.Module, config: TrainConfig, backbone_names: Iterable[str]) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config, backbone_names), lr=config.learning_rate)


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> LambdaLR:
    """The schedule that `transformers.get_scheduler` knows by this name, laid out over the whole run."""
    from transformers import get_scheduler

    num_steps = steps_per_epoch * (config.schedule_epochs or config.epochs)
    options = {"min_lr_rate": 0.05} if config.schedule == "cosine_with_min_lr" else None
    schedule: LambdaLR = get_scheduler(
        config.schedule,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=options,
    )
    return schedule


class MovingAverage:
    """Exponential moving average of a model's weights and buffers, held in fp32.

    The decay grows from 0 to its full value over the first steps, d·(1 − exp(−step/2000·…)), as the RT-DETR and
    YOLO recipes do, so that the average does not remember the random start.
    """

    def __init__(self, model: nn.Module, decay: float, *, rise_steps: float = 300.0) -> None:
        self.decay, self.rise_steps, self.num_updates = decay, rise_steps, 0
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights after an optimizer step."""
        self.num_updates += 1
        decay = self.decay * (1.0 - math.exp(-self.num_updates / self.rise_steps))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.shadow[name].lerp_(value.detach(), 1.0 - decay)
            else:
                self.shadow[name].copy_(value)

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs."""
        return {"shadow": self.shadow, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Goes on from a saved state."""
        shadow, num_updates = state["shadow"], state["num_updates"]
        assert isinstance(shadow, dict) and isinstance(num_updates, int)
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
        self.num_updates = num_updates
