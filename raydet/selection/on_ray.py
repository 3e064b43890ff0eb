"""The vectors of a large table on a Ray cluster: each actor holds a part of them and compares others with its own."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from raydet.cluster.ray_internals import cluster_cpus
from raydet.cluster.tasks import result_of, run_tasks, shared, start_actor
from raydet.selection.near_duplicates import ROWS_AT_ONCE, Nearest, improve, nearest_kept
from raydet.selection.similar import PartSearch, Rows
from raydet.selection.vectors import ImageColumn, ImageVectors, Vectors
from raydet.tables.columns import Flags, starts_of
from raydet.tables.table import RowGroup, Table

_CPUS_PER_ACTOR = 0.5


class VectorActors:
    """The image vectors of a table in the memory of actors, as many as the cluster has CPUs."""

    def __init__(self, table: Table, column: ImageColumn) -> None:
        """Start the actors and wait until they have read their parts."""
        parts = table.split_row_groups(int(cluster_cpus()))
        start = partial(start_actor, _VectorPart, table, column, cpus=_CPUS_PER_ACTOR)
        self._actors: list[Any] = list(map(start, parts))
        sizes = [result_of(actor.size.remote()) for actor in self._actors]
        self._starts = starts_of(np.array(sizes, np.int64)).tolist()

    def search(self, start: int, block: Vectors, is_kept: Flags) -> Nearest:
        """Compare vectors with all earlier ones that are no duplicates; see `near_duplicates.Search`."""
        vectors = shared(block)
        asked = [
            (first, actor.nearest.remote(vectors, is_kept[first:end]))
            for actor, first, end in zip(self._actors, self._starts, self._starts[1:], strict=False)
            if first < start
        ]
        nearest = np.full(len(block), -np.inf, np.float32), np.full(len(block), -1, np.int64)
        for first, answer in asked:
            best, place = result_of(answer)
            improve(nearest, (best, np.where(place >= 0, first + place, place)))
        return nearest


class _VectorPart:
    """The vectors of some row groups."""

    def __init__(self, table: Table, column: ImageColumn, groups: Sequence[RowGroup]) -> None:
        self._vectors = ImageVectors(table, column, groups)

    def size(self) -> int:
        return len(self._vectors.image_ids)

    def nearest(self, block: Vectors, is_kept: Flags) -> Nearest:
        return nearest_kept(block, self._vectors.blocks(ROWS_AT_ONCE, len(is_kept)), is_kept)


def search_parts(table: Table, search: PartSearch) -> Iterator[Rows]:
    """PartSearch the parts of a table in tasks, and yield the rows found in each, in the order of the table."""
    # Several tasks per CPU, so that none is left with a long one at the end.
    parts: Iterable[Sequence[RowGroup]] = table.split_row_groups(4 * int(cluster_cpus()))
    return run_tasks(partial(_search, search), parts, cpus_per_task=_CPUS_PER_ACTOR)


def _search(search: PartSearch, groups: Sequence[RowGroup]) -> Rows:
    return search(groups)
