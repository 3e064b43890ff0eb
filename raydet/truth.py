"""Truth and detections, as tables or as COCO JSON → columns of boxes, aligned image by image and checked on the way.

Pictures are never read. Images stand by rising id, and detections in the order in which they were given.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs as pafs

from raydet import storage
from raydet.boxes import Boxes, as_boxes
from raydet.errors import UserError
from raydet.matching import DetectionColumns, Floats, Integers, TruthColumns
from raydet.schema import Category, build_schema, parse_metadata
from raydet.tables import MANIFEST_NAME, Table, open_table
from raydet.truth_json import Federated, read_instances, read_results

_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, kw_only=True)
class Truth:
    """All labelled boxes of a data set.

    Attributes:
        uri: Where it was read.
        categories: The classes, by their indices.
        columns: The boxes; images by rising id.
        sizes_hw: Pixels of each image, 0 where unknown, int64 [I, 2].
        federated: What the file says in LVIS's fields, if it was asked for.
    """

    uri: str
    categories: tuple[Category, ...]
    columns: TruthColumns
    sizes_hw: Integers
    federated: Federated | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be measured against."""
        columns = self.columns
        if not self.categories:
            raise UserError(f"{self.uri} has no categories: it holds images without labels")
        if not columns.image_ids.size:
            raise UserError(f"{self.uri} holds no image")
        repeated = columns.image_ids[1:][np.diff(columns.image_ids) == 0]
        if repeated.size:
            raise UserError(f"{self.uri} has image ids more than once, such as {repeated[0]}; they must be unique")
        bad = ~np.isfinite(columns.boxes_xywh).all(axis=1) | ~np.isfinite(columns.area)
        bad |= (columns.boxes_xywh[:, 2:] < 0).any(axis=1)
        bad |= (columns.category < 0) | (columns.category >= len(self.categories))
        if bad.any():
            image_id = np.repeat(columns.image_ids, np.diff(columns.starts))[bad][0]
            raise UserError(
                f"{self.uri}: {bad.sum()} boxes have a number that is not finite, a negative size or an unknown "
                f"category, such as one in image {image_id}"
            )


@dataclass(frozen=True, kw_only=True)
class DetectionRows:
    """Images with their detections as a source has them; `columns` in the truth's category indices.

    Attributes:
        image_ids: int64 [R].
        columns: Their detections, in the same order.
        errors: Image id → why the detector could not read it.
    """

    image_ids: Integers
    columns: DetectionColumns
    errors: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Detections held against the truth: the same images on both sides, in the same order, by rising id.

    Attributes:
        uri: Where the detections were read.
        columns: The detections.
        truth_columns: The labelled boxes.
        truth_rows: Rows of the whole truth that are measured, int64 [I].
        errors: Image id → why the detector could not read it; it has no detections.
        num_left_out: Images that only one side has, with `allow_partial`.
        model: The checkpoint that the detections' table names.
        num_detections: In all images measured.
    """

    uri: str
    columns: DetectionColumns
    truth_columns: TruthColumns
    truth_rows: Integers
    errors: dict[int, str] = field(default_factory=dict)
    num_left_out: int = 0
    model: str | None = None
    num_detections: int = 0


def read_truth(uri: str, *, lvis: bool = False) -> Truth:
    """Reads the labels of an images table or of COCO instances JSON.

    Args:
        uri: A table's folder or a JSON file.
        lvis: Also read the fields that LVIS adds; only JSON has them.

    Raises:
        UserError: There is no such input, or it is damaged or has no labels.
    """
    uri = storage.absolute_uri(uri)
    if is_json(uri, "truth", "an images table or COCO instances JSON"):
        content = read_instances(uri, lvis=lvis)
        return Truth(
            uri=uri,
            categories=content.categories,
            columns=content.columns,
            sizes_hw=content.sizes_hw,
            federated=content.federated,
        )
    if lvis:
        raise UserError(
            f"{uri} is an images table, which does not hold neg_category_ids and not_exhaustive_category_ids; give "
            "LVIS's own JSON as the truth"
        )
    return _read_images_table(open_table(uri, "images"))


def read_detections(uri: str, truth: Truth, *, allow_partial: bool = False) -> Scored:
    """Reads a detections table, or COCO results JSON, in which an image without detections is not named.

    Args:
        uri: A table's folder or a JSON file.
        truth: What they are held against.
        allow_partial: Take the images that both sides have, where they differ.

    Raises:
        UserError: There is no such input or it is damaged, a box or score means nothing, the images or classes are
            not those of the truth, or no image is on both sides.
    """
    uri = storage.absolute_uri(uri)
    is_table = not is_json(uri, "detections", "a detections table or COCO results JSON")
    if is_table:
        table = open_detections(uri)
        rows, model = read_detection_rows(table, truth, stream(table, DETECTION_FIELDS)), model_of(table)
    else:
        rows, model = _read_results(uri, truth), None
    source_rows = find_rows(uri, rows.image_ids, truth)
    truth_rows, num_left_out = choose_images(
        uri, rows.image_ids, source_rows, truth, is_table=is_table, allow_partial=allow_partial
    )
    columns = take_detections(rows.columns, source_rows[truth_rows])
    return Scored(
        uri=uri,
        columns=columns,
        truth_columns=take_truth(truth.columns, truth_rows),
        truth_rows=truth_rows,
        errors=errors_in(rows.errors, truth.columns.image_ids[truth_rows]),
        num_left_out=num_left_out,
        model=model,
        num_detections=len(columns.scores),
    )


def errors_in(errors: dict[int, str], image_ids: Integers) -> dict[int, str]:
    """The errors of those images that are measured."""
    measured = np.isin(list(errors), image_ids).tolist()
    return {image_id: reason for (image_id, reason), is_in in zip(errors.items(), measured, strict=True) if is_in}


def is_json(uri: str, what: str, expected: str) -> bool:
    """Whether an input is a JSON file; otherwise it is a folder."""
    filesystem, path = storage.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        raise UserError(f"no such {what}: {uri}; give {expected}")
    if kind == pafs.FileType.File and not path.endswith(".json"):
        raise UserError(f"{uri} is neither a folder nor a .json file; {what} must be {expected}")
    return bool(kind == pafs.FileType.File)


def data_hash(uri: str) -> str:
    """Sixteen hexadecimal digits over a table's manifest, or over a JSON file."""
    uri = storage.absolute_uri(uri)
    file = uri if uri.partition("?")[0].endswith(".json") else storage.join(uri, MANIFEST_NAME)
    return hashlib.sha256(storage.read_bytes(file)).hexdigest()[:16]


