"""Truth and detections, as tables or as COCO JSON → COCO's numbers, on the screen and as metrics tables."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from raydet import storage
from raydet.boxes import Boxes, as_boxes
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
from raydet.schema import MAX_IMAGE_ID, Category, build_schema, parse_metadata
from raydet.tables import MANIFEST_NAME, Table, TableWriter, is_table, open_table

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
    if _is_json(config.detections, "detections", "a detections table or COCO results JSON"):
        model, batches = None, iter([_read_results_json(config.detections, truth)])
    else:
        table = open_table(config.detections, "detections")
        model = parse_metadata(table.schema, kind="detections", where=table.uri).get("checkpoint")
        batches = _read_detections_table(table, truth)
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


def _is_json(uri: str, what: str, expected: str) -> bool:
    """Whether an input is a JSON file; otherwise it is a folder."""
    filesystem, path = storage.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        raise UserError(f"no such {what}: {uri}; give {expected}")
    if kind == pafs.FileType.File and not path.endswith(".json"):
        raise UserError(f"{uri} is neither a folder nor a .json file; {what} must be {expected}")
    return bool(kind == pafs.FileType.File)


@dataclass(frozen=True)
class Truth:
    """All labelled boxes of a data set, as columns; the boxes of row i are those from starts[i] to starts[i + 1].

    Attributes:
        uri: Where it was read.
        categories: The classes, by their indices.
        image_ids: int64 [I], each once.
        sizes_hw: Pixels, 0 where unknown, int64 [I, 2].
        starts: int64 [I + 1].
        boxes_xywh: Absolute pixels, float64 [N, 4].
        category: Indices, int64 [N].
        area: Square pixels, float64 [N].
        iscrowd: bool [N].
    """

    uri: str
    categories: tuple[Category, ...]
    image_ids: Integers
    sizes_hw: Integers
    starts: Integers
    boxes_xywh: Boxes
    category: Integers
    area: Floats
    iscrowd: Flags

    def __post_init__(self) -> None:
        """Refuses what cannot be measured against."""
        if not self.categories:
            raise UserError(f"{self.uri} has no categories: it holds images without labels")
        if not self.image_ids.size:
            raise UserError(f"{self.uri} holds no image")
        ids, counts = np.unique(self.image_ids, return_counts=True)
        if len(ids) < len(self.image_ids):
            raise UserError(
                f"{self.uri} has image ids more than once, such as {ids[counts > 1][0]}; they must be unique"
            )
        bad = ~np.isfinite(self.boxes_xywh).all(axis=1) | ~np.isfinite(self.area)
        bad |= (self.boxes_xywh[:, 2:] < 0).any(axis=1)
        bad |= (self.category < 0) | (self.category >= len(self.categories))
        if bad.any():
            image_id = np.repeat(self.image_ids, np.diff(self.starts))[bad][0]
            raise UserError(
                f"{self.uri}: {bad.sum()} boxes have a number that is not finite, a negative size or an unknown "
                f"category, such as one in image {image_id}"
            )

    def image(self, row: int) -> ImageTruth:
        """The boxes of one row."""
        of_row = slice(self.starts[row], self.starts[row + 1])
        return ImageTruth(self.boxes_xywh[of_row], self.category[of_row], self.area[of_row], self.iscrowd[of_row])


@dataclass(frozen=True)
class _Detections:
    """Some images with their detections, as columns like those of `Truth`; `category` is in the truth's indices."""

    image_ids: Integers
    starts: Integers
    boxes_xywh: Boxes
    scores: Floats
    category: Integers
    errors: list[str | None]

    def image(self, row: int) -> ImageDetections:
        of_row = slice(self.starts[row], self.starts[row + 1])
        return ImageDetections(self.boxes_xywh[of_row], self.scores[of_row], self.category[of_row])

    def check(self, where: str) -> None:
        """Refuses boxes and scores that mean nothing."""
        boxes, scores = self.boxes_xywh, self.scores
        for bad, what in (
            (~np.isfinite(boxes).all(axis=1), "a box that is not finite (NaN or infinite)"),
            (~np.isfinite(scores), "a score that is not finite (NaN or infinite)"),
            ((boxes[:, 2:] < 0).any(axis=1), "a box of negative width or height; boxes are x, y, width, height"),
            ((scores < 0) | (scores > 1), "a score outside of 0 … 1"),
        ):
            if bad.any():
                image_id = np.repeat(self.image_ids, np.diff(self.starts))[bad][0]
                raise UserError(f"{where}: {bad.sum()} detections have {what}, such as one in image {image_id}")


