"""`raydet prepare`: a source of images → an images table, and what could not be taken → OUT/_rejected.

Every image is read and decoded once, so that what the table holds can be read and has the size it says. Threads do
that (Pillow lets go of the interpreter), a few images ahead of the writer: memory does not grow with the data set,
and the rows keep the source's order.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import rich.console
import rich.progress

from raydet import storage
from raydet.config import (
    PrepareCocoConfig,
    PrepareImagesConfig,
    PrepareShapesConfig,
    PrepareVocConfig,
    PrepareYoloConfig,
    config_hash,
)
from raydet.decode import DecodeError, decode, orientation
from raydet.errors import UserError
from raydet.schema import build_schema
from raydet.sources import ImageFolder, ReadError, Source, SourceImage, SourceObjects, shapes
from raydet.sources.coco import read_coco
from raydet.sources.fitting import fit_objects
from raydet.sources.images import read_images
from raydet.sources.voc import read_voc
from raydet.sources.yolo import read_yolo
from raydet.sources.yolo_files import find_in_data_yaml, find_in_folders
from raydet.tables import MANIFEST_NAME, TableWriter, is_table

REJECTED_FOLDER = "_rejected"
"""Below the images table: a table of its own, of paths and reasons."""

_MARK_NAME = "_preparing.json"
"""Lies in OUT while a table is being written: what a killed run leaves can be told from the user's own files."""

_MARK = re.escape(_MARK_NAME)
_MANIFEST = re.escape(MANIFEST_NAME)
_REMAINS_BEFORE_MARK = re.compile(rf"\.{_MARK}\.\d+\.partial")
_REMAINS = re.compile(
    rf"{_MARK}|({REJECTED_FOLDER}/)?(part-\d{{5,}}\.parquet|\.({_MARK}|{_MANIFEST})\.\d+\.partial)"
    rf"|{REJECTED_FOLDER}/{_MANIFEST}"
)

