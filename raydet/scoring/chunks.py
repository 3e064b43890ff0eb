"""Decoded blocks of a chunk → detections → the chunk's file."""

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydet.cluster.stopwatch import ProcessStats, Stopwatch
from raydet.common.errors import UserError
from raydet.engines.loading import load_adapted_engines, resize_rule_before
from raydet.models.checkpoints import fingerprint
from raydet.models.geometry import ResizeRule
from raydet.scoring.blocks import images_in, planes_in
from raydet.scoring.kept import kept_columns, query_numbers
from raydet.scoring.plan import COUNTS_KEY, ChunkStats, FileCounts, Work, part_name, table_uri
from raydet.tables import storage
from raydet.tables.kept.columns import QUERIES_COLUMN
from raydet.tables.layout import groups_of
from raydet.tables.schema import THUMBNAIL_COLUMN
from raydet.tables.table import ROW_GROUP_BYTES

_MOST_ROWS_PER_GROUP = 2**14
"""Fewer than 2²⁶ numbers in a column, even with 900 detections per image: readers refuse more."""
_LOG = logging.getLogger(__name__)

_Found = list[Any]
"""`Detections` of several images; importing their class would import torch."""
_Upcoming = Future[tuple[list[_Found], ProcessStats]]
"""Detections of the images of a block by each engine, and the time that they took."""


def unreadable_in(uri: str, names: Iterable[str]) -> dict[str, str]:
    """Return the reason by path of each image without detections in some files of a detections table."""
    found: dict[str, str] = {}
    for name in names:
        filesystem, path = storage.resolve(storage.join(uri, name))
        rows = pq.read_table(path, filesystem=filesystem, columns=["path", "error"], partitioning=None)
        found |= {row["path"]: row["error"] for row in rows.filter(rows["error"].is_valid()).to_pylist()}
    return found


class ChunkScorer:
    """A copy of the model, with all adapters, that scores chunks; several threads may call `score` for different ones.

    The model loads in a thread, so that the first blocks are decoded meanwhile. All forward passes run in that thread,
    since each calling thread would get its own pool of compute threads. While the model runs on a block, the calling
    threads batch the next one, convert the previous one to Arrow, or write a file.

    Attributes:
        rule: Resize rule of the model, once it is known; None if the model takes images at full size. `result()` raises
            UserError if the model cannot be read.
    """

    def __init__(self, work: Work, *, device: str, num_threads: int) -> None:
        self._work, self._device, self._num_threads = work, device, num_threads
        self.rule: Future[ResizeRule | None] = Future()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._scorer = self._thread.submit(self._load)
        self._is_closed = threading.Event()

    def _load(self) -> Any:
        work = self._work
        try:
            expected = {
                work.model_name: work.model_fingerprint,
                **{each.uri: each.fingerprint for each in work.adapters},
            }
            for name, value in expected.items():
                if fingerprint(name) != value:
                    raise UserError(f"{name} changed during the run; restore the model and run the same command again")
            self.rule.set_result(resize_rule_before(work.config))
        except BaseException as error:
            self.rule.set_exception(error)
            raise
        from raydet.engines.scorer import Scorer

        started = time.perf_counter()
        place: Any = {"device": self._device, "num_threads": self._num_threads}
        if work.adapters:
            engines = load_adapted_engines(work.config, work.adapters, **place)
        else:
            engines = [work.load_engine(work.config, **place)]
        text = "model loaded on %s in %.1f s, %d threads"
        _LOG.info(text, self._device, time.perf_counter() - started, self._num_threads)
        first, *others = engines
        return Scorer(first, work.config, batch_size=work.plan.batch_size, point=work.point, others=others)

    def close(self) -> None:
        """Stop: drop what has not started; the next block of each chunk in flight raises an error."""
        self._is_closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def score(self, chunk: int, blocks: Iterable[tuple[pa.Table, ProcessStats]]) -> ChunkStats:
        """Score a chunk and write its files, each atomically; `blocks` is the result of `blocks_of` for its rows."""
        processes: list[ProcessStats] = []
        schemas = self._work.schemas
        tables: dict[str, list[pa.Table]] = {name: [] for name in schemas}
        waiting: tuple[pa.Table, _Upcoming] | None = None

        def finish(block: pa.Table, upcoming: _Upcoming) -> None:
            found, stats = upcoming.result()
            processes.append(stats)
            for (name, schema), detections in zip(schemas.items(), found, strict=True):
                tables[name].append(rows_of(block, detections, schema))

        for block, stats in blocks:
            if self._is_closed.is_set():
                raise InterruptedError("the run is ending")
            processes.append(stats)
            upcoming = block, self._thread.submit(self._predict, self._prepare(block))
            if waiting is not None:
                finish(*waiting)
            waiting = upcoming
        if waiting is not None:
            finish(*waiting)
        return write_chunk(
            self._work, chunk, {name: pa.concat_tables(parts) for name, parts in tables.items()}, processes
        )

    def _prepare(self, block: pa.Table) -> Any:
        scorer, rule = self._scorer.result(), self.rule.result()
        sizes_hw, pixels = images_in(block)
        if rule is None or self._work.config.resize_on == "device":
            images = [flat.reshape(*size_hw, 3) for flat, size_hw in zip(pixels, sizes_hw, strict=True)]
            return scorer.prepare(images)
        planes = [
            planes_in(flat, size_hw, self._work.config, rule) for flat, size_hw in zip(pixels, sizes_hw, strict=True)
        ]
        return scorer.prepare_resized(sizes_hw, planes)

    def _predict(self, prepared: Any) -> tuple[list[_Found], ProcessStats]:
        watch = Stopwatch("model")
        with watch.measuring("model"):
            found = self._scorer.result().predict_each(prepared)
        return found, watch.lap()


