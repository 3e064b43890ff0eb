"""An embedding and a detections table → the most similar objects, or images, in one pass over the table."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.errors import UserError
from raydet.selection.vectors import Vectors, normalised, required_dimension, rows_of
from raydet.tables.columns import Integers, elements_of, flatten, image_ids_in, numbers_of, starts_of, take_rows
from raydet.tables.kept.columns import IMAGE_EMBEDDING_COLUMN, QUERIES_COLUMN
from raydet.tables.table import RowGroup, Table

_ROWS_AT_ONCE = 256

Rows = list[dict[str, Any]]
"""Rows of the table `similar`, the most similar first."""
PartSearch = Callable[[Sequence[RowGroup] | None], Rows]
"""Function that searches some row groups, or all."""


@dataclass(frozen=True)
class Probe:
    """An image, or a detection in it, to compare with all others.

    Attributes:
        image_id: Its image.
        number: Place of the detection by score, from 0; None for the image as a whole.
    """

    image_id: int
    number: int | None

    @classmethod
    def parse(cls, text: str) -> "Probe":
        """Parse `IMAGE_ID:BOX` or `IMAGE_ID`."""
        image_id, colon, number = text.partition(":")
        return cls(int(image_id), int(number) if colon else None)


@dataclass(frozen=True)
class _Candidates:
    """Vectors of some rows of a table, each with the image and the detection that it belongs to.

    Attributes:
        vectors: [N, D].
        rows: Row of the batch, int64 [N].
        numbers: Place of the first detection of the query in its row, int64 [N]; -1 for images.
    """

    vectors: Vectors
    rows: Integers
    numbers: Integers


def find_similar(
    table: Table,
    probe: Probe,
    *,
    num: int,
    least: float,
    parallel: Callable[[PartSearch], Iterable[Rows]] | None = None,
) -> Rows:
    """Find the vectors most similar to that of the probe, which is left out itself.

    Args:
        table: Detections with embeddings.
        probe: Detection or image to compare with.
        num: How many to find.
        least: Least cosine similarity.
        parallel: Function that applies a search to all parts of the table, in order; by default this process searches
            it as a whole.

    Returns:
        Rows of the table `similar`, the most similar first; among equal ones the earlier first.

    Raises:
        UserError: The table has no embeddings or lacks the probe, or the image could not be read.
    """
    dimension = required_dimension(table)
    vector, own_number = _vector_of(table, dimension, probe)
    search = partial(_best_in, table, dimension, probe, vector, own_number, num, least)
    found = parallel(search) if parallel else [search(None)]
    return _best(itertools.chain.from_iterable(found), num)


def _best_in(
    table: Table,
    dimension: int,
    probe: Probe,
    vector: npt.NDArray[np.float32],
    own_number: int,
    num: int,
    least: float,
    groups: Sequence[RowGroup] | None,
) -> Rows:
    """Find what `find_similar` does in some row groups, or in all."""
    best: Rows = []
    for batch in _batches(table, probe, groups):
        found = _candidates(batch, dimension, probe, table.uri)
        similarity = found.vectors @ vector
        is_own = (image_ids_in(batch)[found.rows] == probe.image_id) & (found.numbers == own_number)
        worst = best[-1]["similarity"] if len(best) == num else -np.inf
        wanted = np.flatnonzero((similarity >= least) & (similarity > worst) & ~is_own)
        order = wanted[np.argsort(-similarity[wanted], kind="stable")][:num]
        rows = [_row(batch, found, place, float(similarity[place]), table) for place in order.tolist()]
        best = _best([*best, *rows], num)
    return best


def _best(rows: Iterable[dict[str, Any]], num: int) -> Rows:
    return sorted(rows, key=lambda row: -row["similarity"])[:num]


def _batches(table: Table, probe: Probe, groups: Sequence[RowGroup] | None = None) -> Iterator[pa.RecordBatch]:
    columns = ["image_id", "path"]
    columns += [IMAGE_EMBEDDING_COLUMN] if probe.number is None else ["detections", QUERIES_COLUMN]
    yield from table.iter_batches(columns, _ROWS_AT_ONCE, groups=groups)


def _vector_of(table: Table, dimension: int, probe: Probe) -> tuple[npt.NDArray[np.float32], int]:
    """Return the vector of the probe, and the first detection of its query; -1 for an image."""
    for batch in _batches(table, probe):
        (rows,) = np.nonzero(image_ids_in(batch) == probe.image_id)
        if not rows.size:
            continue
        found = _candidates(batch, dimension, probe, table.uri)
        number, what = -1, "an embedding, as it could not be read"
        if probe.number is not None:
            query = batch.column("detections").field("query")[int(rows[0])].as_py()
            number = query.index(query[probe.number]) if probe.number < len(query) else -1
            what = f"a detection {probe.number}; it has {len(query)}, from 0"
        own = np.flatnonzero((found.rows == rows[0]) & (found.numbers == number))
        if not own.size:
            raise UserError(f"--similar-to: the image {probe.image_id} of {table.uri} does not have {what}")
        vector: npt.NDArray[np.float32] = found.vectors[own[0]]
        return vector, number
    raise UserError(f"--similar-to: {table.uri} has no image {probe.image_id}")


def _candidates(batch: pa.RecordBatch, dimension: int, probe: Probe, where: str) -> _Candidates:
    if probe.number is None:
        column = batch.column(IMAGE_EMBEDDING_COLUMN)
        rows = np.flatnonzero(numbers_of(column.is_valid()))
        return _Candidates(normalised(rows_of(column, dimension)), rows, np.full(len(rows), -1))
    num_queries, queries = elements_of(batch, QUERIES_COLUMN, ["embedding"], where)
    vectors = normalised(numbers_of(queries["embedding"]).reshape(-1, dimension))
    lengths, detections = flatten(batch, "detections", ["query"], where)
    queried = detections["query"] + np.repeat(starts_of(num_queries)[:-1], lengths)
    used, first = np.unique(queried, return_index=True)
    rows = np.repeat(np.arange(batch.num_rows), num_queries)[used]
    return _Candidates(vectors[used], rows, first - starts_of(lengths)[rows])


def _row(batch: pa.RecordBatch, found: _Candidates, place: int, similarity: float, table: Table) -> dict[str, Any]:
    row, number = int(found.rows[place]), int(found.numbers[place])
    about: Mapping[str, Any] = {}
    if number >= 0:
        detections = take_rows(batch.column("detections"), np.array([row]))[0].as_py()
        about = {
            "detection": number,
            "category": table.categories[detections["category"][number]].name,
            "bbox": detections["bbox"][number],
            "score": detections["score"][number],
        }
    ids = {name: batch.column(name)[row].as_py() for name in ("image_id", "path")}
    return {**ids, "detection": None, "category": None, "bbox": None, "score": None, **about, "similarity": similarity}
