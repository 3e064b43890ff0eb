"""`select` on a Ray cluster finds what it finds in one process."""

from pathlib import Path
from typing import Any

import pytest

from raydet import SelectConfig, select
from raydet.tables.kept.columns import KeptVectors
from raydet.tables.table import TableWriter, open_table
from tests.selection.test_select import CATEGORIES, DIMENSION, NUM_IMAGES, rows
from tests.small_sets import rows_of


def write(uri: str, *, images_per_group: int) -> str:
    schema = KeptVectors(dimension=DIMENSION).schema(CATEGORIES, {})
    with TableWriter(uri, schema, config_hash="0" * 12, file_bytes=1) as writer:
        for start in range(0, NUM_IMAGES, images_per_group):
            writer.write_rows(rows()[start : start + images_per_group])
            writer.flush()
    return uri


@pytest.mark.timeout(180)
@pytest.mark.parametrize("options", [{"near_duplicates": True, "min_similarity": 0.3}, {"similar_to": "130:0"}])
def test_a_cluster_finds_the_same(tmp_path: Path, ray_cluster: None, options: dict[str, Any]) -> None:
    whole = write(str(tmp_path / "whole"), images_per_group=NUM_IMAGES)
    parted = write(str(tmp_path / "parted"), images_per_group=7)
    assert len(open_table(parted).row_groups()) == 9
    here = select(SelectConfig(detections=whole, out=str(tmp_path / "here"), **options))
    there = select(SelectConfig(detections=parted, ray_address="local", out=str(tmp_path / "there"), **options))
    kind = Path(here.table).name
    found, expected = rows_of(there.table, kind), rows_of(here.table, kind)
    assert [{**row, "similarity": None} for row in found] == [{**row, "similarity": None} for row in expected]
    assert [row["similarity"] for row in found] == pytest.approx([row["similarity"] for row in expected], abs=1e-6)
    assert Path(there.list_file).read_text() == Path(here.list_file).read_text()
