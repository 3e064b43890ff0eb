"""Truth and detections, as tables or as COCO JSON → COCO's numbers, on the screen and as metrics tables."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs as pafs

from raydet import storage
from raydet.config import EvaluateConfig, config_hash
from raydet.errors import UserError
from raydet.metrics import (
    FALSE_POSITIVE,
    METRICS,
    NOT_COUNTED,
    TRUE_POSITIVE,
    CocoAccumulator,
    CocoResult,
    Flags,
    Floats,
    ImageDetections,
    ImageTruth,
    Integers,
    match_image,
)
from raydet.schema import build_schema, parse_metadata
from raydet.tables import MANIFEST_NAME, TableWriter, is_table, open_table
from raydet.truth import DetectionColumns, Truth, is_json, read_detections_table, read_results_json, read_truth

_IMAGES_PER_SHARD = 20_000
_PER_IMAGE_IOU = 0.5
_CLASS_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        result: COCO's numbers.
        out: The folder with the tables `metrics` and `per_image`; None where none was asked for.
    """

    result: CocoResult
    out: str | None

    def lines(self) -> list[str]:
        """The numbers as text: COCO's twelve, then those of each class; "–" where there is nothing to measure."""
        result = self.result
        lines = [f"{result.num_images:,} images, {result.num_truth:,} boxes, {result.num_detections:,} detections"]
        if result.num_unreadable:
            lines.append(f"{result.num_unreadable:,} images could not be read; their boxes count as missed")
        rows = [("", "", "IoU", "area", "detections")]
        for metric in METRICS:
            iou = ".50:.95" if metric.iou is None else f"{metric.iou:.2f}".lstrip("0")
            number = _format(getattr(result, metric.name))
            rows.append((metric.name, number, iou, metric.area, str(metric.max_detections)))
        lines += ["", *_aligned(rows)]
        rows_by_class: list[tuple[str, ...]] = [("class", *_CLASS_COLUMNS)]
        for category, numbers in zip(result.categories, result.per_class, strict=True):
            rows_by_class.append((category.name, *(_format(getattr(numbers, name)) for name in _CLASS_COLUMNS)))
        lines += ["", *_aligned(rows_by_class)]
        if self.out is not None:
            lines += ["", f"metrics: {self.out}"]
        return lines


