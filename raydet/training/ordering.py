"""The order of the data, planned without Ray.

(row groups of the table, seed, epoch, global batch) → which rows make step *k*. The same plan holds for any number
of workers: a step is a list of rows, and each worker takes its slice of it.

Rows are shuffled in windows of whole row groups, so that each row group is read about once an epoch however large
the table is; a table that fits one window is shuffled as a whole.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from raydet.config import TrainConfig
    from raydet.tables.table import Table

Rows = npt.NDArray[np.int64]
Kind = Literal["train", "validate"]

MOSAIC_P = 0.5
"""Share of the images that become a mosaic, where the augmentation mixes images."""
MIXUP_P = 0.15
"""Share of the images that another is blended into, where the augmentation mixes images."""

# The last word of a seed keeps draws for one use apart from those of another with the same numbers; `view` has 2.
_PARTNER_STREAM = 1


@dataclass(frozen=True)
class MicroBatch:
    """What one worker takes in at once.

    Attributes:
        kind: Whether it is learnt from or validated on.
        epoch: Counted from 0.
        step: The optimizer step in the epoch, or the number of the validation round, from 0.
        part: Which of the parts of the worker's share of the step, from 0.
        rank: Which worker takes it.
        rows: Row numbers in the table; none when there are fewer images than workers.
    """

    kind: Kind
    epoch: int
    step: int
    part: int
    rank: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class PartnerRows:
    """The rows that an image is mixed with in an epoch: three or none for a mosaic, one or none for a mixup.

    There are fewer where the window has too few other rows.
    """

    mosaic: tuple[int, ...]
    mixup: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A run of micro-batches that share their row groups, read by one task: steps `first` to `last` (exclusive)."""

    kind: Kind
    epoch: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything a run will read, in order: the steps of each epoch, then its validation.

    Attributes:
        train_groups: Rows and bytes of each row group of the training table.
        num_val: Rows of the validation table.
        batch_size: Images of an optimizer step, over all workers together.
        accumulate: Parts of each worker's share of a step.
        epochs: Passes over the training table.
        seed: Of the shuffling.
        window_bytes: Row groups of about this many bytes are shuffled together.
        validate_every: Epochs from one validation to the next; the last epoch always has one.
        validate_batch_size: Images of a micro-batch in validation, whatever the number of workers.
        validate_fraction: Part of the validation table that is used, above 0 and at most 1.
    """

    train_groups: tuple[tuple[int, int], ...]
    num_val: int
    batch_size: int
    accumulate: int
    epochs: int
    seed: int
    window_bytes: int
    validate_every: int
    validate_batch_size: int
    validate_fraction: float = 1.0

    @classmethod
    def of_training(cls, config: "TrainConfig", train: "Table", *, num_val: int) -> "RunPlan":
        """Plans a training with this config.

        Args:
            config: The training.
            train: Training table; the footers of its files are read.
            num_val: Rows of the validation table.
        """
        return cls(
            train_groups=tuple((group.num_rows, group.num_bytes) for group in train.row_groups()),
            num_val=num_val,
            batch_size=config.batch_size,
            accumulate=config.gradient_accumulation_steps,
            epochs=config.epochs,
            seed=config.seed,
            window_bytes=config.shuffle_window_mb * 2**20,
            validate_every=config.validate_every,
            validate_fraction=config.validate_fraction,
            validate_batch_size=config.validate_batch_size or config.batch_size,
        )

    @property
    def num_train(self) -> int:
        """Rows of the training table."""
        return sum(num_rows for num_rows, _ in self.train_groups)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may have fewer images."""
        return -(-self.num_train // self.batch_size)

    @property
    def num_validated(self) -> int:
        """Rows of a validation, rounded up; they lie evenly spread over the table."""
        # Rounding first, or 0.07 of 100 rows would be 8 of them.
        return min(self.num_val, max(1, math.ceil(round(self.validate_fraction * self.num_val, 6))))

    def validates(self, epoch: int) -> bool:
        """Whether a validation follows this epoch."""
        return (epoch + 1) % self.validate_every == 0 or epoch + 1 == self.epochs

    def validation_rounds(self, world_size: int) -> int:
        """Micro-batches that each worker takes in a validation."""
        return -(-self.num_validated // (self.validate_batch_size * world_size))

    def step_rows(self, epoch: int, step: int) -> Rows:
        """The rows of an optimizer step, over all workers."""
        order, _ = _epoch_order(self.train_groups, self.seed, self.window_bytes, epoch)
        return order[step * self.batch_size : (step + 1) * self.batch_size]

    def steps_of_rows(self, epoch: int) -> Rows:
        """The optimizer step that each row of the training table is in, int64 [num_train]; inverse of `step_rows`."""
        order, _ = _epoch_order(self.train_groups, self.seed, self.window_bytes, epoch)
        steps = np.empty(len(order), np.int64)
        steps[order] = np.arange(len(order)) // self.batch_size
        return steps

    def partner_rows(self, epoch: int, step: int, row: int) -> PartnerRows:
        """What an image is mixed with; it depends on nothing but the plan, so not on workers or restarts.

        Partners come out of the window in which the step begins: its row groups are the ones that are read anyway.

        Args:
            epoch: Counted from 0.
            step: The step that the row is in.
            row: The image's row in the training table.
        """
        order, starts = _epoch_order(self.train_groups, self.seed, self.window_bytes, epoch)
        window = int(np.searchsorted(starts, step * self.batch_size, side="right")) - 1
        pool = order[starts[window] : starts[window + 1] if window + 1 < len(starts) else len(order)]
        rng = np.random.default_rng([self.seed, epoch, row, _PARTNER_STREAM])
        with_mosaic, with_mixup = rng.random(2) < (MOSAIC_P, MIXUP_P)
        # One more than needed: the row itself may be among them.
        drawn = pool[rng.choice(len(pool), size=min(5, len(pool)), replace=False)].tolist()
        others = [other for other in drawn if other != row]
        return PartnerRows(
            mosaic=tuple(others[:3]) if with_mosaic else (), mixup=tuple(others[-1:]) if with_mixup else ()
        )

    def segments(self, *, start_epoch: int = 0, start_step: int = 0) -> Iterator[Segment]:
        """What is to be read from a step of an epoch to the end of the run, in order."""
        for epoch in range(start_epoch, self.epochs):
            first = start_step if epoch == start_epoch else 0
            _, window_starts = _epoch_order(self.train_groups, self.seed, self.window_bytes, epoch)
            cuts = sorted({-(-start // self.batch_size) for start in window_starts} | {self.steps_per_epoch})
            for cut in cuts:
                if cut > first:
                    yield Segment("train", epoch, first, cut)
                    first = cut
            if self.validates(epoch):
                yield Segment("validate", epoch, 0, 0)

    def micro_batches(self, segment: Segment, world_size: int) -> Iterator[MicroBatch]:
        """The micro-batches of a segment, in the order in which they are dealt out to the workers in turn."""
        if segment.kind == "validate":
            yield from self._validation(segment.epoch, world_size)
            return
        for step in range(segment.first, segment.last):
            shares = np.array_split(self.step_rows(segment.epoch, step), world_size * self.accumulate)
            for part in range(self.accumulate):
                for rank in range(world_size):
                    rows = tuple(shares[rank * self.accumulate + part].tolist())
                    yield MicroBatch("train", segment.epoch, step, part, rank, rows)

    def _validation(self, epoch: int, world_size: int) -> Iterator[MicroBatch]:
        size, used = self.validate_batch_size, self.num_validated
        for number in range(self.validation_rounds(world_size) * world_size):
            places = range(number * size, min((number + 1) * size, used))
            rows = tuple(place * self.num_val // used for place in places)
            yield MicroBatch("validate", epoch, number // world_size, 0, number % world_size, rows)


@lru_cache(maxsize=2)
def _epoch_order(
    groups: Sequence[tuple[int, int]], seed: int, window_bytes: int, epoch: int
) -> tuple[Rows, tuple[int, ...]]:
    """Row numbers in the order of an epoch, and the places where its windows start."""
    rng = np.random.default_rng([seed, epoch])
    first_rows = np.cumsum([0, *(num_rows for num_rows, _ in groups)])
    parts: list[Rows] = []
    starts: list[int] = []
    window: list[Rows] = []
    position = window_size = 0
    shuffled = rng.permutation(len(groups))
    for place, group in enumerate(shuffled):
        window.append(np.arange(first_rows[group], first_rows[group + 1], dtype=np.int64))
        window_size += groups[group][1]
        if window_size >= window_bytes or place == len(shuffled) - 1:
            rows = rng.permutation(np.concatenate(window))
            parts.append(rows)
            starts.append(position)
            position += len(rows)
            window, window_size = [], 0
    return np.concatenate(parts), tuple(starts)
