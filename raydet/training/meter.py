"""Sums of losses and times that a worker keeps over the steps of an epoch."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import Tensor

from raydet.training.history import EpochRecord


@dataclass
class EpochMeter:
    """Sums over the steps of an epoch so far, on one worker.

    Attributes:
        losses: Sum over steps of each loss term, in units of the global batch; only the part of this worker's images.
        gradient_norm: Sum over steps of the gradient norm before clipping.
        num_steps: Completed steps.
        num_skipped: Steps among them that changed nothing, because their gradient was not finite.
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
    num_images: int = 0
    start_s: float = 0.0
    data_s: float = 0.0
    communication_s: float = 0.0
    seconds: float = 0.0
    unreadable: set[int] = field(default_factory=set)

    def add_losses(self, terms: Mapping[str, Tensor]) -> None:
        """Add the loss terms of a step without synchronising with the device."""
        for name, value in terms.items():
            if name not in self.losses:
                self.losses[name] = torch.zeros_like(value, dtype=torch.float64)
        # One call for all terms: with one call per term, a GPU would wait for the host.
        sums = [self.losses[name] for name in terms]
        torch._foreach_add_(sums, list(torch.stack(list(terms.values())).double().unbind()))

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Context manager: count the time of the block as waiting for other workers."""
        started = time.perf_counter()
        yield
        self.communication_s += time.perf_counter() - started

    def to_state(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint or for other workers."""
        return {**vars(self), "losses": {name: value.item() for name, value in self.losses.items()}} | {
            "unreadable": sorted(self.unreadable)
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "EpochMeter":
        """Restore a meter from the result of `to_state`."""
        losses = {
            name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state["losses"].items()
        }
        return cls(**{**state, "losses": losses, "unreadable": set(state["unreadable"])})


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
    terms = {name: value / num_steps for name, value in sorted(merged["losses"].items())}
    seconds = max(merged["seconds"], 1e-9)
    return EpochRecord(
        epoch=epoch,
        ended=datetime.now().astimezone().isoformat(timespec="milliseconds"),
        loss=sum(terms.values()),
        losses=terms,
        gradient_norm=merged["gradient_norm"] / num_steps,
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
        num_unreadable=len(merged["unreadable"]),
    )
