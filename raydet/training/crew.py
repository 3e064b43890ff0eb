"""A worker's communication with the other workers and with the command that started the run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from raydet.training.history import EpochRecord
from raydet.training.progress import WorkerProgress


class Crew:
    """One worker's view of all workers.

    `gather`, `share`, `share_bytes`, `exchange`, `all_sum` and `report` are collective: every rank must call them.

    Attributes:
        rank: Rank of this worker, from 0.
        world_size: Number of workers.
        local_world_size: Number of workers on this node.
        device: Device of this worker.
    """

    def __init__(
        self, board: Any, *, rank: int, world_size: int, local_world_size: int, device: "torch.device"
    ) -> None:
        """Join the workers. If there are several, their process group must already exist.

        Args:
            board: Actor handle of the command's `raydet.cluster.board.Board`.
            rank: Rank of this worker, from 0.
            world_size: Number of workers.
            local_world_size: Number of workers on this node.
            device: Device of this worker.
        """
        self.rank, self.world_size = rank, world_size
        self.local_world_size, self.device = local_world_size, device
        self._board = board
        # For plain objects and flags, on any device.
        self._group: Any = dist.new_group(backend="gloo") if world_size > 1 else None
        self._is_in_ray_train = False
        self._answer: ray.ObjectRef[bool] | None = None
        self._is_asked = False
        self._has_noticed_preemption = False

    @classmethod
    def of_ray_train(cls, board: Any) -> "Crew":
        """Join the workers of this Ray Train run."""
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        crew = cls(
            board,
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            local_world_size=context.get_local_world_size(),
            device=get_device(),
        )
        crew._is_in_ray_train = True
        return crew

    @classmethod
    def alone(cls, board: Any, *, use_gpu: bool) -> "Crew":
        """Make the crew of a single worker outside Ray Train."""
        device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
        return cls(board, rank=0, world_size=1, local_world_size=1, device=device)

    def gather(self, value: Any) -> list[Any] | None:
        """Return every worker's value, in rank order, on rank 0; return None on the other ranks."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self._group)
        return gathered

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def exchange(self, value: Any) -> list[Any]:
        """Return every worker's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def share_bytes(self, data: bytes | None) -> bytes | None:
        """Return rank 0's bytes, if any, on every rank, without pickling them."""
        size = self.share(None if data is None else len(data))
        if size is None or self.world_size == 1:
            return data
        buffer = torch.empty(size, dtype=torch.uint8)
        if data is not None:
            buffer.numpy()[:] = np.frombuffer(data, np.uint8)
        dist.broadcast(buffer, src=0, group=self._group)
        return buffer.numpy().tobytes() if data is None else data

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Sum numbers element by element over all workers, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self._group)
        return [float(value) for value in tensor]

    def say(self, line: str) -> None:
        """Show a line to the user. Only rank 0 sends it."""
        if self.rank == 0:
            self._board.pin.remote(line)

    def announce(self, record: EpochRecord) -> None:
        """Report a finished epoch to the command. Only rank 0 sends it."""
        if self.rank == 0:
            self._board.pin.remote(record)

    def report(self, metrics: dict[str, Any]) -> None:
        """Report the metrics of a finished epoch to Ray Train, if it runs the workers. Collective."""
        if self._is_in_ray_train:
            import ray.train

            ray.train.report(metrics)

    def show(self, epoch: int, step: int, num_steps: int) -> None:
        """Report the progress of a run that is about to stop, and wait until the command can read it."""
        if self.rank == 0:
            ray.get(self._board.show.remote(WorkerProgress(epoch=epoch + 1, step=step, num_steps=num_steps)))

    def is_asked_to_stop(self, progress: Callable[[], WorkerProgress] | None = None) -> bool:
        """Return True if the command has asked to stop. Never blocks: the answer may belong to an earlier call.

        Args:
            progress: Returns the progress to show to the user; called only if the command has read the last one.
        """
        if self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            if not ready:
                return self._is_asked
            self._is_asked = ray.get(self._answer)
        self._answer = self._board.show.remote(None if progress is None else progress())
        return self._is_asked

    def notices_preemption(self) -> bool:
        """Return True the first time that Ray reports the preemption of a worker's node; False afterwards."""
        if self._has_noticed_preemption or not self._is_in_ray_train:
            return False
        import ray.train

        if ray.train.get_preemption_info() is None:
            return False
        self._has_noticed_preemption = True
        return True