# Which images: both sides, by rising id.


def find_rows(uri: str, image_ids: Integers, truth: Truth) -> Integers:
    """Finds for each image of the truth its row among some rows of the detections, -1 for none, int64 [I].

    Raises:
        UserError: An image stands in two rows.
    """
    known = truth.columns.image_ids
    positions = np.minimum(np.searchsorted(known, image_ids), len(known) - 1)
    is_known = known[positions] == image_ids
    ids, counts = np.unique(image_ids, return_counts=True)
    if len(ids) < len(image_ids):
        raise UserError(
            f"{uri} has image {ids[counts > 1][0]} more than once; a detections table has one row for each image"
        )
    rows = np.full(len(known), -1, dtype=np.int64)
    rows[positions[is_known]] = np.flatnonzero(is_known)
    return rows


def choose_images(
    uri: str, image_ids: Integers, rows: Integers, truth: Truth, *, is_table: bool, allow_partial: bool
) -> tuple[Integers, int]:
    """Says which images of the truth can be measured.

    Args:
        uri: Where the detections were read.
        image_ids: All images there, int64 [R].
        rows: What `find_rows` gave for them.
        truth: What they are held against.
        is_table: Whether there must be a row for each image of the truth.
        allow_partial: Leave out the images that only one side has.

    Returns:
        Rows of the truth, int64 [I], and the number of images left out.

    Raises:
        UserError: The images differ.
    """
    known, has_row = truth.columns.image_ids, rows >= 0
    if is_table and not image_ids.size:
        raise UserError(f"{uri} holds no image; the truth {truth.uri} has {len(known):,}")
    unknown = np.setdiff1d(image_ids, known)
    if unknown.size and not (allow_partial and has_row.any()):
        raise UserError(
            f"{uri} has {'rows of' if is_table else 'detections in'} {unknown.size:,} images that the truth "
            f"{truth.uri} does not have, such as image {unknown[0]}"
            + (
                "; --allow-partial measures the images that both have"
                if has_row.any()
                else ", and none that it has: they are of different data"
            )
        )
    num_missing = int((~has_row).sum()) if is_table else 0
    if num_missing and not allow_partial:
        raise UserError(
            f"{uri} has no row for {num_missing:,} of the {len(known):,} images of {truth.uri}, such as image "
            f"{known[~has_row][0]}: predict did not see the same data; run it on this truth, or measure the images "
            "that both have with --allow-partial"
        )
    return np.flatnonzero(has_row) if is_table else np.arange(len(known)), unknown.size + num_missing


