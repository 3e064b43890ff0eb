"""States of a training run: everything needed to resume it, at the end or in the middle of an epoch.

A state is a single file, OUT/states/EPOCH-STEP.pt, so that writing it is atomic on a disk and in an object store. A
run resumes from the newest readable state, on any number of workers.
"""

import copy
import dataclasses
import io
import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydet.common.errors import first_line
from raydet.models.checkpoints import STATES_FOLDER
from raydet.tables import storage
from raydet.training.meter import merge_states

logger = logging.getLogger("raydet")


@dataclass(frozen=True)
class Position:
    """The next step of a run. Both numbers start at 0; `step` may be one past the last step of an epoch."""

    epoch: int
    step: int

    @property
    def file_name(self) -> str:
        """Name of the state file; names sort in the order of positions."""
        return f"{self.epoch:05d}-{self.step:07d}.pt"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The `state_dict` of rank 0's trainer, plus the local state of the other ranks.

    Attributes:
        position: The next step.
        history: Records of the finished epochs, as JSON values.
        meters: Per worker, its sums over the epoch so far; empty at the start of an epoch.
        model: State dict of the model.
        buffers: Per worker, the batch-norm statistics of its own images, and those of the moving average under
            `average.NAME`.
        parts: State dicts of the optimizer, the schedule, the gradient scaler and the moving average.
    """

    position: Position
    history: list[dict[str, Any]]
    meters: list[dict[str, Any]]
    model: dict[str, Tensor]
    buffers: list[dict[str, Tensor]]
    parts: dict[str, Any]

    @classmethod
    def of_ranks(cls, first: Mapping[str, Any], locals_of_ranks: Sequence[Mapping[str, Any]]) -> "TrainingState":
        """Join the states of all ranks.

        Args:
            first: `Trainer.state_dict()` of rank 0.
            locals_of_ranks: Per rank, `meter` and `buffers` of its state dict.
        """
        position = first["position"]
        return cls(
            position=position,
            history=first["history"],
            meters=[each["meter"] for each in locals_of_ranks] if position.step else [],
            model=first["model"],
            buffers=[each["buffers"] for each in locals_of_ranks],
            parts=first["parts"],
        )

    def of_rank(self, rank: int, world_size: int) -> dict[str, Any]:
        """Return the state for `Trainer.load_state_dict` of one rank.

        If the number of workers has changed, every rank gets the mean of the buffers, and rank 0 gets all sums.
        """
        meter, buffers = None, self.buffers[0]
        if len(self.buffers) == world_size:
            buffers = self.buffers[rank]
            meter = self.meters[rank] if self.meters else None
        else:
            buffers = {name: torch.stack([each[name] for each in self.buffers]).mean(0) for name in buffers}
            if self.meters and rank == 0:
                meter = merge_states(self.meters)
        return {
            "position": self.position,
            "history": self.history,
            "meter": meter,
            "model": self.model,
            "buffers": buffers,
            "parts": self.parts,
        }


class HostMemory:
    """A copy of a state in host memory, unaffected by later steps.

    The memory is kept for the next state, because allocating pinned memory of this size is slow.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, ...], Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    def copy(self, state: TrainingState) -> TrainingState:
        """Copy a state and return the copy, which is valid until the next call.

        A GPU copies asynchronously: only its later work waits for the copy, and `wait` must precede the first use.
        """
        device = next((value.device for value in state.model.values() if value.is_cuda), None)
        if device is None:
            return self._copied(state)
        self._stream = self._stream or torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            copied = self._copied(state)
            self._event = self._stream.record_event()
        current.wait_stream(self._stream)  # the next step must not change what is being copied
        return copied

    def wait(self) -> None:
        """Wait until the copy is complete; called in a different thread from `copy`."""
        if self._event is not None:
            self._event.synchronize()

    def _copied(self, state: TrainingState) -> TrainingState:
        return dataclasses.replace(
            state,
            model=self._held(state.model, ("model",)),
            buffers=self._held(state.buffers, ("buffers",)),
            parts=self._held(state.parts, ("parts",)),
        )

    def _held(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: self._held(each, (*path, str(key))) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._held(each, (*path, str(number))) for number, each in enumerate(value))
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        held = self._buffers.get(path)
        if held is None or held.shape != value.shape or held.dtype != value.dtype:
            held = self._buffers[path] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return held.copy_(value.detach(), non_blocking=True)


def save_state(out: str, state: TrainingState, *, keep: int | None) -> None:
    """Write a state atomically, then delete all but the newest `keep` states; None keeps all.

    Raises:
        OSError: The state cannot be written; the earlier states are intact.
    """
    content = {
        "position": [state.position.epoch, state.position.step],
        "history": json.dumps(state.history),
        "meters": json.dumps(state.meters),
        "model": state.model,
        "buffers": state.buffers,
        "parts": state.parts,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    storage.write_bytes(storage.join(out, STATES_FOLDER, state.position.file_name), buffer.getbuffer())
    for name in [] if keep is None else saved_states(out)[keep:]:
        storage.delete_file(storage.join(out, STATES_FOLDER, name))


def saved_states(out: str) -> list[str]:
    """Return the file names of a run's states, newest first."""
    names = [name for name in storage.list_files(storage.join(out, STATES_FOLDER)) if not name.startswith(".")]
    return sorted((name for name in names if name.endswith(".pt")), reverse=True)


def discard_states(out: str, *, since: Position) -> None:
    """Delete the states from a position on, whose weights have turned out to be useless.

    If no earlier state is left, they stay, except those of the first epoch, which are worth less than a fresh start.
    """
    names = saved_states(out)
    useless = [name for name in names if name >= since.file_name]
    if useless == names and since.epoch > 0:
        return
    for name in useless:
        storage.delete_file(storage.join(out, STATES_FOLDER, name))


def newest_state(out: str) -> bytes | None:
    """Return the content of the newest readable state, for `parse_state`; None if there is none."""
    for name in saved_states(out):
        try:
            data = storage.read_bytes(storage.join(out, STATES_FOLDER, name))
            parse_state(data, torch.device("cpu"))
        except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
            logger.warning("%s cannot be read (%s); resuming from the previous state", name, first_line(error))
            continue
        return data
    return None


def parse_state(data: bytes, device: torch.device) -> TrainingState:
    """Parse the content of a state file, with its tensors on a device."""
    content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return TrainingState(
        position=Position(*content["position"]),
        history=json.loads(content["history"]),
        meters=json.loads(content["meters"]),
        model=content["model"],
        buffers=content["buffers"],
        parts=content["parts"],
    )
