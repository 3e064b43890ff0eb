"""The config of a training run in which every option has a value."""

import dataclasses
from dataclasses import field
from typing import Any

from raydet.config.fields import config
from raydet.config.training import AugmentationSpec, Backbone, BatchNorm, TrainConfig
from raydet.config.workers import Precision

_OPTIONS = {item.name: item for item in dataclasses.fields(TrainConfig)}


def _decided(name: str, value: Any) -> Any:
    """Redeclare an option that a recipe may decide, with its value under `--recipe none`."""
    metadata = _OPTIONS[name].metadata
    if isinstance(value, list | dict):
        return field(default_factory=type(value), metadata=metadata)
    return field(default=value, metadata=metadata)


@config
class ResolvedTrainConfig(TrainConfig):
    """A `TrainConfig` after `raydet.models.recipes.resolve`. Its defaults are the values of `--recipe none`."""

    epochs: int = _decided("epochs", 50)
    batch_size: int = _decided("batch_size", 8)
    learning_rate: float = _decided("learning_rate", 1e-4)
    num_workers: int | list[int] = _decided("num_workers", 1)
    multi_scale: list[int] = _decided("multi_scale", [])
    freeze_backbone: Backbone = _decided("freeze_backbone", "none")
    batch_norm: BatchNorm = _decided("batch_norm", "as_is")
    layer_decay: float = _decided("layer_decay", 1.0)
    learning_rate_factors: dict[str, float] = _decided("learning_rate_factors", {})
    weight_decay: float = _decided("weight_decay", 1e-4)
    warmup_steps: int = _decided("warmup_steps", 0)
    max_grad_norm: float = _decided("max_grad_norm", 0.1)
    gradient_accumulation_steps: int = _decided("gradient_accumulation_steps", 1)
    precision: Precision = _decided("precision", "fp32")
    ema_decay: float = _decided("ema_decay", 0.0)
    ema_rise_steps: int = _decided("ema_rise_steps", 300)
    augmentation: AugmentationSpec = _decided("augmentation", "light")
    close_mosaic: int = _decided("close_mosaic", 0)
    validate_every: int = _decided("validate_every", 1)
    early_stopping_patience: int = _decided("early_stopping_patience", 0)

    @property
    def backbone_rate(self) -> float:
        """Learning rate of the backbone, or of its adapters."""
        if self.backbone_learning_rate is not None:
            return self.backbone_learning_rate
        return self.learning_rate if self.lora else self.learning_rate / 10


DECIDED_OPTIONS = ("backbone_learning_rate", *ResolvedTrainConfig.__annotations__)
"""Options of `train` that a recipe decides where the user does not."""
