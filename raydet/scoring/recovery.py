"""Repeated attempts to score all chunks of a run, and the distinction between a loss and a failure."""

import errno
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from raydet.cluster.job_record import JobRecord
from raydet.common.errors import RunError, UserError, first_line
from raydet.common.redaction import without_secrets
from raydet.common.untrusted.documents import parse_json
from raydet.config import PredictConfig
from raydet.engines.loading import EngineLoader
from raydet.scoring.plan import (
    COUNTS_KEY,
    LOG_FOLDER,
    ChunkStats,
    FileCounts,
    Work,
    files_of_chunks,
    part_name,
    table_uri,
)
from raydet.tables import storage
from raydet.tables.layout import groups_of
from raydet.tables.output_errors import refusal_of
from raydet.tables.schema import token_of
from raydet.tables.table import read_footers

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Write errors of a disk that is full or read-only."""
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_RESUME_HINT = "run the same command again to resume"


class Losses:
    """Errors of lost nodes, processes and connections: another attempt can succeed, unlike after a defect.

    Attributes:
        no_memory: Classes of errors that report exhausted memory.
    """

    no_memory: tuple[type[BaseException], ...] = (MemoryError,)

    def is_loss(self, chain: Sequence[BaseException]) -> bool:
        """Return True if another attempt can succeed; `chain` is the result of `causes`."""
        return any(isinstance(cause, OSError) for cause in chain)

    def causes(self, error: BaseException) -> list[BaseException]:
        """List an error and its causes, outermost first."""
        chain: list[BaseException] = []
        following: BaseException | None = error
        while following is not None and following not in chain:
            chain.append(following)
            following = following.__cause__
        return chain


class ScoringPlace(Protocol):
    """The place where a run computes: `local.ThisProcess` or `distributed.Cluster`."""

    @property
    def losses(self) -> Losses:
        """Errors after which another attempt follows."""

    def attempt(self, work: Work, chunks: Sequence[int]) -> Iterator[ChunkStats]:
        """Score chunks and yield the statistics of each file once it is written, in any order."""

    def apply(self, write: Callable[[int], ChunkStats], chunks: Sequence[int]) -> Iterator[ChunkStats]:
        """Write chunks with a function that needs no model, and yield the statistics of each file, in any order."""

    def prepare_again(self, reason: str) -> str:
        """Prepare for another attempt after a loss, and return a line for the terminal."""

    def best_batch_size(self, config: PredictConfig, load: EngineLoader) -> int:
        """Measure the fastest batch size."""

    def job_record(self) -> JobRecord:
        """Build the record of the job."""

    def with_joined_nodes(self, record: JobRecord) -> JobRecord:
        """Return the record at the end of the job, with the nodes that have joined since its start."""


def score_all(
    work: Work,
    place: ScoringPlace,
    *,
    note: Callable[[ChunkStats], None],
    notify: Callable[[str], None],
    write: Callable[[int], ChunkStats] | None = None,
) -> dict[str, tuple[FileCounts, ...]]:
    """Score all remaining chunks, in several attempts if the cluster loses workers or nodes.

    `note` receives the statistics of each file once it is written, `notify` a line before another attempt. `write`
    replaces the scoring of a chunk: a picklable function that writes its file.

    Returns:
        The counts of each chunk's file in each table of the run, by file name.

    Raises:
        UserError: The model or the images changed.
        RunError: The run failed.
    """
    failures = 0
    written: dict[str, tuple[FileCounts, ...]] = {}
    while True:
        _count_files(work, written)
        num_done = len(written)
        left = [chunk for chunk in range(work.plan.num_chunks) if part_name(chunk) not in written]
        if not left:
            return written
        try:
            for stats in place.attempt(work, left) if write is None else place.apply(write, left):
                work.folder.check()
                # Counts, not the statistics themselves, whose size grows with the number of images.
                written[stats.file] = stats.counts
                note(stats)
        except Exception as error:
            raise_if_permanent(error, work, place.losses)
            reason = reason_of(place.losses.causes(error)[-1])
        else:
            reason = "output files are missing"
            if all(part_name(chunk) in written for chunk in left):
                continue
        _count_files(work, written)
        failures = 1 if len(written) > num_done else failures + 1
        if failures > work.config.max_failures:
            raise RunError(
                f"the run failed more than --max-failures {work.config.max_failures} times ({reason}); {_RESUME_HINT}"
            )
        notify(place.prepare_again(reason))


def _count_files(work: Work, written: dict[str, tuple[FileCounts, ...]]) -> None:
    """Add the counts of the run's finished chunks that are not in `written` yet.

    A file that lacks the run's token, or has another number of rows, is not the run's. A chunk that lacks a file of the
    run in any table is scored again.
    """
    chunks = {name: chunk for name, chunk in files_of_chunks(work.folder, work.schemas).items() if name not in written}
    footers = [read_footers(table_uri(work.folder, table), list(chunks)) for table in work.schemas]
    for (name, chunk), *of_tables in zip(chunks.items(), *footers, strict=True):
        num_rows = len(work.plan.rows_of(chunk))
        found = [_counts_in(footer, schema) for footer, schema in zip(of_tables, work.schemas.values(), strict=True)]
        counts = tuple(each for each in found if each is not None and each.num_images == num_rows)
        if len(counts) == len(found):
            written[name] = counts


def _counts_in(footer: pq.FileMetaData | None, schema: pa.Schema) -> FileCounts | None:
    metadata = {} if footer is None else footer.metadata or {}
    if footer is None or token_of(metadata) != token_of(schema.metadata):
        return None
    try:
        return FileCounts(groups_of(footer), **parse_json(metadata[COUNTS_KEY]))
    except (KeyError, TypeError, ValueError):
        return None


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
    if losses.is_loss(chain):
        return
    log = storage.join(config.out, LOG_FOLDER, "error.log")
    storage.write_bytes(log, without_secrets("".join(traceback.format_exception(error))).encode())
    raise RunError(f"a worker failed: {reason_of(chain[-1])}; traceback: {log}") from error


def reason_of(error: BaseException) -> str:
    """Describe an error in one line."""
    line = first_line(_TERMINAL_COLOURS.sub("", str(error)), otherwise="no message")
    return f"{type(error).__name__}: {line}"
