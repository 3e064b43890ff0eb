"""The rows of an images or a detections table, for all that is exported from them."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydet import storage
from raydet.boxes import as_boxes
from raydet.errors import UserError
from raydet.tables import MANIFEST_NAME, Table, is_table, open_table

ROWS_AT_ONCE = 256
Numbers = npt.NDArray[Any]


def open_any(uri: str) -> Table:
    """Opens a table of images or of detections, whichever it is.

    Raises:
        UserError: It is neither, or cannot be read.
    """
    return open_table(uri, "images" if _kind_of(uri) == "images" else "detections")


def _kind_of(uri: str) -> str | None:
    """What a table says it holds; None where that cannot be found out, for `open_table` to say why."""
    if not is_table(uri):
        return None
    files = json.loads(storage.read_bytes(storage.join(uri, MANIFEST_NAME))).get("files", {})
    filesystem, path = storage.resolve(uri)
    for name in sorted(files)[:1]:
        if storage.exists(storage.join(uri, name)):
            try:
                metadata = pq.read_schema(f"{path}/{name}", filesystem=filesystem).metadata or {}
            except (pa.ArrowInvalid, OSError) as error:
                raise _damaged(uri, error) from None
            kind = json.loads(metadata.get(b"raydet", b"{}")).get("kind")
            return None if kind is None else str(kind)
    return None


def iter_rows(table: Table, columns: Sequence[str], *, batch_size: int = ROWS_AT_ONCE) -> Iterator[pa.RecordBatch]:
    """Streams columns of a table in its order, some rows at a time.

    Raises:
        UserError: It is damaged, or has not as many rows as its manifest says.
    """
    num_rows = 0
    try:
        for batch in table.iter_batches(columns, batch_size=batch_size):
            num_rows += batch.num_rows
            yield batch
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(table.uri, error) from None
    if num_rows != table.num_rows:
        raise UserError(f"{table.uri} is damaged: its files have {num_rows} rows, its manifest says {table.num_rows}")


def flatten(batch: pa.RecordBatch, column: str, names: Sequence[str], where: str) -> tuple[Numbers, dict[str, Numbers]]:
    """The lists in a struct column → all their elements in one array each, and the image id of every element."""
    image_ids = batch.column("image_id").to_numpy()
    owners: Numbers | None = None
    columns: dict[str, Numbers] = {}
    for name in names:
        lists = pc.struct_field(batch.column(column), name)
        own = np.repeat(image_ids, pc.fill_null(pc.list_value_length(lists), 0).to_numpy())
        values = lists.flatten()
        numbers = values.flatten() if name == "bbox" else values
        owners = own if owners is None else owners
        if values.null_count or numbers.null_count or not np.array_equal(own, owners):
            raise UserError(f"{where}: the lists in `{column}` differ in length or hold nulls")
        array = numbers.to_numpy(zero_copy_only=False)
        columns[name] = as_boxes(array) if name == "bbox" else array
    assert owners is not None
    return owners, columns


def refuse(bad: Numbers, image_ids: Numbers, what: str, where: str) -> None:
    """Refuses a table in which any box is bad.

    Args:
        bad: Which boxes, [N].
        image_ids: Of each box, [N].
        what: The bad thing that they have.
        where: The table.

    Raises:
        UserError: There is one.
    """
    if bad.any():
        raise UserError(f"{where}: {bad.sum()} boxes have {what}, such as one in image {image_ids[bad][0]}")


def refuse_categories(table: Table, image_ids: Numbers, indices: Numbers) -> None:
    """Refuses a table in which a box has a class that the table does not know.

    Raises:
        UserError: There is one.
    """
    unknown = (indices < 0) | (indices >= len(table.categories))
    refuse(unknown, image_ids, f"a category that is not one of the table's {len(table.categories)}", table.uri)


def refuse_boxes(table: Table, image_ids: Numbers, boxes_xywh: Numbers) -> None:
    """Refuses a table in which a box, [N, 4], has a number that is not finite.

    Raises:
        UserError: There is one.
    """
    refuse(np.logical_not(np.isfinite(boxes_xywh).all(axis=1)), image_ids, "a number that is not finite", table.uri)


def common_folder(table: Table) -> str | None:
    """The folder, with its final slash, that all paths begin with where they are whole; None for relative ones."""
    first: str | None = None
    last = ""
    is_images = table.kind == "images"
    for batch in iter_rows(table, ["image.path" if is_images else "path"]):
        # What the first and the last by name have in common, all between them have too.
        ends = pc.min_max(pc.struct_field(batch.column("image"), "path") if is_images else batch.column("path"))
        if ends["min"].is_valid:
            first = ends["min"].as_py() if first is None else min(first, ends["min"].as_py())
            last = max(last, ends["max"].as_py())
    if first is None or not all(path.startswith("/") or "://" in path for path in (first, last)):
        return None
    folder = posixpath.commonprefix([first, last]).rpartition("/")[0] + "/"
    return None if folder.endswith("//") else folder


def as_text(numbers: Numbers) -> pa.StringArray:
    """Numbers as JSON: Arrow writes the shortest digits that read back to the same float64."""
    return pc.cast(pa.array(numbers), pa.string())


def _damaged(uri: str, error: Exception) -> UserError:
    return UserError(f"{uri} is damaged: {' '.join(str(error).split())}; run the command that writes it again")
