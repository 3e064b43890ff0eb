"""Labelled boxes of a data set, read from an images table or COCO JSON as validated columns.

Image data is never read. Images are in ascending id order.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs as pafs

from raydet.common.errors import UserError
from raydet.images.files import readable
from raydet.measuring.joining import ImageKeys, list_images
from raydet.tables import storage
from raydet.tables.checks import check_boxes, check_unique
from raydet.tables.coco_columns import Federated, read_instances
from raydet.tables.columns import (
    BATCH_ROWS,
    TruthColumns,
    flatten,
    starts_of,
    take_truth,
    texts_of,
)
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.schema import LABELLED_COLUMN, OPTIONAL_FIELDS, Category, build_schema
from raydet.tables.table import Table, open_table


@dataclass(frozen=True, kw_only=True)
class Truth:
    """All labelled boxes of a data set.

    Attributes:
        columns: Boxes; images in ascending id order.
        images: Images in ascending id order.
        federated: LVIS fields of the file, if requested.
        class_mapping: Class of the detections → class of the truth, for classes with different names on the two sides.
    """

    uri: str
    categories: tuple[Category, ...]
    columns: TruthColumns
    images: ImageKeys
    federated: Federated | None = None
    class_mapping: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UserError if the labels cannot be used as ground truth."""
        columns = self.columns
        if not self.categories:
            raise UserError(f"{self.uri} has no categories; the truth must have labels")
        if not columns.image_ids.size:
            raise UserError(f"{self.uri} has no images")
        check_unique(columns.image_ids, self.uri)
        check_boxes(
            self.uri,
            boxes_xywh=columns.boxes_xywh,
            category=columns.category,
            area=columns.area,
            num_categories=len(self.categories),
            image_of=lambda: np.repeat(columns.image_ids, np.diff(columns.starts)),
            noun="boxes",
        )


def read_truth(uri: str, *, lvis: bool = False) -> Truth:
    """Read the labels of an images table or COCO instances JSON, with the fields that LVIS adds if requested.

    Raises:
        UserError: The input does not exist, is damaged or has no labels.
    """
    uri = storage.absolute_uri(uri)
    if is_json(uri, "truth", "an images table or COCO instances JSON"):
        content = read_instances(uri, lvis=lvis)
        return Truth(
            uri=uri,
            categories=content.categories,
            columns=content.columns,
            images=ImageKeys(
                uri=uri,
                image_ids=content.columns.image_ids,
                sizes_hw=content.sizes_hw,
                paths=texts_of([readable(path) for path in content.paths]),
            ),
            federated=content.federated,
        )
    if lvis:
        raise UserError(
            f"{uri} is an images table, which has no neg_category_ids and not_exhaustive_category_ids; use LVIS's JSON "
            "as the truth"
        )
    return _read_images_table(open_table(uri, "images"))


def is_json(uri: str, what: str, expected: str) -> bool:
    """Return True if an input is a JSON file, False if it is a folder."""
    filesystem, path = storage.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        raise UserError(f"no such {what}: {uri}; expected {expected}")
    if kind == pafs.FileType.File and not path.endswith(".json"):
        raise UserError(f"{uri} is neither a folder nor a .json file; {what} must be {expected}")
    return bool(kind == pafs.FileType.File)


def data_hash(uri: str) -> str:
    """Return sixteen hexadecimal digits that identify the content: a hash of a table's manifest or of a JSON file."""
    uri = storage.absolute_uri(uri)
    file = uri if uri.partition("?")[0].endswith(".json") else storage.join(uri, MANIFEST_NAME)
    return hashlib.sha256(storage.read_bytes(file)).hexdigest()[:16]


def _read_images_table(table: Table) -> Truth:
    names = ("bbox", "category", "area", "iscrowd")
    parts: list[dict[str, npt.NDArray[Any]]] = []
    labelled: list[pa.ListArray] = []
    optional = [LABELLED_COLUMN] if LABELLED_COLUMN in table.schema.names else []
    for batch in table.iter_batches(["image_id", *(f"objects.{name}" for name in names), *optional], BATCH_ROWS):
        lengths, columns = flatten(batch, "objects", names, table.uri)
        parts.append({**columns, "lengths": lengths})
        labelled += [batch.column(name) for name in optional]
    if not parts:
        raise UserError(f"{table.uri} has no images")
    images = list_images(table)
    whole = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    columns_as_read = TruthColumns(
        image_ids=images.image_ids,
        starts=starts_of(whole["lengths"]),
        boxes_xywh=whole["bbox"],
        category=whole["category"],
        area=whole["area"],
        iscrowd=whole["iscrowd"],
        labelled=pa.concat_arrays(labelled) if labelled else None,
    )
    order = np.argsort(images.image_ids, kind="stable")
    return Truth(
        uri=table.uri,
        categories=table.categories,
        columns=take_truth(columns_as_read, order),
        images=images.take(order),
    )


def read_extra_columns(truth: Truth) -> dict[str, pa.ChunkedArray]:
    """Return the columns that an images table has beyond raydet's own, by name, in the order of the truth's images.

    JSON has no extra columns.
    """
    if truth.uri.partition("?")[0].endswith(".json"):
        return {}
    return extra_columns(open_table(truth.uri, "images"))


def extra_columns(table: Table) -> dict[str, pa.ChunkedArray]:
    """Return the columns that an images table has beyond raydet's own, by name, in ascending id order."""
    own = {*build_schema("images").names, *OPTIONAL_FIELDS["images"]}
    names = [name for name in table.schema.names if name not in own]
    if not names:
        return {}
    rows = pa.Table.from_batches(table.iter_batches(["image_id", *names], BATCH_ROWS)).sort_by("image_id")
    return {name: rows[name] for name in names}