def take_truth(columns: TruthColumns, rows: Integers) -> TruthColumns:
    """The boxes of some images, in the order given."""
    if _is_all(rows, len(columns.image_ids)):
        return columns
    starts, taken = _rows_of_images(columns.starts, rows)
    return TruthColumns(
        image_ids=columns.image_ids[rows],
        starts=starts,
        boxes_xywh=columns.boxes_xywh[taken],
        category=columns.category[taken],
        area=columns.area[taken],
        iscrowd=columns.iscrowd[taken],
    )


def take_detections(columns: DetectionColumns, rows: Integers) -> DetectionColumns:
    """The detections in some images, in the order given; none where the row is -1."""
    if _is_all(rows, len(columns.starts) - 1):
        return columns
    starts, taken = _rows_of_images(columns.starts, rows)
    return DetectionColumns(
        starts=starts,
        boxes_xywh=columns.boxes_xywh[taken],
        scores=columns.scores[taken],
        category=columns.category[taken],
    )


def _is_all(rows: Integers, num_rows: int) -> bool:
    return len(rows) == num_rows and bool((rows == np.arange(num_rows)).all())


def _rows_of_images(starts: Integers, images: Integers) -> tuple[Integers, Integers]:
    """New starts, and the rows of the boxes, for some images of columns (-1 for an image without any)."""
    lengths = np.where(images >= 0, np.diff(starts)[images] if len(starts) > 1 else 0, 0)
    new_starts = _starts(lengths)
    shifts = np.where(images >= 0, starts[images], 0) - new_starts[:-1]
    return new_starts, np.arange(new_starts[-1]) + np.repeat(shifts, lengths)


def _starts(lengths: Integers) -> Integers:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


# Tables.

DETECTION_FIELDS = ("image_id", "detections", "error")


def open_detections(uri: str) -> Table:
    """Opens a detections table."""
    return open_table(uri, "detections")


def model_of(table: Table) -> str | None:
    """The checkpoint that made a detections table."""
    model: str | None = parse_metadata(table.schema, kind="detections", where=table.uri).get("checkpoint")
    return model


def _read_images_table(table: Table) -> Truth:
    names = ("bbox", "category", "area", "iscrowd")
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for batch in stream(table, ["image_id", "width", "height", *(f"objects.{name}" for name in names)]):
        lengths, columns = _flatten(batch, "objects", names, table.uri)
        columns |= {
            "image_ids": image_ids_in(batch),
            "sizes": np.stack([_numbers(batch.column(name)) for name in ("height", "width")], axis=1),
            "lengths": lengths,
        }
        parts.append(columns)
    if not parts:
        raise UserError(f"{table.uri} holds no image")
    whole = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    columns_as_read = TruthColumns(
        image_ids=whole["image_ids"],
        starts=_starts(whole["lengths"]),
        boxes_xywh=whole["bbox"],
        category=whole["category"],
        area=whole["area"],
        iscrowd=whole["iscrowd"],
    )
    order = np.argsort(whole["image_ids"], kind="stable")
    return Truth(
        uri=table.uri,
        categories=table.categories,
        columns=take_truth(columns_as_read, order),
        sizes_hw=whole["sizes"][order],
    )


def read_extra_columns(truth: Truth) -> dict[str, pa.ChunkedArray]:
    """The columns that an images table has beyond raydet's own, by name, in the order of the truth's images.

    JSON has none.
    """
    if truth.uri.partition("?")[0].endswith(".json"):
        return {}
    table = open_table(truth.uri, "images")
    own = {field.name for field in build_schema("images")}
    names = [name for name in table.schema.names if name not in own]
    if not names:
        return {}
    rows = pa.Table.from_batches(stream(table, ["image_id", *names])).sort_by("image_id")
    return {name: rows[name] for name in names}


