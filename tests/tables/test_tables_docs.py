"""docs/tables.md describes every column of every table."""

import re
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest

from raydet.tables.kept.columns import KeptVectors
from raydet.tables.schema import TableKind, build_schema

DOCS = Path(__file__).parents[2] / "docs" / "tables.md"
SHARED = {"run": "each with a column `run`", "split": "Each has a column `split`"}
"""Columns that an introduction describes for several tables."""


def described(kind: str) -> tuple[str, str]:
    """Return the description of a table, a row or else a section, and the introduction of its section."""
    for section in re.split(r"^## ", DOCS.read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        row = re.search(rf"^\| `{kind}` \|.*$", text, flags=re.MULTILINE)
        if row is not None:
            return row[0], text
        if title == kind:
            return text, text
    raise AssertionError(f"docs/tables.md does not describe the table {kind}")


def columns(schema: pa.Schema) -> list[str]:
    return [
        f"{field.name}.{part.name}" if pa.types.is_struct(field.type) and field.name != "image" else field.name
        for field in schema
        for part in (field.type if pa.types.is_struct(field.type) and field.name != "image" else [field])
    ]


@pytest.mark.parametrize("kind", get_args(TableKind))
def test_every_column_is_described(kind: TableKind) -> None:
    text, section = described(kind)
    missing = [
        name
        for name in columns(build_schema(kind))
        if f"`{name}`" not in text and not (name in SHARED and SHARED[name] in section)
    ]
    assert not missing, f"docs/tables.md lacks columns of {kind}: {missing}"


def test_columns_of_kept_vectors_are_described() -> None:
    text, _ = described("detections")
    schema = KeptVectors(class_scores="sigmoid", num_classes=2, dimension=2).schema((), {})
    assert [name for name in columns(schema) if f"`{name}`" not in text and name not in ("width", "height")] == []