def _match(
    truth: Truth, batches: Iterator[_Detections], num_shards: int | None, per_image: "_PerImage | None"
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


def read_truth(uri: str) -> Truth:
    """Reads the labels of an images table or of COCO instances JSON, never the pictures.

    Raises:
        UserError: There is no such input, or it is damaged or has no labels.
    """
    uri = storage.absolute_uri(uri)
    if _is_json(uri, "truth", "an images table or COCO instances JSON"):
        return _read_instances_json(uri)
    return _read_images_table(open_table(uri, "images"))


def _read_images_table(table: Table) -> Truth:
    names = ("bbox", "category", "area", "iscrowd")
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for batch in _stream(table, ["image_id", "width", "height", *(f"objects.{name}" for name in names)]):
        lengths, columns = _flatten(batch, "objects", names, table.uri)
        sizes = [pc.fill_null(batch.column(name), 0).to_numpy() for name in ("height", "width")]
        columns |= {
            "image_ids": batch.column("image_id").to_numpy(),
            "sizes": np.stack(sizes, axis=1),
            "lengths": lengths,
        }
        parts.append(columns)
    if not parts:
        raise UserError(f"{table.uri} holds no image")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Truth(
        table.uri,
        table.categories,
        image_ids=whole["image_ids"],
        sizes_hw=whole["sizes"],
        starts=_starts(whole["lengths"]),
        boxes_xywh=whole["bbox"],
        category=whole["category"],
        area=whole["area"],
        iscrowd=whole["iscrowd"],
    )


def _read_detections_table(table: Table, truth: Truth) -> Iterator[_Detections]:
    to_truth = _map_categories(table, truth)
    known = np.sort(truth.image_ids)
    seen = np.zeros(len(known), dtype=bool)
    for batch in _stream(table, ["image_id", "detections", "error"]):
        image_ids = batch.column("image_id").to_numpy()
        positions = _find(image_ids, known, f"{table.uri} has rows of", truth.uri)
        repeated = seen[positions]
        repeated[np.setdiff1d(np.arange(len(positions)), np.unique(positions, return_index=True)[1])] = True
        if repeated.any():
            raise UserError(
                f"{table.uri} has image {image_ids[repeated][0]} more than once; a detections table has one row for "
                "each image"
            )
        seen[positions] = True
        lengths, columns = _flatten(batch, "detections", ("bbox", "score", "category"), table.uri)
        category = columns["category"]
        if category.size and not 0 <= category.min() <= category.max() < len(to_truth):
            raise UserError(
                f"{table.uri} has detections of a category that is not one of its {len(to_truth)} categories"
            )
        errors = batch.column("error").to_pylist()
        rows = _Detections(image_ids, _starts(lengths), columns["bbox"], columns["score"], to_truth[category], errors)
        rows.check(table.uri)
        if (lengths[[error is not None for error in errors]] > 0).any():
            raise UserError(f"{table.uri} has an image with detections although its `error` says it has none")
        yield rows
    if not seen.all():
        raise UserError(
            f"{table.uri} has no row for {(~seen).sum():,} of the {len(known):,} images of {truth.uri}, such as image "
            f"{known[~seen][0]}: predict did not see the same data; run it on this truth"
        )


def _map_categories(table: Table, truth: Truth) -> Integers:
    """For each category of a detections table its index in the truth, by name."""
    names, truth_names = ([category.name for category in side.categories] for side in (table, truth))
    if names == truth_names:
        return np.arange(len(names))
    only_here, only_there = (
        ", ".join(repr(name) for name in first if name not in set(second)) or "none"
        for first, second in ((names, truth_names), (truth_names, names))
    )
    if set(names) != set(truth_names):
        raise UserError(
            f"the categories differ: only in the detections {table.uri}: {only_here}; only in the truth {truth.uri}: "
            f"{only_there}"
        )
    if len(set(names)) < len(names) or len(names) != len(truth_names):
        raise UserError(
            f"{table.uri} and {truth.uri} order their categories differently, and some share a name: they cannot be "
            "told apart; give each category its own name"
        )
    return np.array([truth_names.index(name) for name in names], dtype=np.int64)


def _find(image_ids: Integers, known: Integers, where: str, truth_uri: str) -> Integers:
    """The positions of image ids among the sorted known ones."""
    positions = np.minimum(np.searchsorted(known, image_ids), len(known) - 1)
    unknown = np.unique(image_ids[known[positions] != image_ids])
    if unknown.size:
        raise UserError(
            f"{where} {unknown.size:,} images that the truth {truth_uri} does not have, such as image {unknown[0]}"
        )
    return positions


def _stream(table: Table, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    num_rows = 0
    try:
        for batch in table.iter_batches(columns):
            num_rows += batch.num_rows
            yield batch
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{table.uri} is damaged: {reason}; run the command that writes it again") from None
    if num_rows != table.num_rows:
        raise UserError(f"{table.uri} is damaged: its files have {num_rows} rows, its manifest says {table.num_rows}")


def _flatten(
    batch: pa.RecordBatch, column: str, names: Sequence[str], where: str
) -> tuple[Integers, dict[str, npt.NDArray[Any]]]:
    """The lists in a struct column → the number of elements in each row, and all elements of each list in one array."""
    struct = batch.column(column)
    columns: dict[str, npt.NDArray[Any]] = {}
    lengths: Integers | None = None
    for name in names:
        lists = pc.struct_field(struct, name)
        own = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
        values = lists.flatten()
        numbers = values.flatten() if name == "bbox" else values
        lengths = own if lengths is None else lengths
        if values.null_count or numbers.null_count or not np.array_equal(own, lengths):
            raise UserError(f"{where}: the lists in `{column}` differ in length or hold nulls")
        array = numbers.to_numpy(zero_copy_only=False)
        columns[name] = as_boxes(array) if name == "bbox" else array
    assert lengths is not None
    return lengths, columns


def _starts(lengths: Integers) -> Integers:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _read_instances_json(uri: str) -> Truth:
    content = _read_json(uri)
    if not isinstance(content, dict) or any(
        not isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UserError(
            f"{uri} is no COCO instances JSON: it must be an object with images, annotations and categories"
        )
    images, annotations = content["images"], content["annotations"]
    where = f"{uri}: categories"
    ids = _json_column(content["categories"], "id", _is_integer, "an integer", where)
    names = _json_column(content["categories"], "name", lambda value: isinstance(value, str), "a string", where)
    if len(set(ids)) < len(ids):
        raise UserError(f"{uri} has category ids more than once")
    categories = tuple(sorted((Category(*pair) for pair in zip(ids, names, strict=True)), key=lambda item: item.id))
    image_ids = np.array(_json_column(images, "id", _is_image_id, _IMAGE_ID, f"{uri}: images"), dtype=np.int64)
    where = f"{uri}: annotations"
    image_of = np.array(_json_column(annotations, "image_id", _is_image_id, _IMAGE_ID, where), dtype=np.int64)
    category = _to_indices(
        _json_column(annotations, "category_id", _is_integer, "an integer", where), categories, where
    )
    boxes_xywh = as_boxes(_json_column(annotations, "bbox", _is_box, "four numbers: x, y, width, height", where))
    sizes = [[size if _is_image_id(size) else 0 for size in (item.get("height"), item.get("width"))] for item in images]
    area = [
        item["area"] if _is_number(item.get("area")) else width * height
        for item, (width, height) in zip(annotations, boxes_xywh[:, 2:].tolist(), strict=True)
    ]
    order = np.argsort(image_of, kind="stable")
    by_image = np.argsort(image_ids, kind="stable")
    image_ids, image_of = image_ids[by_image], image_of[order]
    if image_of.size:
        _find(image_of, image_ids if image_ids.size else np.array([-1]), f"{uri} has annotations of", uri)
    return Truth(
        uri,
        categories,
        image_ids=image_ids,
        sizes_hw=np.array(sizes, dtype=np.int64).reshape(-1, 2)[by_image],
        starts=np.append(np.searchsorted(image_of, image_ids), len(image_of)),
        boxes_xywh=boxes_xywh[order],
        category=category[order],
        area=np.array(area, dtype=np.float64)[order],
        iscrowd=np.array([bool(item.get("iscrowd")) for item in annotations], dtype=bool)[order],
    )


def _read_results_json(uri: str, truth: Truth) -> _Detections:
    """COCO results JSON; images that it does not name have no detections."""
    items = _read_json(uri)
    if not isinstance(items, list):
        raise UserError(
            f"{uri} is no COCO results JSON: it must be a list of objects with image_id, category_id, bbox and score"
        )
    image_of = np.array(_json_column(items, "image_id", _is_image_id, _IMAGE_ID, uri), dtype=np.int64)
    category = _to_indices(_json_column(items, "category_id", _is_integer, "an integer", uri), truth.categories, uri)
    boxes_xywh = as_boxes(_json_column(items, "bbox", _is_box, "four numbers: x, y, width, height", uri))
    scores = np.array(_json_column(items, "score", _is_number, "a number", uri), dtype=np.float64)
    known = np.sort(truth.image_ids)
    _find(image_of, known, f"{uri} has detections in", truth.uri)
    order = np.argsort(image_of, kind="stable")
    starts = np.append(np.searchsorted(image_of[order], known), len(items))
    rows = _Detections(known, starts, boxes_xywh[order], scores[order], category[order], [None] * len(known))
    rows.check(uri)
    return rows


def _read_json(uri: str) -> Any:
    try:
        return json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri} is not valid JSON: {error}") from None


_IMAGE_ID = "an integer from 0 to below 2**53"


def _is_integer(value: object) -> bool:
    return type(value) is int


def _is_image_id(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_IMAGE_ID


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < MAX_IMAGE_ID)


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _json_column(
    items: list[Any], key: str, is_right: Callable[[object], bool], expected: str, where: str
) -> list[Any]:
    values = []
    for number, item in enumerate(items):
        value = item.get(key) if isinstance(item, dict) else None
        if not is_right(value):
            raise UserError(f"{where}: entry {number} must have `{key}`, {expected}, found {value!r:.60}")
        values.append(value)
    return values


def _to_indices(category_ids: list[int], categories: Sequence[Category], where: str) -> Integers:
    index_of = {category.id: index for index, category in enumerate(categories)}
    unknown = sorted(set(category_ids) - set(index_of))
    if unknown:
        raise UserError(f"{where} has category ids that the truth does not have: {', '.join(map(str, unknown[:10]))}")
    if len(index_of) < len(categories):
        raise UserError(f"{where}: the truth uses category ids more than once, so category_id cannot tell them apart")
    return np.array([index_of[category_id] for category_id in category_ids], dtype=np.int64)


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