def write_chunk(
    work: Work, chunk: int, tables: Mapping[str, pa.Table], processes: Sequence[ProcessStats] = ()
) -> ChunkStats:
    """Write the file of a chunk in each table, each atomically.

    Args:
        work: Work of the run.
        chunk: Number of the chunk.
        tables: Its rows in each table, by the table's folder.
        processes: The work that the rows took.
    """
    watch = Stopwatch("writer")
    first = next(iter(tables.values()))
    errors = [reason for reason in first["error"].to_pylist() if reason is not None]
    with watch.measuring("write"):
        counts = tuple(_write_file(work, chunk, name, table, len(errors)) for name, table in tables.items())
    return ChunkStats(
        file=part_name(chunk),
        num_images=first.num_rows,
        num_detections=sum(each.num_detections for each in counts),
        errors=errors,
        processes=[*processes, watch.lap()],
        counts=counts,
    )


def _write_file(work: Work, chunk: int, name: str, table: pa.Table, num_errors: int) -> FileCounts:
    lengths = pc.list_value_length(pc.struct_field(table["detections"], "score"))
    num_detections = pc.sum(lengths).as_py() or 0
    # In the footer, so that a resumed run counts the rows of finished files without reading detections.
    counts = {"num_errors": num_errors, "num_detections": num_detections}
    metadata = {**work.schemas[name].metadata, COUNTS_KEY: json.dumps(counts)}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, **_options_of(table))
    content = sink.getvalue()
    groups = groups_of(pq.read_metadata(pa.BufferReader(content)))
    storage.write_bytes(storage.join(table_uri(work.folder, name), part_name(chunk)), content.to_pybytes())
    return FileCounts(groups, num_errors, num_detections)


def rows_of(block: pa.Table, found: Sequence[Any], schema: pa.Schema) -> pa.Table:
    """Build the rows of a block from the detections of its readable images."""
    is_readable = pc.is_valid(block["pixel_height"]).to_numpy(zero_copy_only=False)
    counts = np.zeros(block.num_rows, np.int64)
    counts[is_readable] = [len(one.scores) for one in found]
    boxes, scores, categories = np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64)
    if found:
        boxes = np.concatenate([one.boxes_xywh for one in found])
        scores = np.concatenate([one.scores for one in found])
        categories = np.concatenate([one.categories for one in found])
        boxes = _at_full_size(block, boxes, counts)
    offsets = pa.array(np.concatenate([[0], counts.cumsum()]), pa.int32())
    values = {
        "bbox": pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1), pa.float64()), 4),
        "score": pa.array(scores, pa.float64()),
        "category": pa.array(categories, pa.int64()),
    }
    columns = {name: block[name] for name in schema.names if name in block.schema.names}
    if QUERIES_COLUMN in schema.names:
        values["query"] = query_numbers(found)
        columns |= kept_columns(found, boxes, is_readable, schema)
    fields = list(schema.field("detections").type)
    lists = [pa.ListArray.from_arrays(offsets, values[field.name]) for field in fields]
    columns["detections"] = pa.StructArray.from_arrays(lists, fields=fields)
    return pa.table(columns).select(schema.names).cast(schema)


def _options_of(table: pa.Table) -> dict[str, Any]:
    """Return the options of `pq.write_table` for a chunk."""
    if QUERIES_COLUMN not in table.schema.names:
        return {"row_group_size": _MOST_ROWS_PER_GROUP}
    # Vectors are large and do not repeat.
    num_rows = max(1, table.num_rows * ROW_GROUP_BYTES // max(1, table.nbytes))
    # Pixels have few values, and plain they would take four bytes each.
    pixels = [f"{THUMBNAIL_COLUMN}.list.element"] if THUMBNAIL_COLUMN in table.schema.names else False
    return {"row_group_size": min(num_rows, _MOST_ROWS_PER_GROUP), "use_dictionary": pixels}


def _at_full_size(block: pa.Table, boxes_xywh: Any, counts: Any) -> Any:
    """Scale the boxes of images that were decoded at reduced size to pixels of the full-size images."""
    sizes = [block[name].to_numpy().astype(np.float64) for name in ("width", "height", "pixel_width", "pixel_height")]
    width, height, pixel_width, pixel_height = (np.repeat(size, counts) for size in sizes)
    is_reduced = (width != pixel_width) | (height != pixel_height)
    if is_reduced.any():
        scale = np.stack([width / pixel_width, height / pixel_height] * 2, axis=1)
        boxes_xywh = np.where(is_reduced[:, None], boxes_xywh * scale, boxes_xywh)
    return boxes_xywh
