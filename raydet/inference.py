"""Batch inference: an images table and a checkpoint → a detections table, one row for each image.

table → encoded batches → decoded batches (light tasks: no torch) → the model (actors that load it once) → files.
Every stage hands on blocks of one row that holds a whole batch, so that nothing is cut or merged on the way.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data import ActorPoolStrategy, ExecutionOptions, TaskPoolStrategy

from raydet import cluster, storage
from raydet.checkpoints import read_checkpoint
from raydet.config import PredictConfig, changed_fields, config_hash, identity
from raydet.console import Console
from raydet.data import TaskSource, image_bytes, use_one_row_blocks
from raydet.decode import DecodeError, decode
from raydet.errors import UserError
from raydet.families import family_of
from raydet.schema import build_schema
from raydet.tables import MANIFEST_NAME, RowGroup, Table, is_table, open_table, write_manifest

if TYPE_CHECKING:
    from raydet.models import Detections

RUN_FILE = "_run.json"
COUNTS_KEY = b"raydet_counts"
ROWS_PER_FILE = 1024
"""Rows of a detections file. A killed run does at most this many rows again, and those in flight."""

_IMAGE_COLUMNS = ("image_id", "image", "width", "height")
_DECODED_TYPE = pa.struct(
    [
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("pixels", pa.large_binary()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class PredictResult:
    """What a scoring run came to.

    Attributes:
        out: The detections table.
        num_images: Rows of the table, one for each image.
        num_errors: Those whose image could not be read.
        num_detections: In all rows together.
        already_done: Nothing was left to do.
    """

    out: str
    num_images: int
    num_errors: int
    num_detections: int
    already_done: bool = False

    def lines(self) -> list[str]:
        """What came of the run, for the terminal."""
        first = ["nothing to do: this run is finished"] if self.already_done else []
        errors = f", {self.num_errors:,} of them could not be read" if self.num_errors else ""
        return [
            *first,
            f"{self.num_images:,} images{errors}; {self.num_detections:,} detections",
            f"detections: {self.out}",
        ]


def predict(config: PredictConfig, *, console: Console | None = None) -> PredictResult:
    """Scores every image of a table; run again after a kill, it does what is left.

    Raises:
        UserError: Table, checkpoint or output folder are not what they should be. Nothing has been written then.
    """
    console = console or Console()
    table = open_table(config.data, "images")
    if table.num_rows == 0:
        raise UserError(f"--data {table.uri} has no image")
    checkpoint = read_checkpoint(config.checkpoint)
    family_of(checkpoint.model_type, where=config.checkpoint)
    if not checkpoint.categories:
        raise UserError(f"the model {checkpoint.name} names no classes (no id2label in its config.json)")
    # Workers have other working directories, and a run is the same whichever one it is started from.
    config = dataclasses.replace(
        config, out=storage.absolute_uri(config.out), checkpoint=checkpoint.name, data=table.uri
    )
    schema = build_schema("detections", checkpoint.categories, extra_metadata={"checkpoint": checkpoint.name})
    if _check_folder(config):
        return _result(config.out, already_done=True)
    done = _done_image_ids(config.out)
    with cluster.session(storage.join(config.out, "_log")):
        resources = cluster.share_out(
            min_workers=config.num_workers,
            max_workers=config.num_workers,
            use_gpu=config.use_gpu,
            cpus_per_worker=config.cpus_per_worker,
        )
        storage.write_bytes(storage.join(config.out, RUN_FILE), json.dumps(identity(config), indent=1).encode())
        log = storage.join(config.out, "_log", cluster.LOG_FILE)
        console.line(f"{resources.describe(config.num_workers, config.num_workers)}; Ray's log: {log}")
        dataset = _detections(config, table, schema, done, resources)
        num_rows = len(done)
        with console.status("starting workers") as update:
            for part in dataset.iter_rows():
                num_rows += part["num_rows"]
                update(f"{num_rows:,} of {table.num_rows:,} images")
    _finish(config, table)
    return _result(config.out)


def _check_folder(config: PredictConfig) -> bool:
    """Whether the folder holds this very run, finished; refuses a folder with anything else."""
    run_path = storage.join(config.out, RUN_FILE)
    if not storage.exists(run_path):
        if storage.list_files(config.out):
            raise UserError(f"--out {config.out} holds files that are no detections of raydet; choose another folder")
        return False
    changes = changed_fields(config, json.loads(storage.read_bytes(run_path)))
    if changes:
        raise UserError(
            f"--out {config.out} already holds another run ({'; '.join(changes)}); choose another folder, or the "
            "same settings to go on with it"
        )
    return is_table(config.out)


def _parts(out: str) -> list[str]:
    return [name for name in storage.list_files(out) if name.endswith(".parquet") and not name.startswith((".", "_"))]


def _done_image_ids(out: str) -> npt.NDArray[np.int64]:
    """The images that an earlier, killed run has written, sorted."""
    filesystem, path = storage.resolve(out)
    parts = [
        pq.read_table(f"{path}/{name}", columns=["image_id"], filesystem=filesystem)["image_id"].to_numpy()
        for name in _parts(out)
    ]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *parts]))


def _detections(
    config: PredictConfig,
    table: Table,
    schema: pa.Schema,
    done: npt.NDArray[np.int64],
    resources: cluster.Resources,
) -> ray.data.Dataset:
    """The pipeline; its rows say which file was written with how many rows."""
    use_one_row_blocks(ExecutionOptions())
    as_blocks: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    groups, done_ref = table.row_groups(), ray.put(done)
    dataset = ray.data.read_datasource(
        TaskSource("Images", [partial(_read_batches, table, group, done_ref, config.batch_size) for group in groups]),
        num_cpus=0.01,
        compute=TaskPoolStrategy(size=min(len(groups), max(2, config.num_workers))),
        override_num_blocks=max(1, len(groups)),
    )
    dataset = dataset.map_batches(
        partial(_decode_batch, max_pixels=config.max_pixels), num_cpus=resources.cpus_per_task, **as_blocks
    )
    dataset = dataset.map_batches(
        _Scorer,
        fn_constructor_kwargs={"config": config, "row_type": _row_type(schema)},
        compute=ActorPoolStrategy(size=config.num_workers),
        num_cpus=resources.cpus_per_worker,
        num_gpus=1 if resources.use_gpu else 0,
        **as_blocks,
    )
    parts: ray.data.Dataset = dataset.map_batches(
        partial(_write_part, out=config.out, schema=schema),
        batch_size=max(1, ROWS_PER_FILE // config.batch_size),
        batch_format="pyarrow",
        num_cpus=0.1,
    )
    return parts


def _read_batches(table: Table, group: RowGroup, done: "ray.ObjectRef[Any]", batch_size: int) -> Iterator[pa.Table]:
    rows = table.read_row_group(group, _IMAGE_COLUMNS)
    is_done = np.isin(rows["image_id"].to_numpy(), ray.get(done))
    rows = rows.filter(pa.array(~is_done)).combine_chunks()
    for start in range(0, rows.num_rows, batch_size):
        batch = rows.slice(start, batch_size).to_struct_array()
        yield _one_row(pa.concat_arrays(batch.chunks))


def _one_row(rows: pa.Array) -> pa.Table:
    return pa.table({"rows": pa.LargeListArray.from_arrays(pa.array([0, len(rows)], pa.int64()), rows)})


def _decode_batch(block: pa.Table, max_pixels: int) -> pa.Table:
    decoded = []
    for row in block["rows"].combine_chunks().values:
        record = {"image_id": row["image_id"].as_py(), "path": row["image"]["path"].as_py()}
        try:
            image = decode(image_bytes(row["image"].as_py()), max_pixels=max_pixels)
        except DecodeError as error:
            size = {"height": row["height"].as_py(), "width": row["width"].as_py()}
            decoded.append({**record, **size, "pixels": None, "error": str(error)})
        else:
            size = {"height": image.shape[0], "width": image.shape[1]}
            decoded.append({**record, **size, "pixels": image.tobytes(), "error": None})
    return _one_row(pa.array(decoded, _DECODED_TYPE))


def _row_type(schema: pa.Schema) -> pa.StructType:
    return pa.struct([pa.field(name, schema.field(name).type) for name in schema.names])


class _Scorer:
    """A copy of the model, loaded once, that turns decoded batches into detections."""

    def __init__(self, config: PredictConfig, row_type: pa.StructType) -> None:
        import torch

        from raydet.models import load_detector

        self._config, self._row_type, self._torch = config, row_type, torch
        self._device = torch.device("cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu")
        torch.set_num_threads(config.threads_per_worker or max(1, (os.cpu_count() or 1) // config.num_workers))
        self._detector = load_detector(config.checkpoint)
        self._detector.to(self._device).model.eval()

    def __call__(self, block: pa.Table) -> pa.Table:
        """One decoded batch in, its rows of the detections table out."""
        rows = block["rows"].combine_chunks().values
        images = [
            np.frombuffer(row["pixels"].as_buffer(), np.uint8).reshape(row["height"].as_py(), row["width"].as_py(), 3)
            for row in rows
            if row["error"].as_py() is None
        ]
        detections = iter(self._predict(images) if images else [])
        records = [self._record(row, detections) for row in rows]
        return _one_row(pa.array(records, self._row_type))

    def _predict(self, images: list[npt.NDArray[np.uint8]]) -> "list[Detections]":
        from raydet.collate import Example, collate
        from raydet.geometry import resize

        torch, rule = self._torch, self._detector.resize_rule
        nothing = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        examples = []
        for number, image in enumerate(images):
            size_hw = (image.shape[0], image.shape[1])
            resized = resize(image, rule.target_size_hw(size_hw), rule.resample)
            examples.append(Example(number, resized, size_hw, *nothing))
        batch = collate(examples, pad_to_hw=rule.pad_to_hw).to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16"):
            return self._detector.predict(batch)

    def _record(self, row: pa.StructScalar, detections: "Iterator[Detections]") -> dict[str, Any]:
        record = {name: row[name].as_py() for name in ("image_id", "path", "width", "height", "error")}
        if record["error"] is not None:
            return {**record, "detections": {"bbox": [], "score": [], "category": []}}
        found = next(detections)
        keep = found.scores > self._config.score_threshold
        return {
            **record,
            "detections": {
                "bbox": found.boxes_xywh[keep].tolist(),
                "score": found.scores[keep].tolist(),
                "category": found.categories[keep].tolist(),
            },
        }


def _write_part(blocks: pa.Table, out: str, schema: pa.Schema) -> pa.Table:
    """Writes the rows of some batches into one file, whole or not at all; the same rows always get the same name."""
    rows = blocks["rows"].combine_chunks().values
    table = pa.Table.from_struct_array(rows).cast(schema)
    digest = hashlib.sha256(table["image_id"].to_numpy().tobytes()).hexdigest()[:16]
    name = f"part-{digest}.parquet"
    # In the footer, so that counting a finished run reads no detections.
    counts = {
        "num_errors": table.num_rows - table["error"].null_count,
        "num_detections": pc.sum(pc.list_value_length(pc.struct_field(table["detections"], "score"))).as_py() or 0,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({**schema.metadata, COUNTS_KEY: json.dumps(counts)}), sink)
    storage.write_bytes(storage.join(out, name), sink.getvalue().to_pybytes())
    return pa.table({"file": [name], "num_rows": [table.num_rows]})


def _finish(config: PredictConfig, table: Table) -> None:
    """Counts what was written against what was asked for and declares the table whole."""
    filesystem, path = storage.resolve(config.out)
    rows_by_file: dict[str, int] = {}
    totals = {"num_errors": 0, "num_detections": 0}
    for name in _parts(config.out):
        footer = pq.read_metadata(f"{path}/{name}", filesystem=filesystem)
        rows_by_file[name] = footer.num_rows
        for key, count in json.loads(footer.metadata[COUNTS_KEY]).items():
            totals[key] += count
    num_rows = sum(rows_by_file.values())
    assert num_rows == table.num_rows, f"{num_rows} rows were written for {table.num_rows} images"
    write_manifest(config.out, rows_by_file, config_hash=config_hash(config), **totals)


def _result(out: str, *, already_done: bool = False) -> PredictResult:
    manifest = json.loads(storage.read_bytes(storage.join(out, MANIFEST_NAME)))
    return PredictResult(
        out, manifest["num_rows"], manifest["num_errors"], manifest["num_detections"], already_done=already_done
    )
