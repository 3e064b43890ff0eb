"""Repeated attempts to score all chunks of a run, and the distinction between a loss and a failure."""

import errno
import re
import traceback
from collections.abc import Callable, Iterator, Sequence

from raydet.cluster.stopwatch import FileStats
from raydet.common.errors import RunError, UserError, first_line
from raydet.common.redaction import without_secrets
from raydet.scoring.plan import LOG_FOLDER, Work, done_chunks
from raydet.tables import storage
from raydet.tables.output_errors import refusal_of

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Write errors of a disk that is full or read-only."""
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_RESUME_HINT = "run the same command again to resume"

Attempt = Callable[[Sequence[int]], Iterator[FileStats]]
"""A function that scores chunks and yields the statistics of each file once it is written."""


class Losses:
    """Errors of lost nodes, processes and connections: another attempt can succeed, unlike after a defect.

    Attributes:
        kinds: Their classes.
        no_memory: Classes of errors that report exhausted memory.
    """

    kinds: tuple[type[BaseException], ...] = (ConnectionError, OSError)
    no_memory: tuple[type[BaseException], ...] = (MemoryError,)

    def causes(self, error: BaseException) -> list[BaseException]:
        """List an error and its causes, outermost first."""
        chain: list[BaseException] = []
        following: BaseException | None = error
        while following is not None and following not in chain:
            chain.append(following)
            following = following.__cause__
        return chain


def score_all(
    work: Work, attempt: Attempt, losses: Losses, *, note: Callable[[FileStats], None], again: Callable[[str], None]
) -> dict[str, FileStats]:
    """Score all remaining chunks, in several attempts if the cluster loses workers or nodes.

    Args:
        work: Data of the run.
        attempt: Scores chunks.
        losses: The errors after which another attempt follows.
        note: Receives the statistics of each file once it is written.
        again: Receives the reason for another attempt.

    Returns:
        The statistics of each file that this run has written, by its name.

    Raises:
        UserError: The model or the images changed.
        RunError: The run failed.
    """
    failures = 0
    written: dict[str, FileStats] = {}
    while True:
        done = done_chunks(work.folder)
        left = [chunk for chunk in range(work.plan.num_chunks) if chunk not in done]
        if not left:
            return written
        try:
            for stats in attempt(left):
                work.folder.check()
                written[stats.file] = stats
                note(stats)
        except Exception as error:
            raise_if_permanent(error, work, losses)
            reason = reason_of(losses.causes(error)[-1])
        else:
            reason = "output files are missing"
            if done_chunks(work.folder).issuperset(left):
                continue
        failures = 1 if done_chunks(work.folder) > done else failures + 1
        if failures > work.config.max_failures:
            raise RunError(
                f"the run failed too often ({reason}), the limit is --max-failures {work.config.max_failures}; "
                f"{_RESUME_HINT}"
            )
        again(reason)


def raise_if_permanent(error: Exception, work: Work, losses: Losses) -> None:
    """Raise an error if another attempt cannot help; return if workers, nodes or connections were lost."""
    config, chain = work.config, losses.causes(error)
    for cause in chain:
        if isinstance(cause, (UserError, RunError)):
            raise cause from None
        if isinstance(cause, OSError) and (storage.has_code(cause, *_REFUSALS) or isinstance(cause, PermissionError)):
            raise refusal_of(cause, config.out) from error
        if isinstance(cause, losses.no_memory) or "out of memory" in str(cause).lower():
            raise RunError(
                f"out of memory with batches of {work.plan.batch_size} and {config.num_workers} workers: lower "
                f"--batch-size or --num-workers; {_RESUME_HINT}"
            ) from error
    if any(isinstance(cause, losses.kinds) for cause in chain):
        return
    log = storage.join(config.out, LOG_FOLDER, "error.log")
    storage.write_bytes(log, without_secrets("".join(traceback.format_exception(error))).encode())
    raise RunError(f"a worker failed: {reason_of(chain[-1])}; traceback: {log}") from error


def reason_of(error: BaseException) -> str:
    """Describe an error in one line."""
    line = first_line(_TERMINAL_COLOURS.sub("", str(error)), otherwise="no message")
    return f"{type(error).__name__}: {line}"
