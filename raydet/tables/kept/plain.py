"""The rows of a detections table without the vectors that were kept with them."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from raydet.tables.schema import DETECTIONS_TYPE, Category, build_schema, declared_fields, parse_metadata

_METADATA = ("checkpoint", "checkpoint_hash", "operating_point")


def plain_schema(
    schema: pa.Schema, categories: Sequence[Category], *, where: str, extra_fields: Sequence[pa.Field] = ()
) -> pa.Schema:
    """Return the schema that detections have without vectors; `where` names their table in an error."""
    content = parse_metadata(schema, kind="detections", where=where)
    metadata: dict[str, Any] = {name: content[name] for name in _METADATA if name in content}
    return build_schema("detections", categories, extra_fields=extra_fields, extra_metadata=metadata)


def plain_columns(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """Return the columns of some detections without queries and vectors, by name."""
    detections = batch.column("detections")
    fields = list(DETECTIONS_TYPE)
    plain = pa.StructArray.from_arrays([detections.field(field.name) for field in fields], fields=fields)
    names = (name for name, _ in declared_fields("detections"))
    return {name: plain if name == "detections" else batch.column(name) for name in names}
