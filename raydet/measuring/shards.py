"""Match a detections table shard by shard: each task reads and matches some row groups.

Only the detections of a few shards are in memory at a time. Tasks are local threads or run on a Ray cluster, which pays
off if its nodes read in parallel; the truth is stored once in Ray's object store.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from raydet.common.display.progress import SILENT, Progress
from raydet.common.threads import available_cpus, in_order
from raydet.config import EvaluateConfig
from raydet.measuring.detections import (
    DETECTION_FIELDS,
    Scored,
    errors_by_id,
    has_operating_point,
    model_of,
    read_detection_rows,
)
from raydet.measuring.joining import Join, join_images, list_images
from raydet.measuring.numbers.accumulator import MatchesByClass
from raydet.measuring.numbers.matches import Matches, Protocol, concatenate
from raydet.measuring.numbers.matching import match
from raydet.measuring.numbers.metrics import CocoResult
from raydet.measuring.truth import Truth
from raydet.tables.columns import (
    BATCH_ROWS,
    DetectionColumns,
    Integers,
    concatenate_detections,
    take_detections,
    take_truth,
)
from raydet.tables.table import RowGroup, Table, open_table

_BYTES_PER_SHARD = 20 * 2**20
"""About 400,000 detections."""


@dataclass(frozen=True)
class _Shard:
    """Work of one task: row groups, and the truth row of each of their rows, -1 for none, int64 [R]."""

    groups: Sequence[RowGroup]
    truth_row: Integers


@dataclass(frozen=True)
class _Part:
    """Result of one task: truth rows of its images, unreadable images, numbers, matches and detections."""

    truth_rows: Integers
    errors: dict[int, str]
    num_detections: int
    num_other_class: int
    matches: Matches
    detections: DetectionColumns | None


@dataclass
class _Shards:
    """Detections table joined to its truth, and the results of the shards matched so far."""

    table: Table
    truth: Truth
    join: Join
    errors: dict[int, str] = field(default_factory=dict)
    num_detections: int = 0
    num_other_class: int = 0

    def take(self, parts: Iterator[_Part]) -> Iterator[_Part]:
        """Yield each part after recording the information that its matches do not contain."""
        for part in parts:
            self.errors |= part.errors
            self.num_detections += part.num_detections
            self.num_other_class += part.num_other_class
            yield part

    def scored(self) -> Scored:
        """Return the joined images without their detections."""
        nothing = read_detection_rows(self.table, self.truth, ()).columns
        return Scored(
            uri=self.table.uri,
            columns=take_detections(nothing, np.full(len(self.join.truth_rows), -1)),
            truth_columns=take_truth(self.truth.columns, self.join.truth_rows),
            truth_rows=self.join.truth_rows,
            found_ids=self.join.found_ids,
            errors=self.errors,
            num_left_out=self.join.num_left_out,
            note=self.join.note,
            model=model_of(self.table),
            has_operating_point=has_operating_point(self.table),
            num_detections=self.num_detections,
            num_other_class=self.num_other_class,
        )


def measure_shards(
    config: EvaluateConfig, truth: Truth, protocol: Protocol, progress: Progress = SILENT
) -> tuple[Scored, CocoResult]:
    """Return COCO's metrics of a detections table of any size, bit-identical to matching it in one piece.

    Neither the detections nor their matches are ever in memory together. The required part of the matches, 32 bytes per
    detection, is written to the folder for temporary files (TMPDIR), and the classes are measured one after another.

    Returns:
        The joined images without their detections, and the metrics over all images.

    Raises:
        UserError: As in `detections.read_detections`.
        RunError: The cluster cannot be reached.
    """
    shards = _open(config, truth)
    num_classes = 1 if protocol.class_agnostic else len(truth.categories)
    with tempfile.TemporaryDirectory(prefix="raydet-") as folder:
        by_class = MatchesByClass(Path(folder), protocol, num_classes)
        progress.begin("matching", total=len(shards.join.truth_rows))
        for part in shards.take(_match(config, shards, protocol)):
            progress.advance(len(part.truth_rows))
            by_class.add(part.matches, part.truth_rows)
        scored = shards.scored()
        progress.begin("measuring")
        result = by_class.result(
            truth.categories,
            num_images=len(scored.truth_rows),
            num_detections=scored.num_detections,
            num_unreadable=len(scored.errors),
        )
    return scored, result


def match_on_cluster(
    config: EvaluateConfig, truth: Truth, protocol: Protocol, progress: Progress
) -> tuple[Scored, Matches]:
    """Match a detections table on the cluster at `config.ray_address` ("local" starts one on this machine).

    The result is identical to matching locally. This process reads the detections themselves only to write tables,
    which describe individual boxes, to find their answers, or to verify the result.

    Raises:
        UserError: As in `detections.read_detections`.
        RunError: The cluster cannot be reached.
    """
    shards = _open(config, truth)
    progress.begin("matching", total=len(shards.join.truth_rows))
    matched = shards.take(_match(config, shards, protocol))
    parts = list(progress.over(matched, count=lambda part: len(part.truth_rows)))
    scored = shards.scored()
    if _needs_boxes(config):
        order = np.argsort(np.concatenate([part.truth_rows for part in parts]))
        detections = concatenate_detections([part.detections for part in parts if part.detections is not None])
        scored = replace(scored, columns=take_detections(detections, order))
    return scored, concatenate([part.matches for part in parts])


def _needs_boxes(config: EvaluateConfig) -> bool:
    return config.out is not None or config.verify or config.crops is not None


def _open(config: EvaluateConfig, truth: Truth) -> _Shards:
    """Join the images of both sides before matching."""
    table = open_table(config.detections, "detections")
    joined = join_images(truth.images, list_images(table), by=config.join, allow_partial=config.allow_partial)
    return _Shards(table, truth, joined)


def _match(config: EvaluateConfig, shards: _Shards, protocol: Protocol) -> Iterator[_Part]:
    work = _with_truth_rows(shards, _row_groups(shards.table, config.num_shards))
    truth = replace(shards.truth, images=replace(shards.truth.images, paths=None))
    match_shard = partial(_match_shard, shards.table, truth, protocol, with_detections=_needs_boxes(config))
    if config.ray_address is not None:
        return _match_on_ray(config.ray_address, shards, match_shard, work)
    num_threads = available_cpus()
    # Results further ahead would only occupy memory.
    return in_order(match_shard, work, num_threads=num_threads, ahead=num_threads + 1)


def _row_groups(
    table: Table, num_shards: int | None, *, bytes_per_shard: int = _BYTES_PER_SHARD
) -> list[list[RowGroup]]:
    """Split the row groups, in order, into shards of similar size in bytes."""
    num_bytes = int(table.layout.num_bytes.sum())
    return table.split_row_groups(num_shards or -(-num_bytes // bytes_per_shard))


def _with_truth_rows(shards: _Shards, groups: Sequence[Sequence[RowGroup]]) -> list[_Shard]:
    ends = np.cumsum([sum(group.num_rows for group in own) for own in groups])
    return list(map(_Shard, groups, np.split(shards.join.truth_row, ends[:-1])))


def _match_on_ray(
    address: str, shards: _Shards, match_shard: Callable[[_Shard], _Part], work: Sequence[_Shard]
) -> Iterator[_Part]:
    from raydet.cluster.shared_storage import table_session
    from raydet.cluster.tasks import run_tasks

    with table_session(address, "--detections", shards.table):
        yield from run_tasks(match_shard, work, in_order=False)


def _match_shard(table: Table, truth: Truth, protocol: Protocol, shard: _Shard, *, with_detections: bool) -> _Part:
    """Read and match some row groups, dropping images that the truth does not have."""
    rows = read_detection_rows(table, truth, table.iter_batches(DETECTION_FIELDS, BATCH_ROWS, groups=shard.groups))
    own = np.flatnonzero(shard.truth_row >= 0)
    own = own[np.argsort(shard.truth_row[own])]
    truth_rows = shard.truth_row[own]
    detections = take_detections(rows.columns, own)
    matches = match(take_truth(truth.columns, truth_rows), detections, len(truth.categories), protocol)
    errors = errors_by_id(rows.errors, shard.truth_row, truth)
    kept = detections if with_detections else None
    return _Part(truth_rows, errors, len(detections.scores), rows.num_other_class, matches, kept)
