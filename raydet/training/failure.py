"""A worker's failure: one record, which an exception carries from the worker to the command.

Ray Train hands a worker's exceptions to callbacks in its controller. An error raised there ends the run at once, where
an exception of a worker alone would have Ray start all workers again.
"""

import errno
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.train import ControllerError, TrainingFailedError

from raydet.cluster.ray_internals import UserCallback
from raydet.common.errors import RunError, UserError
from raydet.common.redaction import without_secrets
from raydet.config import TrainConfig
from raydet.tables import storage

if TYPE_CHECKING:
    from raydet.training.state import Position

_BUGS = (AssertionError, AttributeError, LookupError, NameError, NotImplementedError, TypeError, ValueError)
"""Errors that new workers would meet again, unlike the death of another worker or a broken network."""


@dataclass(frozen=True)
class WorkerFailure:
    """A reason to end a run for good.

    Attributes:
        line: For the user.
        is_mistake: The input is wrong; otherwise the run failed on its way.
        log: URI of the file with the traceback, for a bug.
    """

    line: str
    is_mistake: bool = False
    log: str | None = None

    def to_error(self) -> UserError | RunError:
        """The exception for the caller of `train`."""
        line = self.line if self.log is None else f"{self.line}; traceback: {self.log}"
        return UserError(line) if self.is_mistake else RunError(line)


class WorkerFailed(Exception):  # noqa: N818 - it carries a failure, and is handled as one
    """Ends the run on all workers; starting them again would fail again."""

    def __init__(self, failure: WorkerFailure) -> None:
        super().__init__(failure)
        self.failure = failure


def failed(error: BaseException, out: str) -> WorkerFailed | None:
    """Turns a worker's exception into one that ends the run; None where new workers may do better.

    Args:
        error: As the worker raised it.
        out: The run folder; a bug leaves its traceback there, in log/error.log.
    """
    if isinstance(error, WorkerFailed):
        return error
    if isinstance(error, UserError):
        return WorkerFailed(WorkerFailure(str(error), is_mistake=True))
    if not isinstance(error, _BUGS):
        return None
    log = storage.join(out, "log", "error.log")
    content = "".join(traceback.format_exception(error))
    storage.write_bytes(log, without_secrets(content).encode())
    reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return WorkerFailed(WorkerFailure(f"a worker failed ({type(error).__name__}: {reason})", log=log))


class EndForGood(UserCallback):
    """Has Ray Train's controller end a run that a worker has ended, where it would start the workers again."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """Raises the failure of the lowest rank that has one."""
        for _, error in sorted(worker_exceptions.items()):
            if isinstance(error, WorkerFailed):
                raise error


def failure_of(error: TrainingFailedError) -> WorkerFailure | None:
    """The failure with which a worker ended the run; None where Ray Train gave up by itself."""
    cause = error.controller_failure if isinstance(error, ControllerError) else None
    return cause.failure if isinstance(cause, WorkerFailed) else None


def not_a_number(position: "Position", terms: Sequence[str], image_ids: Sequence[int]) -> WorkerFailed:
    """A loss that is not finite, in the step at a position, with these terms and images."""
    return _failed(
        f"the loss is not a number in step {position.step + 1} of epoch {position.epoch + 1}: {', '.join(terms)}, with "
        f"the images {', '.join(map(str, image_ids))}; look at these, lower --learning-rate or --max-grad-norm, or use "
        "--precision fp32 or bf16"
    )


def out_of_memory(
    position: "Position", config: TrainConfig, *, num_images: int, size_hw: tuple[int, ...]
) -> WorkerFailed:
    """A step that did not fit, with so many images at once of up to this height and width in pixels."""
    return _failed(
        f"out of memory in step {position.step + 1} of epoch {position.epoch + 1}: a worker had {num_images} images at "
        f"once of up to {size_hw[0]} × {size_hw[1]} pixels (--batch-size {config.batch_size} over all workers, "
        f"--gradient-accumulation-steps {config.gradient_accumulation_steps}); raise --gradient-accumulation-steps, "
        "switch on --gradient-checkpointing, or lower --image-size or --batch-size"
    )


def cannot_write(position: "Position", config: TrainConfig, error: OSError) -> WorkerFailed:
    """A checkpoint that could not be written."""
    reason = "the disk is full" if storage.has_code(error, errno.ENOSPC) else str(error)
    return _failed(
        f"cannot write the checkpoint after step {position.step} of epoch {position.epoch + 1} to {config.out}: "
        f"{reason}; the earlier states are whole, and the same command resumes from them"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on the CPU or on a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))
    )


def _failed(line: str) -> WorkerFailed:
    return WorkerFailed(WorkerFailure(line))
