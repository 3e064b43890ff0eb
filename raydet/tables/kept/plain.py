"""The rows of a detections table without the vectors that were kept with them."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from raydet.tables.schema import DETECTIONS_TYPE, Category, build_schema, parse_metadata
from raydet.tables.table import Table

_METADATA = ("checkpoint", "checkpoint_hash", "operating_point")


def plain_schema(
    table: Table, categories: Sequence[Category] | None = None, *, extra_fields: Sequence[pa.Field] = ()
) -> pa.Schema:
    """Return the schema of a detections table without vectors, with its own classes or with others."""
    content = parse_metadata(table.schema, kind="detections", where=table.uri)
    metadata: dict[str, Any] = {name: content[name] for name in _METADATA if name in content}
    own = table.categories if categories is None else categories
    return build_schema("detections", own, extra_fields=extra_fields, extra_metadata=metadata)


def plain_detections(batch: pa.RecordBatch, table: Table) -> pa.RecordBatch:
    """Return rows of a detections table without queries and vectors, in the columns of `plain_schema`."""
    schema = plain_schema(table)
    detections = batch.column("detections")
    fields = list(DETECTIONS_TYPE)
    plain = pa.StructArray.from_arrays([detections.field(field.name) for field in fields], fields=fields)
    columns = {name: plain if name == "detections" else batch.column(name) for name in schema.names}
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)
