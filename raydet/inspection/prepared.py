"""Lists that `prepare` wrote next to a table, or next to the tables of several splits → findings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.redaction import without_secrets
from raydet.inspection.findings import DataFinding, Findings
from raydet.tables import storage
from raydet.tables.table import FINDINGS_FOLDER, REJECTED_FOLDER, SPLITS, Table, is_table, open_table


@dataclass(frozen=True)
class Preparation:
    """Lists that `prepare` wrote about a table.

    Attributes:
        is_shared: The lists cover several splits, including this table.
        rejected: Images that were left out; None if there is no such list.
        findings: Findings about the accepted images; None if there is no such list.
    """

    uri: str
    is_shared: bool
    rejected: Table | None
    findings: Table | None


def preparation_of(table: Table) -> Preparation | None:
    """Return the findings and rejected images of a table, from its folder or, for a split, from the parent folder."""
    parent, name = storage.split(table.uri)
    for uri, is_shared in ((table.uri, False), *([(parent, True)] if name in SPLITS else [])):
        lists = {
            folder: open_table(place, ("findings", "rejected")) if is_table(place) else None
            for folder in (REJECTED_FOLDER, FINDINGS_FOLDER)
            for place in [storage.join(uri, folder)]
        }
        if any(lists.values()):
            return Preparation(uri, is_shared, lists[REJECTED_FOLDER], lists[FINDINGS_FOLDER])
    return None


def add_prepared_findings(
    findings: Findings, table: Table, split: str, preparation: Preparation, *, with_left_out: bool
) -> None:
    """Add the images that `prepare` left out, and its findings about the accepted images.

    `with_left_out` also adds entries that belong to no split: images left out and findings about no image. Lists that
    are not shared between splits are always added completely.
    """
    uri = without_secrets(table.uri)
    if with_left_out or not preparation.is_shared:
        for batch in _batches(preparation.rejected, ("path", "reason")):
            for row in batch.to_pylist():
                path, reason = row["path"] or "", row["reason"] or ""
                findings.add(DataFinding(split=split, kind="rejected", table=uri, path=path, detail=reason))
    wanted_ids: list[pa.Array] = []
    if preparation.is_shared:
        wanted_ids.append(_ids(table.iter_batches(["image_id"])))
        if with_left_out:
            wanted_ids += [_ids(_batches(preparation.rejected, ["image_id"])), pa.nulls(1, pa.int64())]
    for batch in _batches(preparation.findings, ("path", "image_id", "kind", "detail", "count")):
        if wanted_ids:
            batch = batch.filter(pc.is_in(batch.column("image_id"), pa.concat_arrays(wanted_ids)))
        for row in batch.to_pylist():
            path, detail, times = row["path"] or "", row["detail"] or "", row["count"]
            about = {"kind": row["kind"], "image_id": row["image_id"]}
            findings.add(DataFinding(split=split, table=uri, path=path, detail=detail, **about), times=times)


def _ids(batches: Iterator[pa.RecordBatch]) -> pa.Array:
    return pa.concat_arrays([pa.array([], pa.int64()), *(batch.column(0) for batch in batches)])


def _batches(table: Table | None, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Stream one of the lists, if it exists."""
    if table is not None:
        yield from table.iter_batches(columns)
