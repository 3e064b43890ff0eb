"""Columns of a detections table for what `predict --keep` stores: their types, their metadata and their checks.

A detection names its query by its index in the row's `queries`, which hold each query once, in the order of their first
detections: its box and, as asked for, the scores of all classes and the embedding of the decoder. With embeddings the
column `image_embedding` holds that of the image, null if it could not be read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.boxes import as_boxes
from raydet.common.errors import UserError
from raydet.tables.columns import Integers, elements_of, numbers_of
from raydet.tables.schema import Category, build_schema, parse_metadata

QUERIES_COLUMN = "queries"
IMAGE_EMBEDDING_COLUMN = "image_embedding"
ScoreKind = Literal["sigmoid", "softmax"]

_BBOX_TYPE = pa.list_(pa.list_(pa.float64(), 4))
_QUERY_TYPE = pa.list_(pa.int64())
_MOST_DIMENSIONS = 2**16
_ONE, _INFINITY = (int(np.array(number, np.float16).view(np.uint16)) for number in (1.0, np.inf))
"""Bits of half-precision numbers: those of finite ones from 0 on ascend."""


@dataclass(frozen=True, kw_only=True)
class KeptVectors:
    """The vectors that a detections table holds.

    Attributes:
        class_scores: Kind of the scores of all classes; the softmax of a class leaves "no object" the rest to 1. None
            if there are no such vectors.
        num_classes: Length of a vector of class scores.
        dimension: Length of an embedding, of a query or of the image; None if there are none.
    """

    class_scores: ScoreKind | None = None
    num_classes: int = 0
    dimension: int | None = None

    @classmethod
    def of_table(cls, schema: pa.Schema, where: str) -> Self | None:
        """Return what a detections table states to hold; None if nothing is kept.

        Raises:
            UserError: The columns contradict the metadata, or their types are not those of this module.
        """
        has_queries = QUERIES_COLUMN in schema.names
        if not has_queries and IMAGE_EMBEDDING_COLUMN not in schema.names:
            return None
        content = parse_metadata(schema, kind="detections", where=where)
        kind, dimension = _entry(content, "class_scores", "kind"), _entry(content, "embedding", "dimension")
        is_length = dimension is None or (type(dimension) is int and 0 < dimension <= _MOST_DIMENSIONS)
        if kind not in (None, "sigmoid", "softmax") or not is_length:
            raise UserError(f"{where} is damaged: its metadata describes vectors in a form that raydet does not know")
        kept = cls(class_scores=kind, num_classes=len(content["categories"]), dimension=dimension)
        kept._check_types(schema, where)
        return kept

    def _check_types(self, schema: pa.Schema, where: str) -> None:
        for field in self.fields():
            if len(schema.get_all_field_indices(field.name)) != 1:
                raise UserError(f"{where} is damaged: it must have one column {field.name}")
            found = schema.field(field.name).type
            if found != field.type:
                raise UserError(
                    f"{where} is damaged: the column {field.name} has the type {found}, expected {field.type}"
                )
        detections = schema.field("detections").type
        number = detections.get_field_index("query") if pa.types.is_struct(detections) else -1
        if number < 0 or detections.field(number).type != _QUERY_TYPE:
            raise UserError(f"{where} is damaged: it must have a column detections.query of type {_QUERY_TYPE}")

    def fields(self) -> list[pa.Field]:
        """Return the columns beside `detections`."""
        parts = [("bbox", _BBOX_TYPE)]
        if self.class_scores is not None:
            parts.append(("class_scores", pa.list_(pa.list_(pa.float16(), self.num_classes))))
        if self.dimension is not None:
            parts.append(("embedding", pa.list_(pa.list_(pa.float16(), self.dimension))))
        columns = [pa.field(QUERIES_COLUMN, pa.struct(parts))]
        if self.dimension is not None:
            columns.append(pa.field(IMAGE_EMBEDDING_COLUMN, pa.list_(pa.float16(), self.dimension)))
        return columns

    def schema(
        self, categories: Sequence[Category], metadata: Mapping[str, Any], extra_fields: Sequence[pa.Field] = ()
    ) -> pa.Schema:
        """Build the schema of a detections table with these vectors and further columns."""
        own: dict[str, Any] = {}
        if self.class_scores is not None:
            own["class_scores"] = {"kind": self.class_scores, "dimension": self.num_classes}
        if self.dimension is not None:
            own["embedding"] = {"dimension": self.dimension}
        return build_schema(
            "detections",
            categories,
            extra_fields=[*extra_fields, *self.fields()],
            extra_metadata={**metadata, **own},
            with_queries=True,
        )


def _entry(content: Mapping[str, Any], name: str, key: str) -> Any:
    """Return a value in the metadata of a table; None if the table has no such vectors."""
    part = content.get(name)
    return part.get(key, "") if isinstance(part, dict) else part


def check_kept(batch: pa.RecordBatch, where: str) -> None:
    """Check the queries and vectors in rows of a detections table, as far as the rows have them.

    Raises:
        UserError: Lists of a row differ in length, a detection names no query of its row, or a number is not finite or
            out of range.
    """
    num_queries = None
    if QUERIES_COLUMN in batch.schema.names:
        num_queries = _check_queries(batch, where)
    is_there = "detections" in batch.schema.names
    types = {field.name: field.type for field in batch.schema.field("detections").type} if is_there else {}
    if types.get("query") == _QUERY_TYPE:
        names = [name for name in ("query", "score") if name in types]
        lengths, elements = elements_of(batch, "detections", names, where)
        query = numbers_of(elements["query"])
        limits = np.repeat(np.full(len(lengths), 2**62) if num_queries is None else num_queries, lengths)
        if ((query < 0) | (query >= limits)).any():
            raise UserError(f"{where} is damaged: a detection names a query that its row does not have")
    if IMAGE_EMBEDDING_COLUMN in batch.schema.names:
        column = batch.column(IMAGE_EMBEDDING_COLUMN)
        _check_halves(column.flatten(), IMAGE_EMBEDDING_COLUMN, where)


def _check_queries(batch: pa.RecordBatch, where: str) -> Integers:
    """Check the queries of each row and return their number."""
    names = [field.name for field in batch.schema.field(QUERIES_COLUMN).type]
    lengths, elements = elements_of(batch, QUERIES_COLUMN, names, where)
    if "bbox" in elements:
        boxes_xywh = as_boxes(numbers_of(elements["bbox"]))
        if not np.isfinite(boxes_xywh).all() or (boxes_xywh[:, 2:] < 0).any():
            raise UserError(f"{where} is damaged: a query has a box that is not finite, or of negative size")
    if "class_scores" in elements:
        scores = _check_halves(elements["class_scores"], f"{QUERIES_COLUMN}.class_scores", where)
        # Read as integers, negative numbers are larger than any other.
        if len(scores) and int(scores.view(np.uint16).max()) > _ONE:
            raise UserError(f"{where} is damaged: a query has a class score outside 0 … 1")
    if "embedding" in elements:
        _check_halves(elements["embedding"], f"{QUERIES_COLUMN}.embedding", where)
    return lengths


def _check_halves(values: pa.Array, name: str, where: str) -> npt.NDArray[np.float16]:
    numbers: npt.NDArray[np.float16] = numbers_of(values)
    if values.null_count or (len(numbers) and int((numbers.view(np.uint16) & 0x7FFF).max()) >= _INFINITY):
        raise UserError(f"{where} is damaged: {name} has numbers that are null, NaN or infinite")
    return numbers
