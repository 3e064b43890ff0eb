"""Truth and detections, as tables or as COCO JSON → columns that evaluation can walk through, checked on the way.

Pictures are never read. Truth is held whole; detections come in batches.
"""

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
from raydet.errors import UserError
from raydet.metrics import Flags, Floats, ImageDetections, ImageTruth, Integers
from raydet.schema import MAX_IMAGE_ID, Category
from raydet.tables import Table, open_table


def is_json(uri: str, what: str, expected: str) -> bool:
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
class DetectionColumns:
    """Some images with their detections, as columns like those of `Truth`; `category` is in the truth's indices."""

    image_ids: Integers
    starts: Integers
    boxes_xywh: Boxes
    scores: Floats
    category: Integers
    errors: list[str | None]

    def image(self, row: int) -> ImageDetections:
        """The detections of one row."""
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


def read_truth(uri: str) -> Truth:
    """Reads the labels of an images table or of COCO instances JSON, never the pictures.

    Raises:
        UserError: There is no such input, or it is damaged or has no labels.
    """
    uri = storage.absolute_uri(uri)
    if is_json(uri, "truth", "an images table or COCO instances JSON"):
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


def read_detections_table(table: Table, truth: Truth) -> Iterator[DetectionColumns]:
    """Streams a detections table.

    Raises:
        UserError: It does not have exactly one row for each image of the truth, its classes are others, or a box or
            score means nothing.
    """
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
        rows = DetectionColumns(
            image_ids, _starts(lengths), columns["bbox"], columns["score"], to_truth[category], errors
        )
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


def read_results_json(uri: str, truth: Truth) -> DetectionColumns:
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
    rows = DetectionColumns(known, starts, boxes_xywh[order], scores[order], category[order], [None] * len(known))
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
