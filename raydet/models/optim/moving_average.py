"""A moving average of the weights."""

import math

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of a model's weights and buffers.

    The decay rises from 0 to its full value as decay · (1 − exp(−updates / rise_steps)), so that the average forgets
    the random start. Integers, such as the counters of batch norms, are copied.
    """

    def __init__(self, model: nn.Module, decay: float, *, rise_steps: float = 300.0) -> None:
        self.decay, self.rise_steps, self.num_updates = decay, rise_steps, 0
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def update(self, model: nn.Module) -> None:
        """Update the average with the weights after an optimizer step."""
        self.num_updates += 1
        decay = self.decay * (1.0 - math.exp(-self.num_updates / self.rise_steps))
        averaged: tuple[list[Tensor], list[Tensor]] = [], []
        copied: tuple[list[Tensor], list[Tensor]] = [], []
        for name, value in model.state_dict().items():
            shadows, values = averaged if value.is_floating_point() else copied
            shadows.append(self.shadow[name])
            values.append(value)
        with torch.no_grad():
            torch._foreach_lerp_(*averaged, 1.0 - decay)
            if copied[0]:
                torch._foreach_copy_(*copied)

    def state_dict(self) -> dict[str, object]:
        """Return the state that a resumed run needs."""
        return {"shadow": self.shadow, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore a saved state."""
        shadow, num_updates = state["shadow"], state["num_updates"]
        assert isinstance(shadow, dict) and isinstance(num_updates, int)
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
        self.num_updates = num_updates
