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
        """Start from the current weights.

        Args:
            model: The model, already on its device, because `update` reads the tensors that it has now.
            decay: Between 0 and 1.
            rise_steps: Time constant of the decay's rise.
        """
        self.decay, self.rise_steps, self.num_updates = decay, rise_steps, 0
        state = {name: value.detach() for name, value in model.state_dict().items()}
        self.shadow = {name: value.clone() for name, value in state.items()}
        averaged = [name for name, value in state.items() if value.is_floating_point()]
        copied = [name for name in state if name not in set(averaged)]
        self._averaged = [self.shadow[name] for name in averaged], [state[name] for name in averaged]
        self._copied = [self.shadow[name] for name in copied], [state[name] for name in copied]

    def update(self, *, where: Tensor | None = None) -> None:
        """Update the average with the weights after an optimizer step.

        If `where`, a boolean scalar on the model's device, is False, the average keeps its value, but the step still
        counts for the decay.
        """
        self.num_updates += 1
        part = 1.0 - self.decay * (1.0 - math.exp(-self.num_updates / self.rise_steps))
        shadows, values = self._averaged
        with torch.no_grad():
            if where is None or where.device.type == "cpu":
                if where is None or where:
                    torch._foreach_lerp_(shadows, values, part)
            else:  # the host must not wait for the value of `where`
                changes = torch._foreach_sub(values, shadows)
                torch._foreach_mul_(changes, where * part)
                torch._foreach_add_(shadows, changes)
            if self._copied[0]:
                torch._foreach_copy_(*self._copied)

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
