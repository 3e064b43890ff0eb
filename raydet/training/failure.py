"""A worker's failure: one record, which an exception carries from the worker to the command.

Ray Train hands a worker's exceptions to callbacks in its controller. An error raised there ends the run at once, where
an exception of a worker alone would have Ray start all workers again.
"""

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.train import ControllerError, TrainingFailedError, UserCallback

from raydet.common.errors import RunError, UserError
from raydet.common.redaction import without_secrets
from raydet.tables import storage

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
