"""The order of the data: (row groups of the table, seed, epoch, global batch size) → the rows of step *k*.

The plan is independent of the number of workers: a step is a list of rows, and each worker takes a slice of the list.

Rows are shuffled within windows of complete row groups, so that each row group of a table of any size is read about
once per epoch. A table that fits into one window is shuffled globally. This module does not import Ray.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from raydet.training.feeding.repeats import Repeats

if TYPE_CHECKING:
    from raydet.config import ResolvedTrainConfig
    from raydet.tables.table import Table
    from raydet.training.feeding.mixture import Mixture

Rows = npt.NDArray[np.int64]
Kind = Literal["train", "validate"]

MOSAIC_P = 0.5
"""Fraction of images that become a mosaic, if the augmentation mixes images."""
MIXUP_P = 0.15
"""Fraction of images that are blended with another image, if the augmentation mixes images."""

# Last word of a seed: keeps random streams of different uses apart. `raydet.augmentation.view` uses 2.
_PARTNER_STREAM = 1


@dataclass(frozen=True)
class MicroBatch:
    """Images that one worker processes in one forward pass.

    Attributes:
        kind: Use of the images: training or validation.
        epoch: Epoch, from 0.
        step: Optimizer step within the epoch, or validation round, from 0.
        part: Micro-batch within the worker's share of the step, from 0.
        rank: Rank of the worker.
        rows: Row numbers in the table; empty if there are fewer images than workers. The number of the k-th repetition
            of a row in an epoch, from 0, is the row's plus k times the rows of the table.
    """

    kind: Kind
    epoch: int
    step: int
    part: int
    rank: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class PartnerRows:
    """Rows that an image is mixed with in an epoch: three or none for a mosaic, one or none for a mixup.

    There are fewer if the window has too few other rows.
    """

    mosaic: tuple[int, ...]
    mixup: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Consecutive micro-batches over the same row groups, read by one task: steps `first` to `last` (exclusive)."""

    kind: Kind
    epoch: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The reading order of a run: the steps of each epoch, followed by its validation.

    Attributes:
        train_groups: Number of rows and bytes of each row group of the training table.
        repeats: How often each row of the training table is shown per epoch; None for once.
        num_val: Rows of the validation table.
        batch_size: Images per optimizer step, over all workers.
        accumulate: Micro-batches per worker and step.
        epochs: Passes over the training table.
        seed: Seed of the shuffling.
        window_bytes: Approximate size of the windows of row groups that are shuffled together.
        validate_every: Epochs between validations; the last epoch is always validated.
        validate_batch_size: Images per micro-batch in validation, for any number of workers.
        validate_fraction: Fraction of the validation table in use, above 0 and at most 1.
        breaks: Epoch and step, both from 0, at which a new segment begins.
    """

    train_groups: tuple[tuple[int, int], ...]
    repeats: Repeats | None = None
    num_val: int
    batch_size: int
    accumulate: int
    epochs: int
    seed: int
    window_bytes: int
    validate_every: int
    validate_batch_size: int
    validate_fraction: float = 1.0
    breaks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_training(
        cls,
        config: "ResolvedTrainConfig",
        train: "Table | Mixture",
        *,
        num_val: int,
        breaks: tuple[tuple[int, int], ...] = (),
    ) -> "RunPlan":
        """Plan a training run.

        Args:
            config: Configuration of the run.
            train: Training table, of which only the manifest is read.
            num_val: Rows of the validation table.
            breaks: Epoch and step, both from 0, at which a new segment must begin.
        """
        return cls(
            train_groups=tuple((group.num_rows, group.num_bytes) for group in train.row_groups()),
            repeats=getattr(train, "repeats", None),
            num_val=num_val,
            batch_size=config.batch_size,
            accumulate=config.gradient_accumulation_steps,
            epochs=config.epochs,
            seed=config.seed,
            window_bytes=config.shuffle_window_mb * 2**20,
            validate_every=config.validate_every,
            validate_fraction=config.validate_fraction,
            validate_batch_size=config.validate_batch_size or config.batch_size,
            breaks=breaks,
        )

    @property
    def num_rows(self) -> int:
        """Rows of the training table."""
        return sum(num_rows for num_rows, _ in self.train_groups)

    @property
    def num_train(self) -> int:
        """Images per epoch; an image counts as often as it is shown."""
        return self.num_rows if self.repeats is None else self.repeats.num_shown

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last one may have fewer images."""
        return -(-self.num_train // self.batch_size)

    @property
    def num_validated(self) -> int:
        """Rows per validation, rounded up; they are spread evenly over the table."""
        # Without rounding first, 0.07 of 100 rows would be 8.
        return min(self.num_val, max(1, math.ceil(round(self.validate_fraction * self.num_val, 6))))

    def validates(self, epoch: int) -> bool:
        """Return True if a validation follows this epoch."""
        return (epoch + 1) % self.validate_every == 0 or epoch + 1 == self.epochs

    def validation_rounds(self, world_size: int) -> int:
        """Return the number of micro-batches per worker in a validation."""
        return -(-self.num_validated // (self.validate_batch_size * world_size))

    def step_rows(self, epoch: int, step: int) -> Rows:
        """Return the rows of an optimizer step, over all workers."""
        order, _ = self._order(epoch)
        return order[step * self.batch_size : (step + 1) * self.batch_size]

    def steps_of_rows(self, epoch: int) -> Rows:
        """Return the first optimizer step of each row of the training table, int64 [num_rows]; -1 if it has none."""
        order, _ = self._order(epoch)
        steps = np.full(self.num_rows, -1, np.int64)
        places = np.flatnonzero(order < self.num_rows)
        steps[order[places]] = places // self.batch_size
        return steps

    def _order(self, epoch: int) -> tuple[Rows, tuple[int, ...]]:
        return _epoch_order(self.train_groups, self.repeats, self.seed, self.window_bytes, epoch)

    def partner_rows(self, epoch: int, step: int, row: int) -> PartnerRows:
        """Draw the rows that an image is mixed with. They depend on the plan only, not on workers or restarts.

        Partners come from the window in which the step starts, because its row groups are read anyway.

        Args:
            epoch: Epoch, from 0.
            step: Step of the row.
            row: Row number of the image, as in `MicroBatch.rows`.
        """
        order, starts = self._order(epoch)
        window = int(np.searchsorted(starts, step * self.batch_size, side="right")) - 1
        pool = order[starts[window] : starts[window + 1] if window + 1 < len(starts) else len(order)]
        rng = np.random.default_rng([self.seed, epoch, row, _PARTNER_STREAM])
        with_mosaic, with_mixup = rng.random(2) < (MOSAIC_P, MIXUP_P)
        # One more than needed, because the draw may include the row itself.
        drawn = pool[rng.choice(len(pool), size=min(5, len(pool)), replace=False)].tolist()
        num_rows = self.num_rows
        others = [other for other in drawn if (other - row) % num_rows]
        return PartnerRows(
            mosaic=tuple(others[:3]) if with_mosaic else (), mixup=tuple(others[-1:]) if with_mixup else ()
        )

    def segments(self, *, start_epoch: int = 0, start_step: int = 0) -> Iterator[Segment]:
        """Yield the segments to read, in order, from the given step to the end of the run."""
        for epoch in range(start_epoch, self.epochs):
            first = start_step if epoch == start_epoch else 0
            _, window_starts = self._order(epoch)
            breaks = {step for broken, step in self.breaks if broken == epoch}
            cuts = sorted({-(-start // self.batch_size) for start in window_starts} | breaks | {self.steps_per_epoch})
            for cut in cuts:
                if first < cut <= self.steps_per_epoch:
                    yield Segment("train", epoch, first, cut)
                    first = cut
            if self.validates(epoch):
                yield Segment("validate", epoch, 0, 0)

    def micro_batches(self, segment: Segment, world_size: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a segment in the order in which the workers receive them, in turn."""
        if segment.kind == "validate":
            yield from self._validation(segment.epoch, world_size)
            return
        for step in range(segment.first, segment.last):
            shares = np.array_split(self.step_rows(segment.epoch, step), world_size * self.accumulate)
            for part in range(self.accumulate):
                for rank in range(world_size):
                    rows = tuple(shares[rank * self.accumulate + part].tolist())
                    yield MicroBatch("train", segment.epoch, step, part, rank, rows)

    def chunks(
        self, segment: Segment, world_size: int, *, ranks: Sequence[int], most_images: int, ramp: bool = False
    ) -> Iterator[tuple[MicroBatch, ...]]:
        """Yield the micro-batches of a segment in chunks: consecutive micro-batches of one rank, decoded by one task.

        Args:
            segment: Segment to divide.
            world_size: Number of workers.
            ranks: The workers to yield chunks for.
            most_images: Maximum number of images per chunk; a chunk holds at least one step of its rank.
            ramp: Start with chunks of one step, and double their length, so that the first images arrive early.

        Yields:
            A chunk for each rank in turn, all over the same steps; then those of the next steps.
        """
        if segment.kind == "validate":
            images_per_step, per_step = self.validate_batch_size, world_size
        else:
            images_per_step, per_step = -(-self.batch_size // world_size), world_size * self.accumulate
        longest = max(1, most_images // images_per_step)
        length = 1 if ramp else longest
        micro_batches = self.micro_batches(segment, world_size)
        while upcoming := tuple(islice(micro_batches, length * per_step)):
            for rank in ranks:
                yield tuple(one for one in upcoming if one.rank == rank)
            length = min(2 * length, longest)

    def _validation(self, epoch: int, world_size: int) -> Iterator[MicroBatch]:
        size, used = self.validate_batch_size, self.num_validated
        for number in range(self.validation_rounds(world_size) * world_size):
            places = range(number * size, min((number + 1) * size, used))
            rows = tuple(place * self.num_val // used for place in places)
            yield MicroBatch("validate", epoch, number // world_size, 0, number % world_size, rows)


@lru_cache(maxsize=2)
def _epoch_order(
    groups: Sequence[tuple[int, int]], repeats: Repeats | None, seed: int, window_bytes: int, epoch: int
) -> tuple[Rows, tuple[int, ...]]:
    """Return the row numbers in the order of an epoch, and the positions at which its windows start."""
    rng = np.random.default_rng([seed, epoch])
    first_rows = np.cumsum([0, *(num_rows for num_rows, _ in groups)])
    counts = None if repeats is None else repeats.counts(seed, epoch)
    parts: list[Rows] = []
    starts: list[int] = []
    window: list[Rows] = []
    position = window_size = 0
    shuffled = rng.permutation(len(groups))
    for place, group in enumerate(shuffled):
        rows = np.arange(first_rows[group], first_rows[group + 1], dtype=np.int64)
        window.append(rows if counts is None else _repeated(rows, counts[rows], int(first_rows[-1])))
        window_size += groups[group][1]
        if window_size >= window_bytes or place == len(shuffled) - 1:
            parts.append(rng.permutation(np.concatenate(window)))
            starts.append(position)
            position += len(parts[-1])
            window, window_size = [], 0
    return np.concatenate(parts), tuple(starts)


def _repeated(rows: Rows, counts: Rows, num_rows: int) -> Rows:
    """Return each row as often as its count says, repetitions numbered as in `MicroBatch.rows`."""
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    repeated: Rows = np.repeat(rows, counts) + numbers * num_rows
    return repeated