_ROWS_AT_ONCE = 64
_BYTES_AT_ONCE = 4 * 2**20
_IMAGES_AHEAD_PER_THREAD = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` found and wrote.

    Attributes:
        out: Where the table is.
        already_done: The table was there before, made by the same configuration; nothing was done.
        found: Images that the source names; always accepted + rejected.
        accepted: Rows of the table.
        rejected: Rows of OUT/_rejected.
        without_boxes: Accepted images that have no box.
        boxes: Boxes in the table, crowds included.
        crowd_boxes: Those that stand for a crowd.
        clipped: Boxes that ran out of their image and were cut to it.
        dropped: Boxes without area, or with none inside their image, that were left out.
        rotated: Accepted images whose boxes were turned, since they were drawn before the EXIF rotation.
        size_mismatches: Other accepted images whose size is not the one stated in the annotations.
        boxes_by_class: Boxes of each class, by its name.
        reasons: Rejected images by reason.
        findings: What else was odd in the annotations, and how often.
        tables: The tables written, by the names of the splits; empty where there is but one, in `out`.
    """

    out: str
    already_done: bool = False
    found: int = 0
    accepted: int = 0
    rejected: int = 0
    without_boxes: int = 0
    boxes: int = 0
    crowd_boxes: int = 0
    clipped: int = 0
    dropped: int = 0
    size_mismatches: int = 0
    rotated: int = 0
    boxes_by_class: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    findings: Mapping[str, int] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in a few plain lines."""
        where = f" (listed in {storage.join(self.out, REJECTED_FOLDER)})" if self.rejected else ""
        lines = [f"{self.found:,} images found, {self.accepted:,} accepted, {self.rejected:,} rejected{where}"]
        lines += [f"  rejected, {reason}: {count:,}" for reason, count in list(self.reasons.items())[:5]]
        if len(self.reasons) > 5:
            lines.append(f"  … and {len(self.reasons) - 5} further reasons")
        if self.boxes_by_class:
            crowds = f", {self.crowd_boxes:,} of them crowds" if self.crowd_boxes else ""
            empty = f"; {self.without_boxes:,} images have none" if self.without_boxes else ""
            lines.append(f"{self.boxes:,} boxes of {len(self.boxes_by_class)} classes{crowds}{empty}")
            ranked = sorted(self.boxes_by_class.items(), key=lambda item: -item[1])
            shown = ", ".join(f"{name} {count:,}" for name, count in ranked[:10])
            lines.append(f"  {shown}{' …' if len(ranked) > 10 else ''}")
        notes = {
            "boxes cut to their image": self.clipped,
            "boxes without area left out": self.dropped,
            "images of another size than the annotations say": self.size_mismatches,
            "images whose boxes were turned upright with them": self.rotated,
            **self.findings,
        }
        lines += [f"  {text}: {count:,}" for text, count in notes.items() if count]
        done = "already there, made by the same configuration: " if self.already_done else ""
        lines.append(f"{done}{', '.join(self.tables.values()) or self.out}")
        return lines


@dataclass(frozen=True)
class _Row:
    """A finished row of the images table, with what has to be counted about it."""

    values: dict[str, Any]
    num_clipped: int = 0
    num_dropped: int = 0
    is_size_mismatch: bool = False
    is_rotated: bool = False


@dataclass(frozen=True)
class _Rejected:
    path: str
    reason: str


def prepare_coco(config: PrepareCocoConfig) -> PrepareReport:
    """Makes an images table of a COCO instances file and its images.

    Boxes are taken to refer to the upright image, as annotation tools show it. Where the JSON states the size that the
    file has before its EXIF rotation by a quarter turn, they were drawn on the unturned image, and are turned with it.
    Any other disagreement about the size is counted and leaves the boxes as they are. Boxes that run out of the upright
    image are cut to it, boxes without area left out; both are counted.

    Raises:
        UserError: The annotations or the folder are missing or wrong, no image can be read, or OUT holds other things.
    """
    done = _already_done(config.out, config)
    if done is not None:
        return done
    folder = ImageFolder(config.images)
    return _write_files(config, read_coco(config.annotations, folder), folder)


def prepare_voc(config: PrepareVocConfig) -> PrepareReport:
    """Makes an images table of Pascal VOC XML files and their images; `raydet.sources.voc` says how they are read.

    Boxes are taken to refer to the upright image, or are turned with it, as in `prepare_coco`.

    Raises:
        UserError: A folder or the split is missing or wrong, no class is named, no image can be read, or OUT holds
            other things.
    """
    done = _already_done(config.out, config)
    if done is not None:
        return done
    folder = ImageFolder(config.images)
    source = read_voc(
        ImageFolder(config.annotations, what="annotation"),
        folder,
        split_uri=config.split,
        classes=config.classes,
        zero_based=config.zero_based,
    )
    return _write_files(config, source, folder)


def prepare_yolo(config: PrepareYoloConfig) -> PrepareReport:
    """Makes an images table of images and label files in YOLO's formats; `raydet.sources.yolo` says how they are read.

    Boxes are parts of the upright image, as Ultralytics takes them.

    Raises:
        UserError: data.yaml, a folder or a list is missing or wrong, no image has a label file, no image can be read,
            or OUT holds other things.
    """
    done = _already_done(config.out, config)
    if done is not None:
        return done
    if config.data is not None:
        files = find_in_data_yaml(config.data, config.split)
    else:
        assert config.images is not None and config.labels is not None and config.classes is not None
        files = find_in_folders(config.images, config.labels, config.classes)
    return _write_files(config, read_yolo(files), files.images)


def prepare_images(config: PrepareImagesConfig) -> PrepareReport:
    """Makes an images table, without boxes, of all image files below a folder.

    Raises:
        UserError: The folder is missing, holds no image that can be read, or OUT holds other things.
    """
    done = _already_done(config.out, config)
    if done is not None:
        return done
    folder = ImageFolder(config.images)
    return _write_files(config, read_images(folder), folder)


def prepare_shapes(config: PrepareShapesConfig) -> PrepareReport:
    """Draws two images tables, OUT/train and OUT/val; the report counts both together.

    Raises:
        UserError: OUT/train or OUT/val holds other things.
    """
    sizes: dict[shapes.Split, int] = {"train": config.num_train, "val": config.num_val}
    tables = {split: storage.join(storage.absolute_uri(config.out), split) for split in sizes}
    done = {split: _already_done(tables[split], config) for split in sizes}
    reports = []
    for split, num_images in sizes.items():
        source = Source(
            images=(SourceImage(index, f"{split}/{index:06d}.jpg") for index in range(num_images)),
            num_images=num_images,
            categories=shapes.CATEGORIES,
        )
        make_row = partial(_draw_row, split=split, config=config)
        report = done[split] or _write_tables(tables[split], config, source, make_row, config.num_threads)
        reports.append(report)
    return _sum_reports(config.out, reports, tables)


def _write_files(config: PrepareImagesConfig | PrepareYoloConfig, source: Source, folder: ImageFolder) -> PrepareReport:
    make_row = partial(_read_row, folder=folder, inline=config.image_storage == "inline", max_pixels=config.max_pixels)
    return _write_tables(config.out, config, source, make_row, config.num_threads)


def _sum_reports(out: str, reports: Sequence[PrepareReport], tables: Mapping[Any, str]) -> PrepareReport:
    values: dict[str, Any] = {}
    for name, value in asdict(reports[0]).items():
        parts = [getattr(report, name) for report in reports]
        if isinstance(value, dict):
            values[name] = dict(sum((Counter(part) for part in parts), Counter()))
        elif isinstance(value, int) and not isinstance(value, bool):
            values[name] = sum(parts)
    already_done = all(report.already_done for report in reports)
    return PrepareReport(**{**values, "out": storage.absolute_uri(out), "already_done": already_done, "tables": tables})


def _read_row(image: SourceImage, *, folder: ImageFolder, inline: bool, max_pixels: int) -> _Row | _Rejected:
    """Reads and decodes one image; runs in a thread."""
    if image.refusal is not None:
        return _Rejected(image.path, image.refusal)
    try:
        data = folder.read(image.path)
        height, width = decode(data, max_pixels=max_pixels).shape[:2]
        size_hw = (height, width)
        is_size_mismatch = image.size_hw not in (None, size_hw)
        turn = orientation(data) if is_size_mismatch and image.size_hw == (width, height) else 1
    except (ReadError, DecodeError) as error:
        return _Rejected(image.path, str(error))
    fitted = fit_objects(image.objects or SourceObjects(), size_hw, turn=turn)
    stored = {"bytes": data, "path": image.path} if inline else {"bytes": None, "path": folder.uri_of(image.path)}
    values = {
        "image_id": image.image_id,
        "image": stored,
        "width": width,
        "height": height,
        "objects": fitted.objects,
        **image.extra,
    }
    is_rotated = turn >= 5
    return _Row(values, fitted.num_clipped, fitted.num_dropped, is_size_mismatch and not is_rotated, is_rotated)


def _draw_row(image: SourceImage, *, split: shapes.Split, config: PrepareShapesConfig) -> _Row:
    """Draws one image; runs in a thread."""
    drawn = shapes.draw(config.seed, split, image.image_id, image_size=config.image_size, max_shapes=config.max_shapes)
    fitted = fit_objects(drawn.objects, (config.image_size, config.image_size))
    values = {
        "image_id": image.image_id,
        "image": {"bytes": shapes.encode(drawn.pixels), "path": image.path},
        "width": config.image_size,
        "height": config.image_size,
        "objects": fitted.objects,
    }
    return _Row(values)


def _write_tables(
    out: str,
    config: Any,
    source: Source,
    make_row: Callable[[SourceImage], _Row | _Rejected],
    num_threads: int | None,
) -> PrepareReport:
    """Writes OUT and OUT/_rejected; when anything goes wrong, nothing of them is left."""
    out = storage.absolute_uri(out)
    rejected_uri = storage.join(out, REJECTED_FOLDER)
    hash_ = config_hash(config)
    schema = build_schema("images", source.categories, extra_fields=source.extra_fields)
    started = time.monotonic()
    _remove_remains(out)
    try:
        storage.write_bytes(storage.join(out, _MARK_NAME), json.dumps({"config_hash": hash_}).encode())
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
    try:
        with TableWriter(out, schema, config_hash=hash_) as writer:
            with TableWriter(rejected_uri, build_schema("rejected"), config_hash=hash_) as rejected_writer:
                results = _map_in_order(make_row, source.images, num_threads)
                shown = _with_progress(results, source.num_images, f"preparing {out}")
                report = _write_rows(shown, writer, rejected_writer, source, out)
                if not report.accepted:
                    reasons = "; ".join(f"{reason}: {count}" for reason, count in list(report.reasons.items())[:3])
                    raise UserError(f"none of the {report.found} images can be read ({reasons})")
            counts = asdict(report)
            del counts["out"], counts["already_done"], counts["tables"]
            writer.extra = {"prepare": counts, "seconds": round(time.monotonic() - started, 3)}
    except BaseException:
        _remove_remains(out)
        raise
    filesystem, path = storage.resolve(out)
    filesystem.delete_file(f"{path}/{_MARK_NAME}")
    return report


def _write_rows(
    results: Iterable[_Row | _Rejected],
    writer: TableWriter,
    rejected_writer: TableWriter,
    source: Source,
    out: str,
) -> PrepareReport:
    counts: Counter[str] = Counter()
    by_category = [0] * len(source.categories)
    reasons: Counter[str] = Counter()
    pending: list[dict[str, Any]] = []
    pending_bytes = 0
    for result in results:
        counts["found"] += 1
        if isinstance(result, _Rejected):
            reasons[result.reason] += 1
            rejected_writer.write_rows([asdict(result)])
            continue
        _count_row(result, counts, by_category)
        pending.append(result.values)
        pending_bytes += len(result.values["image"]["bytes"] or b"")
        if len(pending) >= _ROWS_AT_ONCE or pending_bytes >= _BYTES_AT_ONCE:
            writer.write_rows(pending)
            pending, pending_bytes = [], 0
    writer.write_rows(pending)
    names = [category.name for category in source.categories]
    numbers: dict[str, Any] = dict(counts)
    return PrepareReport(
        out=out,
        rejected=reasons.total(),
        boxes_by_class=dict(zip(names, by_category, strict=True)),
        reasons=dict(reasons.most_common()),
        findings=dict(source.findings),
        **numbers,
    )


def _count_row(row: _Row, counts: Counter[str], by_category: list[int]) -> None:
    objects = row.values["objects"]
    counts["accepted"] += 1
    counts["without_boxes"] += not objects["id"]
    counts["boxes"] += len(objects["id"])
    counts["crowd_boxes"] += sum(objects["iscrowd"])
    counts["clipped"] += row.num_clipped
    counts["dropped"] += row.num_dropped
    counts["size_mismatches"] += row.is_size_mismatch
    counts["rotated"] += row.is_rotated
    for category in objects["category"]:
        by_category[category] += 1


def _map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int | None
) -> Iterator[Result]:
    """Applies a function in threads and yields the results in the items' order, never far ahead of the reader."""
    num_threads = num_threads or os.cpu_count() or 1
    window: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="prepare") as pool:
        try:
            for item in items:
                window.append(pool.submit(function, item))
                if len(window) >= num_threads * _IMAGES_AHEAD_PER_THREAD:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            for future in window:
                future.cancel()


def _with_progress(results: Iterator[Result], total: int, description: str) -> Iterator[Result]:
    """Shows a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield from results
        return
    console = rich.console.Console(stderr=True)
    yield from rich.progress.track(results, description=description, total=total, console=console, transient=True)


def _already_done(out: str, config: Any) -> PrepareReport | None:
    """The report of the whole table in OUT if this configuration made it; None if OUT is free to be written.

    Raises:
        UserError: OUT holds another table, or files that are not raydet's.
    """
    out = storage.absolute_uri(out)
    if is_table(out):
        manifest = json.loads(storage.read_bytes(storage.join(out, MANIFEST_NAME)))
        if manifest.get("config_hash") != config_hash(config) or "prepare" not in manifest:
            raise UserError(f"{out} already holds another table; choose another --out or remove it")
        return PrepareReport(out=out, already_done=True, **manifest["prepare"])
    _remains(out)
    return None


def _remains(out: str) -> list[str]:
    """What a killed run left in OUT, as paths relative to it, the mark last.

    Raises:
        UserError: There are files that `prepare` did not write.
    """
    try:
        names = storage.list_files(out)
        names += [f"{REJECTED_FOLDER}/{name}" for name in storage.list_files(storage.join(out, REJECTED_FOLDER))]
    except NotADirectoryError:
        raise UserError(f"{out} is a file; --out must name a folder") from None
    ours = _REMAINS if _MARK_NAME in names else _REMAINS_BEFORE_MARK
    others = [name for name in names if not ours.fullmatch(name)]
    if others:
        raise UserError(f"{out} holds files that are not raydet's, such as {others[0]}; choose another --out")
    return sorted(names, key=lambda name: name == _MARK_NAME)


def _remove_remains(out: str) -> None:
    """Removes what a run left in OUT, and its folders where nothing else is in them."""
    filesystem, path = storage.resolve(out)
    for name in _remains(out):
        filesystem.delete_file(f"{path}/{name}")
    for folder in (f"{path}/{REJECTED_FOLDER}", path):
        if storage.is_local(out):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
