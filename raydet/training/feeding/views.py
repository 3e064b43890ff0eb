"""The view of each step of a run, which an override of the augmentation changes."""

from dataclasses import dataclass

from raydet.augmentation.view import View


@dataclass(frozen=True)
class Views:
    """A view, and those that replace it.

    Attributes:
        first: The view of the first step.
        changes: Epoch and step, both from 0, from which on another view holds, in this order.
    """

    first: View
    changes: tuple[tuple[tuple[int, int], View], ...] = ()

    def at(self, epoch: int, step: int) -> View:
        """Return the view of a training step."""
        held = [view for start, view in self.changes if start <= (epoch, step)]
        return held[-1] if held else self.first
