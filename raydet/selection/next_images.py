"""A detections table → the images to label next, with the reasons, and their detections for a labelling tool."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.class_names import indices_in, is_unused
from raydet.common.display.progress import Progress
from raydet.common.errors import UserError
from raydet.config import SelectConfig
from raydet.config.inspecting import Criterion
from raydet.measuring.joining import list_images, rows_of_same_images
from raydet.preparation.sources.scored.pairing import places_of
from raydet.preparation.sources.scored.rows import RecentRows
from raydet.selection.criteria import disagreement, rareness, rarity_of, uncertainty, uncertainty_of
from raydet.selection.farthest import Neighbourhood, farthest_first
from raydet.selection.ranking import ImageScores, Ranked
from raydet.selection.scored_images import ScoredImages, read_scored_images, scored_columns
from raydet.selection.vectors import ImageColumn, Sameness, Vectors, rows_of
from raydet.tables.columns import (
    BATCH_ROWS,
    DetectionColumns,
    Flags,
    Floats,
    Integers,
    flatten,
    keep_detections,
    numbers_of,
    take_detections,
    take_rows,
)
from raydet.tables.kept.plain import plain_columns, plain_schema
from raydet.tables.table import Table

CANDIDATES_PER_IMAGE = 20
"""Images with the highest ranks, for each image to choose, among which the different ones are looked for first."""
_MOST_CANDIDATES = 2**17
"""If too few of them differ, more are looked at, up to about this many: their vectors take 100 MB and more."""
_ROWS_AT_ONCE = 256
_VECTORS_AT_ONCE = 1024


@dataclass(frozen=True)
class NextImages:
    """Images to label next, in the order of their choice.

    Attributes:
        reasons: Rows of the table `to_label`.
        detections: Rows of a detections table, without vectors.
    """

    reasons: list[dict[str, Any]]
    detections: pa.RecordBatch

    def rows(self, table: Table) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of the table `to_label`."""
        yield self.reasons

    def listed(self, table: Table) -> Iterator[str | None]:
        """Yield the paths of the images."""
        yield from (row["path"] for row in self.reasons)


def next_images(
    table: Table, config: SelectConfig, progress: Progress, *, other: Table | None, labelled: Table | None
) -> NextImages:
    """Choose the images of a detections table whose labels would teach most.

    Args:
        table: The detections table.
        config: The criteria.
        progress: Counts the images.
        other: Detections of another run in the same images, if a criterion is their disagreement.
        labelled: Images table of what is labelled already, if there is one.

    Raises:
        UserError: The other tables do not fit this one, a criterion needs vectors that it lacks, or every image is
            labelled already.
    """
    embeddings, same = ImageColumn.of(table, "embedding"), Sameness.of(table, config)
    if embeddings is None and "diversity" in config.by:
        raise UserError(
            f"--by diversity compares embeddings, which {table.uri} lacks; score the images with `raydet predict "
            "--keep embedding`"
        )
    column = embeddings if same is None else embeddings or same.column
    is_labelled, labels = _labelled(table, labelled)
    criteria = _Criteria(table, config.by, other, labels)
    with ImageScores(max(1, len(criteria.names))) as scores:
        start = 0
        for images in criteria.batches():
            stop = start + len(images.image_ids)
            scores.append(criteria.scores(images), images.was_scored & ~is_labelled[start:stop])
            progress.advance(stop - start)
            start = stop
        if not scores.num_candidates:
            raise UserError(f"{table.uri} has no image that could be read and is not labelled already")
        num_ranked = config.num if column is None else CANDIDATES_PER_IMAGE * config.num
        ranked = scores.best(min(scores.num_candidates, num_ranked))
        if column is None:
            return criteria.explained(ranked, None)
        chosen, similarity = _different(table, config, column, same, ranked, is_labelled)
        most_ranked = min(scores.num_candidates, _MOST_CANDIDATES)
        while len(chosen) < config.num and len(ranked.rows) < most_ranked:  # the others are near-duplicates
            ranked = scores.best(min(most_ranked, 4 * len(ranked.rows)))
            chosen, similarity = _different(table, config, column, same, ranked, is_labelled)
    if same and not len(chosen):
        raise UserError(
            f"all of the {len(ranked.rows):,} images of {table.uri} with the highest ranks are near-duplicates of a "
            f"labelled one, with a similarity of at least {same.min_similarity:g}; set a higher --min-similarity"
        )
    return criteria.explained(ranked.take(chosen), similarity)


