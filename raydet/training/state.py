"""States of a training run: everything that resuming needs, at the end of an epoch or in the middle of one.

A state is one file, OUT/states/EPOCH-STEP.pt, so that it is there as a whole or not at all, on a disk and in an object
store. A run resumes from the newest one that can be read, on any number of workers.
"""

import io
import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydet.models.checkpoints import STATES_FOLDER
from raydet.tables import storage
from raydet.training.meter import merge_states

logger = logging.getLogger("raydet")


@dataclass(frozen=True)
class Position:
    """The next step of a run, both counted from 0; `step` may be one past an epoch's last."""

    epoch: int
    step: int

    @property
    def file_name(self) -> str:
        """Sorts as positions do."""
        return f"{self.epoch:05d}-{self.step:07d}.pt"

    @classmethod
    def of_file(cls, name: str) -> "Position":
        """Reads back `file_name`."""
        epoch, step = name.removesuffix(".pt").split("-")
        return cls(int(epoch), int(step))


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The `state_dict` of rank 0's trainer with what the other ranks alone know.

    Attributes:
        position: The next step to take.
        history: The records of the finished epochs, as JSON values.
        meters: Of each worker, its sums over the epoch so far; empty at the start of one.
        model: The weights that learn.
        buffers: Of each worker, the batch-norm statistics that its model gathers over its own images; likewise, as
            `average.…`, those of the average.
        parts: State dicts of the optimizer and all else that has one.
    """

    position: Position
    history: list[dict[str, Any]]
    meters: list[dict[str, Any]]
    model: dict[str, Tensor]
    buffers: list[dict[str, Tensor]]
    parts: dict[str, Any]

    @classmethod
    def of_ranks(cls, first: Mapping[str, Any], locals_of_ranks: Sequence[Mapping[str, Any]]) -> "TrainingState":
        """Joins the ranks' states.

        Args:
            first: `Trainer.state_dict()` of rank 0.
            locals_of_ranks: Of each rank, `meter` and `buffers` of its state dict.
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
        """The state for `Trainer.load_state_dict` of one rank.

        Where another number of workers resumes, each gets the mean of the buffers, and rank 0 all sums.
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


def save_state(out: str, state: TrainingState, *, keep: int) -> None:
    """Writes a state, whole or not at all, and then removes all but the newest `keep`.

    Raises:
        OSError: It cannot be written; the earlier states are still there.
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
    storage.write_bytes(storage.join(out, STATES_FOLDER, state.position.file_name), buffer.getvalue())
    for name in saved_states(out)[keep:]:
        storage.delete_file(storage.join(out, STATES_FOLDER, name))


def saved_states(out: str) -> list[str]:
    """File names of a run's states, the newest first."""
    names = [name for name in storage.list_files(storage.join(out, STATES_FOLDER)) if not name.startswith(".")]
    return sorted((name for name in names if name.endswith(".pt")), reverse=True)


def newest_state(out: str) -> str | None:
    """The file name of the newest state that can be read; None where there is none."""
    for name in saved_states(out):
        try:
            load_state(out, name, torch.device("cpu"))
        except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("%s cannot be read (%s); resuming from the previous state", name, reason)
            continue
        return name
    return None


def load_state(out: str, name: str, device: torch.device) -> TrainingState:
    """Reads a state, with its tensors on a device."""
    data = storage.read_bytes(storage.join(out, STATES_FOLDER, name))
    content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return TrainingState(
        position=Position(*content["position"]),
        history=json.loads(content["history"]),
        meters=json.loads(content["meters"]),
        model=content["model"],
        buffers=content["buffers"],
        parts=content["parts"],
    )
