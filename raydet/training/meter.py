"""Sums of losses and times that a worker keeps over the steps of an epoch."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import Tensor

from raydet.training.history import EpochRecord
from raydet.training.recovery.skipping import MOST_KEPT, SkippedStep


@dataclass
class EpochMeter:
    """Sums over the steps of an epoch so far, on one worker.

    Attributes:
        losses: Sum over steps of each loss term, in units of the global batch; only the part of this worker's images.
            Skipped steps are left out.
        gradient_norm: Sum over the same steps of the gradient norm before clipping.
        num_steps: Completed steps, with skipped ones.
        num_skipped: Steps among them that changed nothing, because their gradient was not finite.
        skipped: The latest of them.
        num_images: Images of these steps on this worker.
        start_s: Seconds until the first images arrived, if workers and stream had just started.
        data_s: Seconds spent waiting for images after that.
        communication_s: Seconds spent waiting for other workers.
        seconds: Total seconds since the first images arrived.
        unreadable: Ids of images that could not be read.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    gradient_norm: float = 0.0
    num_steps: int = 0
    num_skipped: int = 0
    skipped: list[SkippedStep] = field(default_factory=list)
    num_images: int = 0
    start_s: float = 0.0
    data_s: float = 0.0
    communication_s: float = 0.0
    seconds: float = 0.0
    unreadable: set[int] = field(default_factory=set)

    def add_losses(self, terms: Mapping[str, Tensor], *, unless_skipped: Tensor | None = None) -> None:
        """Add the loss terms of a step without synchronising with the device.

        Args:
            terms: Scalars.
            unless_skipped: Boolean scalar on their device; False adds nothing.
        """
        for name, value in terms.items():
            if name not in self.losses:
                self.losses[name] = torch.zeros_like(value, dtype=torch.float64)
        # One call for all terms: with one call per term, a GPU would wait for the host.
        sums = [self.losses[name] for name in terms]
        values = torch.stack(list(terms.values())).double()
        if unless_skipped is not None:
            values = torch.where(unless_skipped, values, 0.0)
        torch._foreach_add_(sums, list(values.unbind()))

    def add_skipped(self, step: SkippedStep) -> None:
        """Add a skipped step."""
        self.num_skipped += 1
        self.skipped = [*self.skipped, step][-MOST_KEPT:]

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Context manager: count the time of the block as waiting for other workers."""
        started = time.perf_counter()
        yield
        self.communication_s += time.perf_counter() - started

    def to_state(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint or for other workers."""
        return {
            **vars(self),
            "losses": {name: value.item() for name, value in self.losses.items()},
            "skipped": [step.to_json() for step in self.skipped],
            "unreadable": sorted(self.unreadable),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "EpochMeter":
        """Restore a meter from the result of `to_state`."""
        losses = {
            name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state["losses"].items()
        }
        skipped = [SkippedStep.from_json(step) for step in state.get("skipped", [])]
        return cls(**{**state, "losses": losses, "skipped": skipped, "unreadable": set(state["unreadable"])})


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the states of all workers: sum losses and images, and keep the times of the first worker."""
    losses: dict[str, float] = {}
    for state in states:
        for name, value in state["losses"].items():
            losses[name] = losses.get(name, 0.0) + value
    return {
        **states[0],
        "losses": losses,
        "num_images": sum(state["num_images"] for state in states),
        "unreadable": sorted({image_id for state in states for image_id in state["unreadable"]}),
    }


def epoch_record(merged: Mapping[str, Any], *, epoch: int, learning_rate: float) -> EpochRecord:
    """Make the record of an epoch that ends now.

    Args:
        merged: Sums of all workers, from `merge_states`.
        epoch: Number of the epoch, from 1.
        learning_rate: Learning rate after the last step.
    """
    num_steps = max(1, merged["num_steps"])
    num_applied = merged["num_steps"] - merged["num_skipped"]
    terms = {name: value / num_applied if num_applied else math.nan for name, value in sorted(merged["losses"].items())}
    seconds = max(merged["seconds"], 1e-9)
    return EpochRecord(
        epoch=epoch,
        ended=datetime.now().astimezone().isoformat(timespec="milliseconds"),
        loss=sum(terms.values()),
        losses=terms,
        gradient_norm=merged["gradient_norm"] / num_applied if num_applied else math.nan,
        learning_rate=learning_rate,
        images_per_s=merged["num_images"] / seconds,
        seconds=seconds,
        step_s={
            "data": merged["data_s"] / num_steps,
            "compute": max(0.0, seconds - merged["data_s"] - merged["communication_s"]) / num_steps,
            "communication": merged["communication_s"] / num_steps,
        },
        start_s=merged["start_s"],
        num_skipped_steps=merged["num_skipped"],
        skipped=tuple(SkippedStep.from_json(step) for step in merged["skipped"]),
        num_unreadable=len(merged["unreadable"]),
    )