def _different(
    table: Table, config: SelectConfig, column: ImageColumn, same: Sameness | None, ranked: Ranked, is_labelled: Flags
) -> tuple[Integers, npt.NDArray[np.float32]]:
    """Choose among ranked images those that differ, as `farthest_first` returns them."""
    among = twins = _neighbourhood(table, column, ranked.rows, is_labelled)
    if same is not None and same.column != column:
        twins = _neighbourhood(table, same.column, ranked.rows, is_labelled)
    return farthest_first(
        ranked.mean_ranks,
        among,
        num=config.num,
        by_distance="diversity" in config.by,
        twins=twins,
        max_similarity=np.inf if same is None else same.min_similarity,
    )


def _labelled(table: Table, known: Table | None) -> tuple[Flags, Floats | None]:
    """Return the images of a table that another one labels, bool [N], and the boxes of each class there, [K]."""
    is_labelled = np.zeros(table.num_rows, np.bool_)
    if known is None:
        return is_labelled, None
    if not known.categories:
        raise UserError(f"--labelled-data {known.uri} has no classes: it was prepared without labels")
    is_labelled[rows_of_same_images(list_images(known), list_images(table), option="--labelled-data")] = True
    counts = np.zeros(len(known.categories))
    for batch in known.iter_batches(["objects.category"], BATCH_ROWS):
        _, columns = flatten(batch, "objects", ("category",), known.uri)
        counts += np.bincount(columns["category"], minlength=len(counts))
    places = indices_in(_names(table), _names(known))
    return is_labelled, np.where(places >= 0, counts[places], 0)


def _names(table: Table) -> list[str]:
    return [category.name for category in table.categories]


class _Criteria:
    """The criteria of a selection, apart from diversity: what they read, their scores, and their reasons."""

    def __init__(self, table: Table, by: Sequence[Criterion], other: Table | None, labels: Floats | None) -> None:
        self.names = [name for name in by if name != "diversity"]
        self._table = table
        self._rarity = np.zeros(len(table.categories))
        self._other = None if other is None else _OtherRun(table, other)
        if "rare" in self.names:
            counts = self._seen() if labels is None else labels
            is_class = np.array([not is_unused(name, index) for index, name in enumerate(_names(table))])
            self._rarity[is_class] = rarity_of(counts[is_class])

    def _seen(self) -> Floats:
        """Return how often each class is found: the sum of squared scores, in which weak detections hardly count."""
        counts = np.zeros(len(self._table.categories))
        for images in self.batches():
            found = images.detections
            counts += np.bincount(found.category, found.scores**2, minlength=len(counts))
        return counts

    def batches(self) -> Iterator[ScoredImages]:
        """Yield the detections of all images in the order of the table."""
        for batch in self._table.iter_batches(scored_columns(self._table), _ROWS_AT_ONCE):
            yield read_scored_images(batch, self._table)

    def scores(self, images: ScoredImages) -> Floats:
        """Return the scores of the next images by each criterion, [N, K]; zeros, [N, 1], if there is none."""
        found = images.detections
        columns = []
        for name in self.names:
            if name == "uncertainty":
                columns.append(uncertainty(found, images.other_scores))
            elif name == "rare":
                columns.append(rareness(found, self._rarity))
            else:
                assert self._other is not None, "the config asks for both"
                columns.append(disagreement(images.image_ids, found, self._other.next(len(images.image_ids))))
        return np.stack(columns, axis=1) if columns else np.zeros((len(images.image_ids), 1))

    def explained(self, chosen: Ranked, similarity: npt.NDArray[np.float32] | None) -> NextImages:
        """Return the chosen images with their reasons and their detections."""
        columns = dict.fromkeys(["path", "width", "height", *scored_columns(self._table)])
        batch = RecentRows(self._table, list(columns)).take(chosen.rows)
        images = read_scored_images(batch, self._table)
        nearest = [None] * len(chosen.rows) if similarity is None else [_shown_similarity(own) for own in similarity]
        rows = []
        paths = batch.column("path").to_pylist()
        for place, path in enumerate(paths):
            scores = dict(zip(self.names, chosen.scores[place].tolist(), strict=False))
            rows.append(
                {
                    "place": place + 1,
                    "image_id": int(images.image_ids[place]),
                    "path": path,
                    "reason": self._reason(images, place, chosen.ranks[place], scores, nearest[place]),
                    **{name: scores.get(name) for name in ("uncertainty", "rare", "disagreement")},
                    "similarity": nearest[place],
                }
            )
        return NextImages(rows, _plain(batch, self._table))

    def _reason(
        self, images: ScoredImages, place: int, ranks: Floats, scores: dict[str, float], nearest: float | None
    ) -> str:
        """Return the strongest reason in words."""
        if not self.names:
            return "the first image" if nearest is None else f"unlike the others: {nearest:.2f} similar to the nearest"
        name = self.names[int(ranks.argmax())]
        if name == "disagreement":
            return f"the runs disagree: {scores[name]:.2f}"
        first, end = images.detections.starts[place : place + 2].tolist()
        found = take_detections(images.detections, np.array([place]))
        if not len(found.scores):
            return "no detections"
        if name == "uncertainty":
            best, title = uncertainty_of(found.scores, images.other_scores[first:end]).argmax(), "uncertain"
        else:
            best, title = (found.scores * self._rarity[found.category]).argmax(), "rare"
        return f"{title}: {self._table.categories[int(found.category[best])].name} {found.scores[best]:.2f}"


