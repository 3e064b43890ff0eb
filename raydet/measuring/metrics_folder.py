"""The folder that evaluations write: tables of several runs, one Parquet file for each run in each table.

OUT/metrics, OUT/per_image and so on are tables like any other, with one manifest over all runs. A run's file in
OUT/metrics goes first and comes last, so while it is there, the run's rows in all other tables are whole.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydet.common.errors import UserError
from raydet.config import EvaluateConfig, config_hash, identity
from raydet.tables import storage
from raydet.tables.output_folder import OutputFolder, open_folder
from raydet.tables.schema import TableKind
from raydet.tables.table import MANIFEST_NAME, Table, is_table, open_table, write_manifest

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
"""The tables, in the order in which they are written."""
_LONGEST_NAME = 80


def file_name(run: str) -> str:
    """The Parquet file of a run: its name, or what is safe of it and a few digits that tell it from others."""
    safe = re.sub(r"[^A-Za-z0-9.-]+", "_", run)[:_LONGEST_NAME].lstrip("._")
    if safe != run:
        # Readers of folders skip files that begin with a dot or an underscore.
        safe = f"{safe or 'run'}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"
    return f"{safe}.parquet"


@contextlib.contextmanager
def opened(config: EvaluateConfig) -> Iterator[OutputFolder]:
    """Opens the metrics folder of an evaluation, whose `run` is named, and begins its run there when all goes well.

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
            remedy=f"{config.run} is its name: choose another --run or --out",
        )
        yield folder


def _run_of(config: EvaluateConfig) -> str:
    assert config.run is not None, "evaluate names its run"
    return config.run


def _part_of(config: EvaluateConfig) -> str:
    return f"evaluate-{file_name(_run_of(config)).removesuffix('.parquet')}"


def runs_in(out: str) -> tuple[str, ...]:
    """The names of the runs in a folder whose `metrics` table is there, the one measured last at the end.

    Raises:
        UserError: An earlier raydet wrote the table, which does not say which runs are in it.
    """
    uri = storage.join(out, "metrics")
    runs = _read_manifest(uri).get("runs")
    if not runs:
        raise UserError(f"{uri} was written by an earlier raydet; run `raydet evaluate` again")
    return tuple(of_run["run"] for of_run in runs.values())


def open_run(out: str, kind: TableKind, run: str) -> Table | None:
    """The rows of a run in one of the tables, with the run's own classes; None where there are none.

    The manifest is that of the table; its `runs` has an entry for each run, by `file_name`.

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
    """Puts the rows of a run beside those of others, in the place of its own earlier ones.

    Args:
        folder: Metrics folder, opened for this evaluation.
        config: Evaluation, whose `run` is named.
        tables: Tables to write, `metrics` among them; rows of the run in other tables are removed.
        extra: Further entries of a table's manifest.
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
            # Left by an evaluation that was killed before its manifest was there.
            for leftover in folder.list_files(kind):
                if leftover.endswith(".parquet"):
                    folder.delete_file(kind, leftover)
        data = pa.BufferOutputStream()
        pq.write_table(tables[kind], data)
        folder.write_bytes(data.getvalue().to_pybytes(), kind, name)
        manifest = _read_manifest(uri)
        own = {"run": run, "config_hash": config_hash(config), **extra.get(kind, {})}
        files, runs = manifest.get("files", {}), manifest.get("runs", {})
        runs.pop(name, None)  # the newest run stands last
        _write(uri, files | {name: tables[kind].num_rows}, runs | {name: own})


def _remove(uri: str, name: str) -> None:
    """Takes a run's file out of a table; the manifest forgets it first."""
    manifest = _read_manifest(uri)
    if name in manifest.get("files", {}):
        files, runs = (
            {key: value for key, value in manifest[part].items() if key != name} for part in ("files", "runs")
        )
        if files:
            _write(uri, files, runs)
        else:
            storage.delete_file(storage.join(uri, MANIFEST_NAME))
    storage.delete_file(storage.join(uri, name))


def _write(uri: str, files: dict[str, int], runs: dict[str, dict[str, Any]]) -> None:
    # The newest run's entries also stand at the top, where readers that know of one run only look for them.
    newest = next(reversed(runs.values()))
    others = {key: value for key, value in newest.items() if key != "config_hash"}
    write_manifest(uri, files, config_hash=newest["config_hash"], runs=runs, **others)


def _read_manifest(uri: str) -> dict[str, Any]:
    if not is_table(uri):
        return {}
    content: dict[str, Any] = json.loads(storage.read_bytes(storage.join(uri, MANIFEST_NAME)))
    return content
