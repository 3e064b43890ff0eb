"""Folder that evaluations write: tables of several runs, with one Parquet file per run in each table.

OUT/metrics, OUT/per_image etc. are ordinary tables with one manifest over all runs. A run's file in OUT/metrics is
deleted first and written last, so its presence means that the run's rows in all other tables are complete.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydet.common.errors import UserError
from raydet.config import EvaluateConfig, config_hash, identity
from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME, FileGroups, groups_of
from raydet.tables.output_folder import OutputFolder, open_folder
from raydet.tables.schema import TableKind, with_token
from raydet.tables.table import Table, is_table, open_table, read_manifest, write_manifest

KINDS: tuple[TableKind, ...] = (
    "per_image",
    "pr_curves",
    "errors",
    "confusion",
    "calibration",
    "suspects",
    "runs",
    "metrics",
)
"""Tables in the order in which they are written."""
_LONGEST_NAME = 80


def file_name(run: str) -> str:
    """Return the Parquet file name of a run: its name, or a filename-safe version with a distinguishing hash."""
    safe = re.sub(r"[^A-Za-z0-9.-]+", "_", run)[:_LONGEST_NAME].lstrip("._")
    if safe != run:
        # Folder readers skip files that start with a dot or an underscore.
        safe = f"{safe or 'run'}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"
    return f"{safe}.parquet"


@contextlib.contextmanager
def open_for_run(config: EvaluateConfig) -> Iterator[OutputFolder]:
    """Open the metrics folder of an evaluation whose `run` is set, and check that the run may be written there.

    Raises:
        UserError: The folder holds files that raydet did not write, or this run with other settings.
    """
    assert config.out is not None
    with open_folder(config.out, command="evaluate") as folder:
        is_measured = file_name(_run_of(config)) in _read_manifest(folder.uri_of("metrics")).get("files", {})
        folder.admit(
            identity(config),
            folders=KINDS,
            part=_part_of(config),
            is_disposable=not is_measured,
            remedy=f"the run is named {config.run}: choose another --run or --out",
        )
        yield folder


def _run_of(config: EvaluateConfig) -> str:
    assert config.run is not None, "evaluate names its run"
    return config.run


def _part_of(config: EvaluateConfig) -> str:
    return f"evaluate-{file_name(_run_of(config)).removesuffix('.parquet')}"


def runs_in(out: str) -> tuple[str, ...]:
    """Return the names of the runs in a folder with a `metrics` table, in the order of measurement.

    Raises:
        UserError: The table was written by an earlier raydet that did not record its runs.
    """
    uri = storage.join(out, "metrics")
    runs = _read_manifest(uri).get("runs")
    if not runs:
        raise UserError(f"{uri} was written by an earlier raydet; run `raydet evaluate` again")
    if any(name != file_name(of_run["run"]) for name, of_run in runs.items()):
        raise UserError(
            f"{uri} is damaged: its manifest names a run by the file of another; run `raydet evaluate` again"
        )
    return tuple(of_run["run"] for of_run in runs.values())


def open_run(out: str, kind: TableKind, run: str) -> Table | None:
    """Return the rows of a run in one of the tables, with the run's own classes; None without rows.

    The manifest is that of the table; its `runs` has an entry for each run, keyed by `file_name`.

    Raises:
        UserError: The table is damaged.
    """
    uri, name = storage.join(out, kind), file_name(run)
    if not is_table(uri):
        return None
    table = open_table(uri, kind)
    return table.only(name) if name in table.files else None


def write_run(
    folder: OutputFolder,
    config: EvaluateConfig,
    tables: Mapping[TableKind, pa.Table],
    *,
    extra: Mapping[TableKind, Mapping[str, Any]],
) -> None:
    """Write the rows of a run beside those of other runs, replacing its own earlier rows, also in tables not given.

    `extra` holds additional manifest entries by table.
    """
    run, name = _run_of(config), file_name(_run_of(config))
    _remove(folder.uri_of("metrics"), name)
    folder.begin(identity(config), folders=KINDS, part=_part_of(config))
    for kind in KINDS:
        uri = folder.uri_of(kind)
        if kind not in tables:
            _remove(uri, name)
            continue
        if not is_table(uri):
            # Left over from an evaluation that was killed before it wrote the manifest.
            for leftover in folder.list_files(kind):
                if leftover.endswith(".parquet"):
                    folder.delete_file(kind, leftover)
        data = pa.BufferOutputStream()
        footers: list[pq.FileMetaData] = []
        rows = tables[kind].cast(with_token(tables[kind].schema, config_hash(config)))
        pq.write_table(rows, data, metadata_collector=footers)
        folder.write_bytes(data.getvalue().to_pybytes(), kind, name)
        manifest = _read_manifest(uri)
        own = {"run": run, "config_hash": config_hash(config), **extra.get(kind, {})}
        files, runs = manifest.get("files", {}), manifest.get("runs", {})
        runs.pop(name, None)  # the newest run comes last
        _write(uri, files | {name: groups_of(footers[0])}, runs | {name: own})


def _remove(uri: str, name: str) -> None:
    """Remove a run's file from a table, after removing it from the manifest."""
    manifest = _read_manifest(uri)
    if name in manifest.get("files", {}):
        for part in ("files", "runs"):
            manifest[part].pop(name)
        if manifest["files"]:
            _write(uri, manifest["files"], manifest["runs"])
        else:
            storage.delete_file(storage.join(uri, MANIFEST_NAME))
    storage.delete_file(storage.join(uri, name))


def _write(uri: str, files: dict[str, FileGroups], runs: dict[str, dict[str, Any]]) -> None:
    # The newest run's entries are repeated at the top level for readers that expect a single run.
    newest = next(reversed(runs.values()))
    others = {key: value for key, value in newest.items() if key != "config_hash"}
    tokens = {name: own["config_hash"] for name, own in runs.items()}
    write_manifest(uri, files, config_hash=newest["config_hash"], token=tokens, runs=runs, **others)


def _read_manifest(uri: str) -> dict[str, Any]:
    return read_manifest(uri) if is_table(uri) else {}