class _OtherRun:
    """The detections of another run in the images of a table, with its classes, in its order."""

    def __init__(self, table: Table, other: Table) -> None:
        self._other = other
        self._places = places_of(table, other)
        self._rows = RecentRows(other, ["image_id", "detections", "error"])
        self._classes = indices_in(_names(other), _names(table))
        self._position = 0
        used = [name for index, name in enumerate(_names(table)) if not is_unused(name, index)]
        missing = set(used) - {_names(table)[place] for place in self._classes if place >= 0}
        if missing:
            raise UserError(
                f"--other {other.uri} does not have the class {min(missing)!r}; both runs must have the same classes"
            )

    def next(self, num_images: int) -> DetectionColumns:
        """Return the detections in the next images."""
        rows = np.arange(self._position, self._position + num_images)
        self._position += num_images
        batch = self._rows.take(rows if self._places is None else self._places[rows])
        found = read_scored_images(batch, self._other).detections
        found = replace(found, category=self._classes[found.category])
        return keep_detections(found, found.category >= 0)


def _neighbourhood(table: Table, column: ImageColumn, rows: Integers, is_labelled: Flags) -> Neighbourhood:
    """Return the vectors of the images in some rows, 0 without one, and their similarity to the labelled ones."""
    vectors = _vectors_at(table, column, rows)
    nearest = np.full(len(vectors), -1, np.float32)
    start = 0
    for batch in table.iter_batches([column.name], _VECTORS_AT_ONCE) if is_labelled.any() else ():
        own = np.flatnonzero(is_labelled[start : start + batch.num_rows])
        if own.size:
            labelled = column.vectors(rows_of(take_rows(batch.column(column.name), own), column.dimension))
            np.maximum(nearest, (vectors @ labelled.T).max(axis=1, initial=-1), out=nearest)
        start += batch.num_rows
    return Neighbourhood(vectors, nearest)


def _vectors_at(table: Table, column: ImageColumn, rows: Integers) -> Vectors:
    vectors = np.zeros((len(rows), column.dimension), np.float32)
    order = np.argsort(rows)
    start = 0
    for batch in table.iter_batches([column.name], _VECTORS_AT_ONCE):
        first, end = np.searchsorted(rows[order], [start, start + batch.num_rows])
        own = order[first:end]
        found = take_rows(batch.column(column.name), rows[own] - start)
        vectors[own[numbers_of(found.is_valid())]] = column.vectors(rows_of(found, column.dimension))
        start += batch.num_rows
    return vectors


def _shown_similarity(similarity: np.float32) -> float | None:
    return None if similarity <= -1 else float(similarity)


def _plain(batch: pa.RecordBatch, table: Table) -> pa.RecordBatch:
    schema = plain_schema(table.schema, table.categories, where=table.uri)
    return pa.RecordBatch.from_arrays(list(plain_columns(batch).values()), schema=schema)
