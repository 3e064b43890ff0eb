"""Checkpoints, written in the background: by a thread, from a copy of the state in host memory."""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from raydet.config import ResolvedTrainConfig
from raydet.models.checkpoints import ADAPTER_FOLDER
from raydet.models.detector import Detector
from raydet.tables import storage
from raydet.training.failure import cannot_write
from raydet.training.history import EpochRecord, is_best_so_far, write_history
from raydet.training.state import HostMemory, Position, TrainingState, save_state

Write = Callable[[], object]
"""A part of a checkpoint that remains to be written."""


class Saver:
    """Writer of one checkpoint at a time. A kill at any moment leaves the previous checkpoint intact.

    Every method may raise `WorkerFailed`, if this or an earlier checkpoint could not be written.
    """

    def __init__(self, config: ResolvedTrainConfig) -> None:
        self._config, self._memory = config, HostMemory()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._write: Future[None] | None = None
        self._position = Position(0, 0)

    def model(self, detector: Detector, history: Sequence[EpochRecord], position: Position) -> list[Write]:
        """Save the current weights to a local folder.

        Args:
            detector: The detector to save.
            history: Records of the finished epochs, including the current one.
            position: The next step.

        Returns:
            The remaining writes, for `save`: if the newest epoch is the best so far, OUT/adapter of a run with adapters
            and OUT/checkpoint; then OUT/last.
        """
        self._position, config = position, self._config
        folder = tempfile.TemporaryDirectory(prefix="raydet-checkpoint-")
        model, adapter = (Path(folder.name, name) for name in ("model", "adapter"))
        is_best = is_best_so_far(history, config.metric_for_best_model)
        places = [(model, "checkpoint"), (model, "last")] if is_best else [(model, "last")]
        try:
            detector.save(str(model))
            if is_best and config.lora:
                adapter.mkdir()
                detector.save_adapter(str(adapter), base=config.model)
                places.insert(0, (adapter, ADAPTER_FOLDER))
        except OSError as error:
            raise cannot_write(position, config, error) from error
        publish = [partial(storage.publish_folder, str(own), storage.join(config.out, name)) for own, name in places]
        return [*publish, folder.cleanup]

    def save(
        self,
        state: TrainingState,
        history: Sequence[EpochRecord],
        *,
        after: Sequence[Write] = (),
        keeps_all: bool = False,
    ) -> None:
        """Copy a state and start writing it. Waits for the previous checkpoint, and for nothing else.

        Args:
            state: The state, whose tensors may change after the call.
            history: Records of the finished epochs.
            after: Writes to perform before the state, from `model`: a run that is killed in between resumes from the
                earlier state and repeats them.
            keeps_all: Do not delete older states.
        """
        self.wait()
        self._position = state.position
        copy, out = self._memory.copy(state), self._config.out
        writes: list[Write] = [
            *after,
            self._memory.wait,
            partial(save_state, out, copy, keep=None if keeps_all else self._config.keep_states),
            partial(write_history, out, list(history)),
        ]
        self._write = self._executor.submit(_call_all, writes)

    def check(self) -> None:
        """Raise the failure of the latest checkpoint, if it has failed by now."""
        if self._write is not None and self._write.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the latest checkpoint is written."""
        write, self._write = self._write, None
        if write is None:
            return
        try:
            write.result()
        except OSError as error:
            raise cannot_write(self._position, self._config, error) from error

    def close(self) -> None:
        """Finish the checkpoint that is being written, without raising its failure."""
        self._executor.shutdown()


def _call_all(writes: Sequence[Write]) -> None:
    for write in writes:
        write()
