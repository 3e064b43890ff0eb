"""Skipped steps: those whose gradient is not finite, which change nothing. Too many in a row end a run.

This module imports neither torch nor Ray.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raydet.common.console import listed
from raydet.config import ResolvedTrainConfig

MOST_IN_A_ROW = 5
"""Skipped steps in a row that end a run."""
MOST_KEPT = 10
"""Skipped steps of an epoch that the history lists and the console shows; all are counted."""
_MOST_SHOWN = 12
_SAFE_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """A step that changed nothing, because its gradient was not finite.

    Attributes:
        epoch: Number of the epoch, from 1.
        step: Number of the step within the epoch, from 1.
        images: Ids of its images; if the loss is not finite on some workers only, of their images.
        terms: Loss terms of the global batch; None if not finite.
        loss_scale: Loss scale after the step, in fp16; None otherwise.
    """

    epoch: int
    step: int
    images: list[int]
    terms: dict[str, float | None]
    loss_scale: float | None = None

    @property
    def bad_terms(self) -> list[str]:
        """Names of the loss terms that are not finite."""
        return [name for name, value in self.terms.items() if value is None]

    @property
    def counts(self) -> bool:
        """False if a smaller loss scale may make the gradient finite, so that the step is no sign of trouble."""
        return bool(self.bad_terms) or self.loss_scale is None or self.loss_scale < 1

    @property
    def reason(self) -> str:
        """The values that are not finite, and their images."""
        if self.bad_terms:
            what = f"the loss is not finite ({listed(self.bad_terms, _MOST_SHOWN)})"
        else:
            what = f"the gradient is not finite, the loss is {math.fsum(filter(None, self.terms.values())):.4g}"
        scale = "" if self.loss_scale is None else f"; loss scale lowered to {self.loss_scale:g}"
        return f"{what}; images {listed(self.images, _MOST_SHOWN)}{scale}"

    def line(self) -> str:
        """Describe the step for the user."""
        return f"skipped step {self.step} of epoch {self.epoch}: {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """Return the step as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "SkippedStep":
        """Read the result of `to_json`.

        Raises:
            ValueError: The content is not a skipped step.
        """
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"not a skipped step: {error}") from None


class SkipWatch:
    """Counts skipped steps in a row.

    Attributes:
        row: The latest steps, if they were skipped for another reason than a loss scale that is too high.
    """

    def __init__(self) -> None:
        self.row: list[SkippedStep] = []

    @property
    def is_stuck(self) -> bool:
        """True if so many steps in a row were skipped that the run must end."""
        return len(self.row) >= MOST_IN_A_ROW

    def add(self, step: SkippedStep | None) -> None:
        """Add the next step of the run; None if it was not skipped."""
        if step is None:
            self.row.clear()
        elif step.counts:
            self.row.append(step)


def skipped_step(
    epoch: int,
    step: int,
    ranks: Sequence[tuple[Mapping[str, float], list[int]]],
    *,
    loss_scale: float | None,
) -> SkippedStep:
    """Join what the workers know of a skipped step.

    Args:
        epoch: Number of the epoch, from 1.
        step: Number of the step, from 1.
        ranks: Per worker, its part of each loss term, and the ids of its images.
        loss_scale: Loss scale after the step, in fp16.
    """
    bad = [not all(map(math.isfinite, terms.values())) for terms, _ in ranks]
    names = dict.fromkeys(name for terms, _ in ranks for name in terms)
    sums = {name: sum(terms.get(name, 0.0) for terms, _ in ranks) for name in names}
    return SkippedStep(
        epoch=epoch,
        step=step,
        images=[
            image for is_bad, (_, images) in zip(bad, ranks, strict=True) if is_bad or not any(bad) for image in images
        ],
        terms={name: value if math.isfinite(value) else None for name, value in sums.items()},
        loss_scale=loss_scale,
    )


def end_of_run(row: Sequence[SkippedStep], settings: ResolvedTrainConfig) -> str:
    """Return the line that ends a run after too many skipped steps, with a command that helps.

    Args:
        row: The steps.
        settings: Configuration that held for them.
    """
    last = row[-1]
    remedy = f"learning_rate={min(settings.learning_rate / 10, _SAFE_RATE):.3g}"
    if settings.precision == "fp16":
        remedy = "precision=bf16"
    return (
        f"{len(row)} steps in a row were skipped, up to step {last.step} of epoch {last.epoch}: {last.reason}; "
        f"to resume, run the same command with --override {remedy} (it was {getattr(settings, remedy.split('=')[0])}); "
        "max_grad_norm, precision and augmentation can be changed in the same way"
    )
