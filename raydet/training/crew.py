"""The workers of a run as one of them sees them: what they exchange, and what the command hears and asks."""

from collections.abc import Sequence
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from raydet.training.history import EpochRecord


class Crew:
    """A worker's place among the workers; every method named `all_…`, `gather` and `share` needs all of them.

    Attributes:
        rank: Of this worker, from 0.
        world_size: Number of workers.
    """

    def __init__(self, board: Any) -> None:
        """Joins the workers of this Ray Train run.

        Args:
            board: Of the command, see `raydet.cluster.board.Board`.
        """
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._board = board
        self._group: Any = dist.new_group(backend="gloo")  # for plain objects and flags, whatever the device
        self._answer: ray.ObjectRef[bool] | None = None
        self._is_asked = False
        self._has_noticed_preemption = False

    def gather(self, value: Any) -> list[Any] | None:
        """Collects every worker's value on rank 0, in the order of ranks; None on the others."""
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self._group)
        return gathered

    def share(self, value: Any) -> Any:
        """Rank 0's value on all workers."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Adds numbers up over all workers, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self._group)
        return [float(value) for value in tensor]

    def say(self, line: str) -> None:
        """Shows a line to the user; rank 0 speaks for all."""
        if self.rank == 0:
            self._board.pin.remote(line)

    def announce(self, record: EpochRecord) -> None:
        """Tells the command that an epoch has ended; rank 0 speaks for all."""
        if self.rank == 0:
            self._board.pin.remote(record)

    def show(self, epoch: int, step: int, num_steps: int) -> None:
        """Shows how far the run is before it ends; returns when the command can see it."""
        if self.rank == 0:
            ray.get(self._board.show.remote({"epoch": epoch + 1, "step": step, "num_steps": num_steps}))

    def is_asked_to_stop(self, progress: dict[str, int] | None = None) -> bool:
        """Whether the command asks to stop, as it answered to an earlier call; never waits.

        Args:
            progress: Shown to the user on the way.
        """
        if self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            if not ready:
                return self._is_asked
            self._is_asked = ray.get(self._answer)
        self._answer = self._board.show.remote(progress)
        return self._is_asked

    def notices_preemption(self) -> bool:
        """Whether Ray has said, for the first time, that a node of the workers is about to be taken away."""
        if self._has_noticed_preemption or ray.train.get_preemption_info() is None:
            return False
        self._has_noticed_preemption = True
        return True
