"""Trainers whose steps go wrong, for `make_trainer`."""

from collections.abc import Collection
from typing import Any

import torch

from raydet.training.in_flight import StepInputs, StepOutcome
from raydet.training.trainer import Trainer


class PoisonedTrainer(Trainer):
    """A trainer whose model sees NaN in place of some images.

    It works like images whose pixels, after a faulty augmentation, are not finite.
    """

    def __init__(self, *arguments: Any, images: Collection[int], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._poisonous, self._poisons = set(images), False
        self.detector.model.register_forward_pre_hook(self._poison, with_kwargs=True)

    def step(self, inputs: StepInputs) -> StepOutcome:
        """Take a step."""
        self._poisons = bool(self._poisonous & set(inputs.image_ids))
        try:
            return super().step(inputs)
        finally:
            self._poisons = False

    def _poison(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        factor = torch.nan if self._poisons else 1.0
        return args, {**kwargs, "pixel_values": kwargs["pixel_values"] * factor}


class OverflowingTrainer(Trainer):
    """A trainer whose gradient overflows in fp16: always, or until the loss scale has fallen."""

    def __init__(self, *arguments: Any, always: bool, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self._setting.scaler is not None and not always:
            self._setting.scaler._init_scale = 2.0**40
        if always:
            next(self.detector.model.parameters()).register_hook(self._overflow)

    def _overflow(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf if self.settings.precision == "fp16" else gradient