def _format(value: float) -> str:
    return "–" if value == -1 else f"{value:.3f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with the first column flush left and the others flush right."""
    first_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths, strict=True)]
        lines.append("  ".join([first.ljust(first_width), *cells]))
    return lines


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measures detections against the truth by COCO's rules.

    The numbers equal pycocotools' to the last bit, for tables and JSON alike, whatever the order of the rows and the
    number of shards. Of several detections with one score in an image, the one that stands first is matched first.
    With `config.out`, the tables OUT/metrics and OUT/per_image are written once everything is computed.

    Raises:
        UserError: An input is missing, damaged or not what it should be, or does not fit the other, or `config.out`
            holds something else. Nothing has been written then.
    """
    config = dataclasses.replace(
        config,
        truth=storage.absolute_uri(config.truth),
        detections=storage.absolute_uri(config.detections),
        out=None if config.out is None else storage.absolute_uri(config.out),
    )
    if config.out is not None:
        _check_out(config.out, config_hash(config))
    truth = read_truth(config.truth)
    if is_json(config.detections, "detections", "a detections table or COCO results JSON"):
        model, batches = None, iter([read_results_json(config.detections, truth)])
    else:
        table = open_table(config.detections, "detections")
        model = parse_metadata(table.schema, kind="detections", where=table.uri).get("checkpoint")
        batches = read_detections_table(table, truth)
    per_image = None if config.out is None else _PerImage()
    result = _match(truth, batches, config.num_shards, per_image)
    if config.out is not None and per_image is not None:
        names = (
            config.run or _name_of(config.detections),
            config.model or model,
            config.split or _name_of(config.truth),
        )
        _write(config.out, config_hash(config), names, result, per_image)
    return Evaluation(result, config.out)


def _name_of(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1].removesuffix(".json")


def _match(
    truth: Truth, batches: Iterator[DetectionColumns], num_shards: int | None, per_image: "_PerImage | None"
) -> CocoResult:
    """Streams the detections past the truth; each shard takes a range of image ids, and their states are merged."""
    num_images = len(truth.image_ids)
    if num_shards is None:
        num_shards = -(-num_images // _IMAGES_PER_SHARD)
    shards = [CocoAccumulator(truth.categories) for _ in range(min(num_shards, num_images))]
    row_of = {image_id: row for row, image_id in enumerate(truth.image_ids.tolist())}
    shard_of = np.empty(num_images, dtype=np.int64)
    shard_of[np.argsort(truth.image_ids)] = np.arange(num_images) * len(shards) // num_images
    for batch in batches:
        for position, image_id in enumerate(batch.image_ids.tolist()):
            row = row_of[image_id]
            boxes, detections, error = truth.image(row), batch.image(position), batch.errors[position]
            height, width = truth.sizes_hw[row].tolist()
            shards[shard_of[row]].add(image_id, (height, width), boxes, detections, unreadable=error is not None)
            if per_image is not None:
                per_image.add(image_id, boxes, detections, error)
    first, *others = shards
    for shard in others:
        first.merge(shard.to_bytes())
    return first.result()


class _PerImage:
    """Right, wrong and missed of each image, at one score threshold for all: the one with the highest F1 overall."""

    def __init__(self) -> None:
        self._image_ids: list[int] = []
        self._num_truth: list[int] = []
        self._errors: list[str | None] = []
        self._scores: list[Floats] = []
        self._outcomes: list[npt.NDArray[np.int8]] = []

    def add(self, image_id: int, truth: ImageTruth, detections: ImageDetections, error: str | None) -> None:
        self._image_ids.append(image_id)
        self._num_truth.append(int((~truth.iscrowd).sum()))
        self._errors.append(error)
        self._scores.append(detections.scores)
        self._outcomes.append(match_image(truth, detections, _PER_IMAGE_IOU))

    def table(self, run: str) -> tuple[pa.RecordBatch, float]:
        """The rows by rising image id, and the score threshold (detections at or above it are counted)."""
        scores, outcomes = np.concatenate(self._scores), np.concatenate(self._outcomes)
        num_truth = np.array(self._num_truth, dtype=np.int64)
        threshold = _best_threshold(scores, outcomes, int(num_truth.sum()))
        image_of = np.repeat(np.arange(len(num_truth)), [len(item) for item in self._scores])

        def count(chosen: Flags) -> Integers:
            return np.bincount(image_of[chosen & (scores >= threshold)], minlength=len(num_truth))

        right, wrong = count(outcomes == TRUE_POSITIVE), count(outcomes == FALSE_POSITIVE)
        num_compared = right + wrong + num_truth
        f1 = np.divide(2 * right, num_compared, out=np.zeros(len(num_truth)), where=num_compared > 0)
        schema = build_schema("per_image", extra_metadata={"iou": _PER_IMAGE_IOU, "score_threshold": threshold})
        columns = {
            "run": pa.array([run] * len(num_truth)),
            "image_id": pa.array(self._image_ids),
            "num_truth": pa.array(num_truth),
            "num_detections": pa.array(count(np.ones(len(scores), dtype=bool))),
            "true_positives": pa.array(right),
            "false_positives": pa.array(wrong),
            "false_negatives": pa.array(num_truth - right),
            "f1": pa.array(f1, mask=num_compared == 0),
            "error": pa.array(self._errors, pa.string()),
        }
        batch = pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)
        return batch.take(pa.array(np.argsort(self._image_ids))), threshold


def _best_threshold(scores: Floats, outcomes: npt.NDArray[np.int8], num_truth: int) -> float:
    """The score with the highest F1 over all images, the higher of several; 0 where no detection is right."""
    counted = outcomes != NOT_COUNTED
    scores, is_right = scores[counted], outcomes[counted] == TRUE_POSITIVE
    if not is_right.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    scores, num_right = scores[order], np.cumsum(is_right[order])
    f1 = 2 * num_right / (np.arange(1, len(scores) + 1) + num_truth)
    is_last_of_equals = np.append(scores[1:] != scores[:-1], True)
    return float(scores[np.argmax(np.where(is_last_of_equals, f1, -1.0))])


def _check_out(out: str, own_hash: str) -> None:
    """Refuses a folder whose tables are not of this very evaluation."""
    for uri in (out, storage.join(out, "metrics"), storage.join(out, "per_image")):
        filesystem, path = storage.resolve(uri)
        if filesystem.get_file_info(path).type == pafs.FileType.File:
            raise UserError(f"{uri} is a file; out must name a folder")
        if uri == out:
            continue
        if is_table(uri):
            manifest = json.loads(storage.read_bytes(storage.join(uri, MANIFEST_NAME)))
            if manifest.get("config_hash") != own_hash:
                raise UserError(f"{uri} holds another evaluation's numbers; choose another out, or delete that folder")
        elif any(not name.endswith(".parquet") for name in storage.list_files(uri, recursive=True)):
            raise UserError(f"{uri} holds files that are not raydet's; choose another out")


def _write(
    out: str, own_hash: str, names: tuple[str, str | None, str], result: CocoResult, per_image: _PerImage
) -> None:
    """Writes both tables; `metrics` goes first and comes last, so while it is there, both are whole."""
    run, model, split = names
    batch, threshold = per_image.table(run)
    for kind in ("metrics", "per_image"):
        storage.delete_folder(storage.join(out, kind))
    with TableWriter(storage.join(out, "per_image"), batch.schema, config_hash=own_hash) as writer:
        writer.extra = {"iou": _PER_IMAGE_IOU, "score_threshold": threshold}
        writer.write(batch)
    schema = build_schema("metrics", result.categories)
    with TableWriter(storage.join(out, "metrics"), schema, config_hash=own_hash) as writer:
        counts = ("num_images", "num_truth", "num_detections", "num_unreadable")
        writer.extra = {name: getattr(result, name) for name in counts}
        writer.write_rows(result.table_rows(run, model, split))