def read_detection_rows(table: Table, truth: Truth, batches: Iterable[pa.RecordBatch]) -> DetectionRows:
    """Reads some or all rows of a detections table.

    Args:
        table: The table.
        truth: Whose category indices the result has; categories are told apart by their names.
        batches: Rows of the table with the columns of `DETECTION_FIELDS`.

    Raises:
        UserError: The classes are others, a box or score means nothing, or an image with an error has detections.
    """
    to_truth = _map_categories(table, truth)
    image_ids, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    errors: dict[int, str] = {}
    parts: list[tuple[Boxes, Floats, Integers]] = [(as_boxes([]), np.zeros(0), np.zeros(0, np.int64))]
    for batch in batches:
        ids = image_ids_in(batch)
        counts, columns = _flatten(batch, "detections", ("bbox", "score", "category"), table.uri)
        category = columns["category"]
        if category.size and not 0 <= category.min() <= category.max() < len(to_truth):
            raise UserError(
                f"{table.uri} has detections of a category that is not one of its {len(to_truth)} categories"
            )
        check_detections(table.uri, columns["bbox"], columns["score"], ids, counts)
        has_error = _numbers(batch.column("error").is_valid())
        if (counts[has_error] > 0).any():
            raise UserError(f"{table.uri} has an image with detections although its `error` says it has none")
        errors |= dict(zip(ids[has_error].tolist(), batch.column("error").drop_null().to_pylist(), strict=True))
        image_ids.append(ids)
        lengths.append(counts)
        parts.append((columns["bbox"], columns["score"], to_truth[category]))
    boxes_xywh, scores, category = (np.concatenate(column) for column in zip(*parts, strict=True))
    return DetectionRows(
        image_ids=np.concatenate(image_ids),
        columns=DetectionColumns(
            starts=_starts(np.concatenate(lengths)), boxes_xywh=boxes_xywh, scores=scores, category=category
        ),
        errors=errors,
    )


def check_detections(where: str, boxes_xywh: Boxes, scores: Floats, image_ids: Integers, lengths: Integers) -> None:
    """Refuses boxes and scores that mean nothing."""
    for bad, what in (
        (~np.isfinite(boxes_xywh).all(axis=1), "a box that is not finite (NaN or infinite)"),
        (~np.isfinite(scores), "a score that is not finite (NaN or infinite)"),
        ((boxes_xywh[:, 2:] < 0).any(axis=1), "a box of negative width or height; boxes are x, y, width, height"),
        ((scores < 0) | (scores > 1), "a score outside of 0 … 1"),
    ):
        if bad.any():
            image_id = np.repeat(image_ids, lengths)[bad][0]
            raise UserError(f"{where}: {bad.sum()} detections have {what}, such as one in image {image_id}")


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


def stream(table: Table, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a table, some columns, a batch at a time; a damaged file is a UserError."""
    num_rows = 0
    try:
        for batch in table.iter_batches(columns, batch_size=_ROWS_AT_ONCE):
            num_rows += batch.num_rows
            yield batch
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{table.uri} is damaged: {reason}; run the command that writes it again") from None
    if num_rows != table.num_rows:
        raise UserError(f"{table.uri} is damaged: its files have {num_rows} rows, its manifest says {table.num_rows}")


def image_ids_in(batch: pa.RecordBatch) -> Integers:
    """The ids of the images in some rows of a table, int64 [R]."""
    return _numbers(batch.column("image_id"))


def _flatten(
    batch: pa.RecordBatch, column: str, names: Sequence[str], where: str
) -> tuple[Integers, dict[str, npt.NDArray[Any]]]:
    """The lists in a struct column → the number of elements in each row, and all elements of each list in one array."""
    import pyarrow.compute as pc  # takes a while to import, and JSON has no need of it

    struct = batch.column(column)
    columns: dict[str, npt.NDArray[Any]] = {}
    lengths: Integers | None = None
    for name in names:
        lists = pc.struct_field(struct, name)
        own = _numbers(pc.list_value_length(lists)).astype(np.int64)
        values = lists.flatten()
        numbers = values.flatten() if name == "bbox" else values
        lengths = own if lengths is None else lengths
        if values.null_count or numbers.null_count or not np.array_equal(own, lengths):
            raise UserError(f"{where}: the lists in `{column}` differ in length or hold nulls")
        array = _numbers(numbers)
        columns[name] = as_boxes(array) if name == "bbox" else array
    assert lengths is not None
    return lengths, columns


def _numbers(array: pa.Array) -> npt.NDArray[Any]:
    """The numbers or booleans of an array, 0 for null.

    They are taken from its memory as they lie there: `to_numpy` and whatever takes a Python number import pandas where
    it is installed, which takes longer than reading a hundred thousand images.
    """
    if pa.types.is_boolean(array.type):
        return _numbers(array.cast(pa.uint8())).astype(np.bool_)
    dtype = np.dtype(array.type.to_pandas_dtype())
    values = np.zeros(0, dtype)
    if len(array):
        values = np.frombuffer(array.buffers()[1], dtype, count=len(array), offset=array.offset * dtype.itemsize)
    return np.where(_numbers(array.is_valid()), values, values.dtype.type(0)) if array.null_count else values


def _read_results(uri: str, truth: Truth) -> DetectionRows:
    image_ids, columns = read_results(uri, truth.categories)
    check_detections(uri, columns.boxes_xywh, columns.scores, image_ids, np.diff(columns.starts))
    return DetectionRows(image_ids=image_ids, columns=columns, errors={})
