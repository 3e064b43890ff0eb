"""Steps in flight: inputs prepared one step ahead, results read one step late, so that the device never waits for them.

While the device computes a step, the host copies the next step's images to it and sums the next step's counts over the
ranks. The same sum carries the results of the previous step. This module does not import Ray.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raydet.models.collate import TAUGHT, Batch
from raydet.models.losses.global_batch import Normaliser
from raydet.training.state import Position

_NUM_DIVISORS = 5


class PendingSum:
    """A sum of numbers over all ranks, in progress. Every rank must start the same sums in the same order."""

    def __init__(self, values: Sequence[float], group: "dist.ProcessGroup | None") -> None:
        """Start the sum.

        Args:
            values: This rank's numbers.
            group: Group of a CPU backend; None for a single rank.
        """
        self._values = torch.tensor(values, dtype=torch.float64)
        self._work = None if group is None else dist.all_reduce(self._values, group=group, async_op=True)

    def wait(self) -> list[float]:
        """Wait for all ranks and return the sums, which are the same on every rank."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        values: list[float] = self._values.tolist()
        return values


class DeviceCopy:
    """Copies of batches to the device, which continues to compute meanwhile. On the CPU nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, batches: Sequence[Batch]) -> "CopiedBatches":
        """Start copying batches, through pinned memory."""
        if self._stream is None:
            return CopiedBatches(list(batches), None)
        with torch.cuda.stream(self._stream):
            copies = [self._copied(batch) for batch in batches]
            return CopiedBatches(copies, self._stream.record_event())

    def _copied(self, batch: Batch) -> Batch:
        """Copy a batch in a few transfers, however many images it has; lists of labelled classes stay on the CPU."""
        pixels = self._moved(batch.pixels)
        labels = [dict(label) for label in batch.labels]
        for name in ("class_labels", "boxes", *TAUGHT.values()):
            having = [label for label in labels if name in label]
            if having:
                lengths = [len(label[name]) for label in having]
                whole = torch.cat([label[name] for label in having if len(label[name])] or [having[0][name]])
                for label, values in zip(having, self._moved(whole).split(lengths), strict=True):
                    label[name] = values
        return Batch(batch.image_ids, pixels, batch.sizes_hw, batch.original_sizes_hw, labels)

    def _moved(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self._device, non_blocking=True)


class CopiedBatches:
    """Batches that are being copied to the device."""

    def __init__(self, batches: list[Batch], event: "torch.cuda.Event | None") -> None:
        self._batches, self._event = batches, event

    def use(self) -> list[Batch]:
        """Return the batches. The device waits until they have arrived; the host does not."""
        if self._event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._event)
            for batch in self._batches:  # their memory may be reused only after the computation has read it
                for values in (batch.pixels, *(value for label in batch.labels for value in label.values())):
                    if values.is_cuda:  # lists of labelled classes stay on the CPU
                        values.record_stream(stream)
        return self._batches


@dataclass(frozen=True)
class StepInputs:
    """Everything that this rank needs to compute a step.

    Attributes:
        batches: The micro-batches.
        image_ids: Ids of all images of the step on this rank, including those that could not be read.
        sums: Sum over ranks of the divisors of the loss, followed by other numbers.
    """

    batches: CopiedBatches
    image_ids: list[int]
    sums: PendingSum

    @property
    def normaliser(self) -> Normaliser:
        """Divisors of the loss for the global batch; waits for all ranks."""
        return Normaliser(*self.sums.wait()[:_NUM_DIVISORS])

    @property
    def others(self) -> list[float]:
        """The other numbers, summed over all ranks; waits for all ranks."""
        return self.sums.wait()[_NUM_DIVISORS:]


@dataclass(frozen=True)
class StepValues:
    """Values of a step that the host reads.

    Attributes:
        loss: Loss of this rank's images, in units of the global batch.
        gradient_norm: Norm of the global gradient before clipping. If it is not finite, the step changed nothing.
        loss_scale: Loss scale after the step, in fp16; 0 in other precisions.
    """

    loss: float
    gradient_norm: float
    loss_scale: float

    @property
    def is_skipped(self) -> bool:
        """True if the gradient was not finite, so that the step changed neither weights nor moving average."""
        return not np.isfinite(self.gradient_norm)


class StepOutcome:
    """Results of a step that the device may not have computed yet.

    Attributes:
        position: Position of the step.
        image_ids: Ids of its images on this rank.
        learning_rates: Learning rate of the step by parameter group.
        terms: Each loss term of this rank, on the device.
    """

    def __init__(
        self,
        position: Position,
        image_ids: list[int],
        learning_rates: dict[str, float],
        terms: dict[str, Tensor],
        gradient_norm: Tensor,
        loss_scale: Tensor | None = None,
    ) -> None:
        self.position, self.image_ids = position, image_ids
        self.learning_rates, self.terms = learning_rates, terms
        loss = torch.stack(list(terms.values())).sum()
        # To pinned memory, if the values are on a GPU.
        scale = torch.zeros_like(loss) if loss_scale is None else loss_scale
        self._values = torch.stack([loss, gradient_norm.detach(), scale]).to("cpu", non_blocking=True)
        self._event = torch.cuda.current_stream().record_event() if loss.is_cuda else None

    def read(self) -> StepValues:
        """Wait for the device and return the values."""
        if self._event is not None:
            self._event.synchronize()
        return StepValues(*self._values.tolist())

    def read_terms(self) -> dict[str, float]:
        """Wait for the device and return this rank's part of each loss term."""
        return {name: float(value) for name, value in self.terms.items()}


@dataclass(frozen=True)
class LateResult:
    """A step whose results all ranks know.

    Attributes:
        outcome: The step on this rank.
        values: Its values on this rank.
        loss: Loss of the global batch.
        is_skipped: True if any rank found that the step changed nothing.
    """

    outcome: StepOutcome
    values: StepValues
    loss: float
    is_skipped: bool


class LateResults:
    """Results of the latest steps, in order. Each is first read, then summed over the ranks, then known to all."""

    def __init__(self) -> None:
        self._computing: deque[StepOutcome] = deque()
        self._summing: tuple[StepOutcome, StepValues] | None = None

    def __len__(self) -> int:
        return len(self._computing)

    def add(self, outcome: StepOutcome) -> None:
        """Add a step that has just been queued on the device."""
        self._computing.append(outcome)

    def report(self, *, keep: int) -> list[float]:
        """Read the earliest step; return two numbers that the caller sums over all ranks and passes to `conclude`.

        Args:
            keep: Number of latest steps to leave alone, because the device may still be computing them.
        """
        assert self._summing is None, "the sum of the earlier step comes first"
        if len(self._computing) <= keep:
            return [0.0, 0.0]
        outcome = self._computing.popleft()
        values = outcome.read()
        self._summing = outcome, values
        return [float(values.is_skipped), 0.0 if values.is_skipped else values.loss]

    def conclude(self, sums: Sequence[float]) -> LateResult | None:
        """Return the step of the latest `report`, now that the sums are known; None if it reported no step."""
        if self._summing is None:
            return None
        (outcome, values), self._summing = self._summing, None
        return LateResult(outcome, values, loss=sums[1], is_skipped=sums[0] > 0)
