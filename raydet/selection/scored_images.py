"""Rows of a detections table → their detections as columns, each with the score of its query's best other class."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raydet.tables.columns import (
    DetectionColumns,
    Flags,
    Floats,
    Integers,
    elements_of,
    flatten,
    image_ids_in,
    numbers_of,
    starts_of,
)
from raydet.tables.kept.columns import QUERIES_COLUMN, KeptVectors
from raydet.tables.table import Table


@dataclass(frozen=True, kw_only=True)
class ScoredImages:
    """Detections in some images.

    Attributes:
        image_ids: int64 [I].
        detections: Detections by image.
        other_scores: Score of the best other class of each detection's query, float64 [D]; 0 if the table does not have
            it.
        was_scored: False for an image that the detector could not read, bool [I].
    """

    image_ids: Integers
    detections: DetectionColumns
    other_scores: Floats
    was_scored: Flags


def scored_columns(table: Table) -> list[str]:
    """Return the columns of a detections table that `read_scored_images` needs."""
    kept = KeptVectors.of_table(table.schema, table.uri)
    has_scores = kept is not None and kept.class_scores is not None
    return ["image_id", "detections", "error", *([QUERIES_COLUMN] if has_scores else [])]


def read_scored_images(batch: pa.RecordBatch, table: Table) -> ScoredImages:
    """Read rows with the columns of `scored_columns`.

    Raises:
        UserError: The lists of a row differ in length or contain nulls.
    """
    counts, columns = flatten(batch, "detections", ("bbox", "score", "category"), table.uri)
    found = DetectionColumns(
        starts=starts_of(counts), boxes_xywh=columns["bbox"], scores=columns["score"], category=columns["category"]
    )
    num_classes = len(table.categories)
    has_others = QUERIES_COLUMN in batch.schema.names and num_classes > 1 and len(found.scores) > 0
    return ScoredImages(
        image_ids=image_ids_in(batch),
        detections=found,
        other_scores=_other_scores(batch, found, num_classes, table.uri) if has_others else np.zeros(len(found.scores)),
        was_scored=~numbers_of(batch.column("error").is_valid()),
    )


def _other_scores(batch: pa.RecordBatch, found: DetectionColumns, num_classes: int, where: str) -> Floats:
    num_queries, queries = elements_of(batch, QUERIES_COLUMN, ["class_scores"], where)
    counts, columns = flatten(batch, "detections", ("query",), where)
    query = columns["query"] + np.repeat(starts_of(num_queries)[:-1], counts)
    scores = numbers_of(queries["class_scores"]).reshape(-1, num_classes).astype(np.float32)
    second, first = np.partition(scores, num_classes - 2, axis=1)[:, -2:].T
    is_best = scores.argmax(axis=1)[query] == found.category
    others: Floats = np.where(is_best, second[query], first[query]).astype(np.float64)
    return others
