"""What `prepare` left beside a table, or beside the tables of several splits → findings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from raydet.inspection.oddities import DataFinding, Findings
from raydet.tables import storage
from raydet.tables.table import FINDINGS_FOLDER, REJECTED_FOLDER, SPLITS, Table, is_table, open_table


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Where `prepare` listed what was odd about a table.

    Attributes:
        uri: The folder that holds the lists.
        is_shared: Whether they are those of several splits, of which the table is one.
        rejected: The images that were left out; None where there is no such list.
        findings: What was odd in those that were taken; likewise.
    """

    uri: str
    is_shared: bool
    rejected: Table | None
    findings: Table | None


def preparation_of(table: Table) -> Preparation | None:
    """The lists that belong to a table: beside its files, or, for one of several splits, beside the splits."""
    parent, name = _parted(table.uri)
    for uri, is_shared in ((table.uri, False), *([(parent, True)] if name in SPLITS else [])):
        lists = {
            folder: open_table(place, ("findings", "rejected")) if is_table(place) else None
            for folder in (REJECTED_FOLDER, FINDINGS_FOLDER)
            for place in [storage.join(uri, folder)]
        }
        if any(lists.values()):
            return Preparation(
                uri=uri, is_shared=is_shared, rejected=lists[REJECTED_FOLDER], findings=lists[FINDINGS_FOLDER]
            )
    return None


def add_prepared_findings(
    findings: Findings, table: Table, split: str, preparation: Preparation, *, with_left_out: bool
) -> None:
    """Adds images that `prepare` left out, and what it found odd in those that it took.

    Args:
        findings: Where they go.
        table: The images.
        split: `data` or `val`.
        preparation: The lists of `table`.
        with_left_out: Whether this split also stands for what lies in none: images left out, and what is a matter of
            no image. Of lists that no splits share, all is taken.
    """
    takes_left_out = with_left_out or not preparation.is_shared
    if takes_left_out:
        for batch in _batches(preparation.rejected, ("path", "reason")):
            for row in batch.to_pylist():
                findings.add(
                    DataFinding(split=split, kind="rejected", path=row["path"] or "", detail=row["reason"] or "")
                )
    wanted_ids: list[pa.Array] = []
    if preparation.is_shared:
        wanted_ids.append(_ids(table.iter_batches(["image_id"])))
        if with_left_out:
            wanted_ids += [_ids(_batches(preparation.rejected, ["image_id"])), pa.nulls(1, pa.int64())]
    for batch in _batches(preparation.findings, ("path", "image_id", "kind", "detail", "count")):
        if wanted_ids:
            batch = batch.filter(pc.is_in(batch.column("image_id"), pa.concat_arrays(wanted_ids)))
        for row in batch.to_pylist():
            found = DataFinding(
                split=split,
                kind=row["kind"],
                image_id=row["image_id"],
                path=row["path"] or "",
                detail=row["detail"] or "",
            )
            findings.add(found, times=row["count"])


def _parted(uri: str) -> tuple[str, str]:
    """A URI's folder and its last component."""
    path, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    parent, _, name = path.rstrip("/").rpartition("/")
    return parent + mark + options, name


def _ids(batches: Iterator[pa.RecordBatch]) -> pa.Array:
    return pa.concat_arrays([pa.array([], pa.int64()), *(batch.column(0) for batch in batches)])


def _batches(table: Table | None, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Streams one of the lists, which need not be there."""
    if table is not None:
        yield from table.iter_batches(columns)
