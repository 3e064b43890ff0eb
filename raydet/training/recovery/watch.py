"""The watch over skipped steps, on every worker."""

import logging
from typing import TYPE_CHECKING

from raydet.training.recovery.skipping import MOST_IN_A_ROW, MOST_KEPT, SkippedStep, skipped_step

if TYPE_CHECKING:
    from raydet.training.crew import Crew
    from raydet.training.in_flight import LateResult
    from raydet.training.meter import EpochMeter

_LOG = logging.getLogger(__name__)


class SkipWatch:
    """Counts skipped steps in a row, and reports each.

    Attributes:
        row: The latest steps, if they were skipped for another reason than a loss scale that is too high.
    """

    def __init__(self, crew: "Crew") -> None:
        self._crew = crew
        self.row: list[SkippedStep] = []

    @property
    def is_stuck(self) -> bool:
        """True if so many steps in a row were skipped that the run must end."""
        return len(self.row) >= MOST_IN_A_ROW

    def add(self, result: "LateResult", meter: "EpochMeter") -> None:
        """Add a step whose results all ranks know. Collective: every rank must call it."""
        if not result.is_skipped:
            self.row.clear()
            return
        outcome, position = result.outcome, result.outcome.position
        ranks = self._crew.exchange((outcome.read_terms(), outcome.image_ids))
        step = skipped_step(position.epoch + 1, position.step + 1, ranks, loss_scale=result.values.loss_scale or None)
        _LOG.warning(step.line())
        if meter.num_skipped < MOST_KEPT:
            self._crew.say(step.line())
        meter.add_skipped(step)
        if step.counts:
            self.row.append(step)
