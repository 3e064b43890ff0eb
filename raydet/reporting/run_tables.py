"""Folder written by `evaluate` → the tables of one run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.errors import UserError
from raydet.common.untrusted.documents import DocumentError, parse_json
from raydet.measuring import metrics_folder
from raydet.measuring.numbers.values import MetricValue, values_in
from raydet.tables import storage
from raydet.tables.schema import TableKind
from raydet.tables.table import Table, is_table, open_table


@dataclass(frozen=True, kw_only=True)
class RunTables:
    """Tables of one evaluated run.

    Attributes:
        runs: All runs in the folder, in the order in which they were measured.
        facts: Row of the `runs` table; empty if there is none.
        entry: Entry of the run in the manifest of its metrics, with the outcome of `--verify`.
        classes: Class names by index.
        values: Metric values by slice (None: all images), metric and class (None: all classes).
        slices: Names of the slices in order.
        tables: The other existing tables, with the rows of this run.
    """

    uri: str
    run: str
    runs: tuple[str, ...]
    facts: dict[str, Any]
    entry: dict[str, Any]
    classes: tuple[str, ...]
    values: dict[tuple[str | None, str, str | None], MetricValue]
    slices: tuple[str, ...]
    model: str | None
    split: str | None
    tables: dict[TableKind, pa.Table]

    @cached_property
    def truth(self) -> Table:
        """Images table that the run was measured against.

        Raises:
            UserError: It no longer exists, or the run does not name one.
        """
        return self._open("truth", "images")

    @cached_property
    def detections(self) -> Table:
        """Detections table that was measured; raises as `truth` does."""
        return self._open("detections", "detections")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Options of `evaluate` that the run recorded; empty if it recorded none.

        Raises:
            UserError: They are not JSON.
        """
        try:
            config = parse_json(self.facts.get("config") or "{}")
        except DocumentError as error:
            raise UserError(f"{self.uri} is damaged: the config of the run {self.run} is not JSON: {error}") from None
        return config if isinstance(config, dict) else {}

    def _open(self, name: str, kind: TableKind) -> Table:
        uri = self.facts.get(name)
        if not uri:
            raise UserError(f"the metrics do not name the {name}; run `raydet evaluate` again to write `runs`")
        if uri.endswith(".json"):
            raise UserError(f"{uri} is a JSON file; evaluate tables instead to show images and their boxes")
        return open_table(uri, kind)

    def value(self, metric: str, category: str | None = None, slice_name: str | None = None) -> MetricValue:
        """Return one metric of a class and slice."""
        return self.values.get((slice_name, metric, category), MetricValue(metric=metric, value=None))


def read_run(metrics_uri: str, run: str | None) -> RunTables:
    """Read the tables of one run.

    Args:
        metrics_uri: Folder that `evaluate` wrote.
        run: Name of the run; by default the run that was measured last.

    Raises:
        UserError: The folder or run does not exist, or the folder has no metrics.
    """
    uri = storage.absolute_uri(metrics_uri).rstrip("/")
    if not is_table(storage.join(uri, "metrics")):
        raise UserError(_not_metrics(uri))
    runs = metrics_folder.runs_in(uri)
    if run is not None and run not in runs:
        known = ", ".join(repr(name) for name in runs)
        raise UserError(f"{uri} has no run {run!r}; its runs are {known}")
    chosen = runs[-1] if run is None else run
    opened = {kind: metrics_folder.open_run(uri, kind, chosen) for kind in metrics_folder.KINDS}
    tables = {kind: table.read() for kind, table in opened.items() if table is not None}
    metrics = opened["metrics"]
    assert metrics is not None, "a run that the manifest names has its file"
    rows = tables.pop("metrics")
    if not rows.num_rows:
        raise UserError(f"{uri} has no metrics of the run {chosen}; run `raydet evaluate` again")
    facts = tables.pop("runs").to_pylist() if "runs" in tables else []
    values = {(value.slice, value.metric, value.category): value for value in values_in(rows)}
    return RunTables(
        uri=uri,
        run=chosen,
        runs=runs,
        facts=facts[-1] if facts else {},
        entry=metrics.manifest["runs"][metrics_folder.file_name(chosen)],
        classes=tuple(category.name for category in metrics.categories),
        values=values,
        slices=tuple(dict.fromkeys(name for name, _, _ in values if name is not None)),
        model=rows["model"][0].as_py(),
        split=rows["split"][0].as_py(),
        tables={kind: content for kind, content in tables.items() if content.num_rows},
    )


def _not_metrics(uri: str) -> str:
    if not storage.exists(uri):
        return f"no such folder: {uri}; expected the folder that `raydet evaluate --out` wrote"
    if is_table(uri):
        parent = uri.rpartition("/")[0]
        return f"{uri} is a single table; expected the folder that `raydet evaluate --out` wrote, possibly {parent}"
    inside = [name for name in storage.list_folders(uri) if is_table(storage.join(uri, name, "metrics"))]
    if inside:
        return f"{uri} is not a metrics folder, but it holds {' and '.join(inside[:5])}; name one of them"
    return (
        f"{uri} has no complete metrics table; expected the folder that `raydet evaluate --out` wrote; run that "
        "command again if it was interrupted"
    )


def indices_in(column: pa.ChunkedArray, names: Sequence[str]) -> list[int | None]:
    """Return the index of each value of a column in a list of names; None for null and unknown names."""
    places: list[int | None] = pc.index_in(column, pa.array(names, pa.string())).to_pylist()
    return places
