"""States of a training run: all that it needs to go on, at the end of an epoch or in the middle of one.

A state is one file, OUT/states/EPOCH-STEP.pt, so that it is there as a whole or not at all, on a disk and in an object
store. The newest that can be read is gone on from.
"""

import io
import json
import logging
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydet.models.checkpoints import STATES_FOLDER
from raydet.tables import storage

logger = logging.getLogger("raydet")


@dataclass(frozen=True)
class Position:
    """Where a run stands: the next step to take, both counted from 0; `step` may be one past an epoch's last."""

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
    """All that a run needs to go on.

    Attributes:
        position: The next step to take.
        history: Entries of the finished epochs.
        meters: Of each worker, what it has added up in the epoch so far; empty at the start of one.
        model: The weights that learn.
        buffers: Of each worker, what its model gathers over its own images: batch-norm statistics. Likewise, as
            `average.…`, those of the average.
        parts: State dicts of the optimizer and all else that has one.
    """

    position: Position
    history: list[dict[str, Any]]
    meters: list[dict[str, Any]]
    model: dict[str, Tensor]
    buffers: list[dict[str, Tensor]]
    parts: dict[str, Any]


def save_state(out: str, state: TrainingState, *, keep: int) -> None:
    """Writes a state, whole or not at all, and then removes all but the newest `keep`.

    Raises:
        OSError: It cannot be written; those that were there are there still.
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
    """The file name of the newest state that can be read; null where there is none."""
    for name in saved_states(out):
        try:
            load_state(out, name, torch.device("cpu"))
        except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("%s cannot be read (%s), going on from an earlier one", name, reason)
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
