"""A worker's failure: one record, which an exception carries from the worker to the command."""

import errno
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydet.common.errors import RunError, UserError, first_line
from raydet.common.redaction import without_secrets
from raydet.config import ResolvedTrainConfig
from raydet.tables import storage
from raydet.training.recovery.skipping import SkippedStep, end_of_run

if TYPE_CHECKING:
    from raydet.training.state import Position

_BUGS = (AssertionError, AttributeError, LookupError, NameError, NotImplementedError, TypeError, ValueError)
"""Errors that would recur after a restart, unlike the death of another worker or a network failure."""


@dataclass(frozen=True)
class WorkerFailure:
    """A failure that ends a run without a restart.

    Attributes:
        line: Message for the user.
        is_user_error: True if the input is wrong; False if the run itself failed.
        log: URI of the file with the traceback, for a bug; None otherwise.
    """

    line: str
    is_user_error: bool = False
    log: str | None = None

    def to_error(self) -> UserError | RunError:
        """Return the exception for the caller of `train`."""
        line = self.line if self.log is None else f"{self.line}; traceback: {self.log}"
        return UserError(line) if self.is_user_error else RunError(line)


class WorkerFailed(Exception):  # noqa: N818 - the name distinguishes it from the failure that it carries
    """Failure that ends the run on all workers, because a restart would fail again."""

    def __init__(self, failure: WorkerFailure) -> None:
        super().__init__(failure)
        self.failure = failure


def failed(error: BaseException, out: str) -> WorkerFailed | None:
    """Convert a worker's exception to one that ends the run; return None if a restart may succeed.

    Args:
        error: Exception that the worker raised.
        out: URI of the run folder; the traceback of a bug is written to log/error.log in it.
    """
    if isinstance(error, WorkerFailed):
        return error
    if isinstance(error, UserError):
        return WorkerFailed(WorkerFailure(str(error), is_user_error=True))
    if not isinstance(error, _BUGS):
        return None
    log = storage.join(out, "log", "error.log")
    content = "".join(traceback.format_exception(error))
    storage.write_bytes(log, without_secrets(content).encode())
    reason = first_line(error, otherwise="no message")
    return WorkerFailed(WorkerFailure(f"a worker failed ({type(error).__name__}: {reason})", log=log))


def too_many_skipped(row: Sequence[SkippedStep], settings: ResolvedTrainConfig) -> WorkerFailed:
    """Make the failure for too many skipped steps in a row.

    Args:
        row: The steps.
        settings: Configuration that held for them.
    """
    return _failed(end_of_run(row, settings))


def out_of_memory(
    position: "Position", config: ResolvedTrainConfig, *, num_images: int, size_hw: tuple[int, ...]
) -> WorkerFailed:
    """Make the failure for a step that needs more memory than there is.

    Args:
        position: Position of the step.
        config: Configuration of the run.
        num_images: Images in the largest micro-batch.
        size_hw: Height and width in pixels of the largest image.
    """
    return _failed(
        f"out of memory at step {position.step + 1} of epoch {position.epoch + 1}: a worker held {num_images} images "
        f"of up to {size_hw[0]} × {size_hw[1]} pixels (--batch-size {config.batch_size} over all workers, "
        f"--gradient-accumulation-steps {config.gradient_accumulation_steps}); raise --gradient-accumulation-steps, "
        "enable --gradient-checkpointing, or lower --image-size or --batch-size"
    )


def cannot_write(position: "Position", config: ResolvedTrainConfig, error: OSError) -> WorkerFailed:
    """Make the failure for a checkpoint that could not be written."""
    reason = "the disk is full" if storage.has_code(error, errno.ENOSPC) else str(error)
    return _failed(
        f"cannot write the checkpoint after step {position.step} of epoch {position.epoch + 1} to {config.out}: "
        f"{reason}; earlier states are intact; run the same command again to resume"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error reports a failed memory allocation, on the CPU or on a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))
    )


def _failed(line: str) -> WorkerFailed:
    return WorkerFailed(WorkerFailure(line))
