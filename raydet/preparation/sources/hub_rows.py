"""The rows of an opened Hugging Face data set → records.

Boxes refer to the upright image, as the `datasets` library decodes it. If a row states the size that the file has
before its EXIF rotation by a quarter turn, its boxes are rotated with it, as for COCO.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raydet.common.errors import UserError
from raydet.config import PrepareHubConfig
from raydet.config.preparing import BboxFormat
from raydet.images.files import readable
from raydet.preparation.sources.hub import HubImages
from raydet.preparation.sources.hub_objects import RowObjects, names_in, parse_objects
from raydet.preparation.sources.source import (
    LABELLED_FIELD,
    SOURCE_ID,
    Finding,
    FindingLog,
    Source,
    SourceImage,
    SourceObjects,
    are_image_ids,
    are_unique,
    read_class_names,
    size_hw_of,
)
from raydet.tables.schema import LABELLED_COLUMN, Category, build_schema
from raydet.tables.table import is_table, open_table

_ROWS_AT_ONCE = 1000
_PATH = "\0path"
"""Key of the image's path in a row; no column can have this name."""
_Key = int | str
_Extras = dict[str, tuple[pa.DataType, tuple[str, ...] | None]]


def read_hub(images: HubImages, config: PrepareHubConfig) -> Source:
    """Read the rows of an opened data set and set `images.column` to the column of the images.

    Without `classes`, the classes are those of the column's ClassLabel, or else all names or numbers that occur,
    sorted. Without a column of objects the images have no labels.

    Returns:
        One record per row. Its id comes from the column `image_id` if all its values are unique integers from 0 to
        2⁵³ - 1. Otherwise the id is the row number, and the column `source_id` holds the value of `image_id` or, if
        there is none, the path. Category ids are the numbers of the ClassLabel, from 0, or the numbers that occur;
        names are numbered from 1. `width` and `height` are the size that the source states. Other columns of scalars
        are carried through, those of a ClassLabel by name, and so is `labelled_categories`, if it is a list of a
        ClassLabel, as in raydet's tables.

    Raises:
        UserError: A column is missing or of the wrong type, or there is no row.
    """
    bbox_format = config.bbox_format
    features = images.dataset.features
    images.column = _image_column(features, config.image_column)
    objects = _objects_column(features, config.objects_column)
    if not len(images.dataset):
        raise UserError(f"the data set {images.folder or ''} has no rows in this split")
    findings = FindingLog()
    extras = _extra_columns(features, {images.column, objects}, findings)
    image_ids = _image_ids(images.dataset, findings)
    labelled_names = _labelled_names(features) if objects is not None else None
    partial = [LABELLED_COLUMN] if labelled_names else []
    rows = _HubRows(images, [objects, "image_id", "width", "height", *extras, *partial])
    categories: tuple[Category, ...] = ()
    index_of: Mapping[_Key, int] = {}
    keeps_ids = False
    if objects is not None:
        stated = _stated_categories(images, features[objects], config.classes)
        categories, index_of, keeps_ids = _scan(rows, objects, bbox_format, stated, image_ids, findings)
    names_rows = image_ids is None and "source_id" not in extras

    def records() -> Iterator[SourceImage]:
        next_id = 1
        for number, row in enumerate(rows):
            parsed = parse_objects(row[objects], bbox_format) if objects is not None else RowObjects()
            found = _source_objects(parsed, index_of, None if keeps_ids else next_id, bbox_format == "yolo")
            next_id += len(found.ids)
            path = images.name_of(row[_PATH], number)
            extra = {name: _extra_value(row[name], names) for name, (_, names) in extras.items()}
            if names_rows:
                extra["source_id"] = path if row.get("image_id") is None else readable(str(row["image_id"]))
            if labelled_names is not None:
                extra[LABELLED_COLUMN] = _labelled(row[LABELLED_COLUMN], labelled_names, index_of)
            yield SourceImage(
                image_id=number if image_ids is None else int(image_ids[number]),
                path=path,
                objects=found if objects is not None else None,
                size_hw=size_hw_of(row.get("height"), row.get("width")),
                extra=extra,
                refusal=parsed.refusal,
                locator=str(number),
            )

    fields = [pa.field(name, dtype) for name, (dtype, _) in extras.items()]
    fields += SOURCE_ID if names_rows else []
    fields += [LABELLED_FIELD] if labelled_names is not None else []
    return Source(records, len(images.dataset), categories, tuple(fields), findings)


class _HubRows:
    """The rows as dictionaries, without image bytes; can be iterated more than once."""

    def __init__(self, images: HubImages, columns: Sequence[str | None]) -> None:
        present = [name for name in dict.fromkeys(columns) if name in images.dataset.column_names]
        self._columns = [name for name in present if name is not None]
        self._image = images.column
        self._dataset = images.dataset.select_columns([*self._columns, self._image])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self._dataset), _ROWS_AT_ONCE):
            batch = self._dataset[start : start + _ROWS_AT_ONCE]
            columns = [_paths(batch[self._image]), *(batch[name].to_pylist() for name in self._columns)]
            for values in zip(*columns, strict=True):
                yield dict(zip([_PATH, *self._columns], values, strict=True))


def _paths(column: pa.ChunkedArray) -> list[str | None]:
    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        paths: list[str | None] = pc.struct_field(column, "path").to_pylist()
        return paths
    return column.to_pylist() if pa.types.is_string(column.type) else [None] * len(column)


def _scan(
    rows: _HubRows,
    objects: str,
    bbox_format: BboxFormat,
    stated: tuple[Category, ...] | None,
    image_ids: NDArray[np.int64] | None,
    findings: FindingLog,
) -> tuple[tuple[Category, ...], Mapping[_Key, int], bool]:
    """Scan all boxes once and note the findings, which must be known before the first row is written.

    Returns:
        The classes, their indices by number and name, and True if the ids of the boxes can be kept.
    """
    counts: Counter[_Key] = Counter()
    ids: list[NDArray[np.int64]] = []
    num_without_id = 0
    index_of = None if stated is None else _indices(stated, range(len(stated)))
    for number, row in enumerate(rows):
        parsed = parse_objects(row[objects], bbox_format)
        image_id = number if image_ids is None else int(image_ids[number])
        known = [key for key in parsed.categories if index_of is None or key in index_of]
        counts.update(known)
        given = [item for item in parsed.ids if item is not None]
        num_without_id += len(parsed.ids) - len(given)
        ids.append(np.array(given, np.int64))
        unknown = {"boxes of an unknown class, dropped": len(parsed.categories) - len(known)}
        for kind, count in {**parsed.findings, **unknown}.items():
            findings.note(Finding(kind, row[_PATH], image_id, count=count))
    all_ids = np.concatenate(ids) if ids else np.zeros(0, np.int64)
    keeps_ids = not num_without_id and bool((all_ids > 0).all()) and are_unique(all_ids)
    if not keeps_ids and len(all_ids):
        findings.note(Finding("annotation ids that are missing, repeated or below 1, so all are renumbered"))
    if stated is not None and index_of is not None:
        return stated, index_of, keeps_ids
    categories = _occurring_categories(counts)
    return categories, _indices(categories, [category.id for category in categories]), keeps_ids


def _source_objects(
    parsed: RowObjects, index_of: Mapping[_Key, int], first_id: int | None, is_normalised: bool
) -> SourceObjects:
    """Return the boxes of known classes, with their own ids if `first_id` is None."""
    kept = [place for place, key in enumerate(parsed.categories) if key in index_of]
    own = [parsed.ids[place] or 0 for place in kept]
    return SourceObjects(
        ids=own if first_id is None else list(range(first_id, first_id + len(kept))),
        boxes_xywh=[parsed.boxes_xywh[place] for place in kept],
        categories=[index_of[parsed.categories[place]] for place in kept],
        areas=[parsed.areas[place] for place in kept],
        iscrowd=[parsed.iscrowd[place] for place in kept],
        is_normalised=is_normalised,
    )


def _image_column(features: Mapping[str, Any], wanted: str | None) -> str:
    columns = ", ".join(features)
    if wanted is not None:
        if wanted not in features:
            raise UserError(f"the data set has no column {wanted}; it has {columns}")
        return wanted
    if "image" in features:
        return "image"
    typed = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if len(typed) != 1:
        raise UserError(f"cannot identify the column of the images: the data set has {columns}; set --image-column")
    return typed[0]


def _objects_column(features: Mapping[str, Any], wanted: str | None) -> str | None:
    name = wanted or "objects"
    if name not in features:
        if wanted is None:
            return None
        raise UserError(f"the data set has no column {wanted}; it has {', '.join(features)}")
    fields = _fields_of(features[name])
    if fields is None and getattr(features[name], "dtype", "") not in ("string", "large_string"):
        raise UserError(
            f"the column {name} is neither a struct of lists nor a list of structs, nor JSON of one of them"
        )
    found = names_in(tuple(fields or ("bbox", "category")))
    for key in ("bbox", "category"):
        if found[key] is None:
            raise UserError(f"the column {name} has no field {key}; it has {', '.join(fields or ())}")
    return name


def _fields_of(feature: Any) -> dict[str, Any] | None:
    """Return the fields of `objects` and their types; None if it has neither of the two layouts."""
    if isinstance(feature, dict):
        return {name: getattr(inner, "feature", inner) for name, inner in feature.items()}
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return dict(inner) if isinstance(inner, dict) else None


def _stated_categories(images: HubImages, feature: Any, classes: Sequence[str] | None) -> tuple[Category, ...] | None:
    """Return the classes that the user or the data set states; None if only the boxes name them."""
    if classes is not None:
        return _numbered(read_class_names(classes), 0)
    if images.folder is not None and is_table(images.folder):
        return open_table(images.folder, "images").categories
    fields = _fields_of(feature)
    name = names_in(tuple(fields))["category"] if fields else None
    names = getattr(fields[name], "names", None) if fields and name else None
    return _numbered([readable(item) for item in names], 0) if names else None


def _occurring_categories(counts: Mapping[_Key, int]) -> tuple[Category, ...]:
    if all(isinstance(key, int) for key in counts):
        return tuple(Category(id=int(key), name=str(key)) for key in sorted(counts, key=int))
    return _numbered(sorted({readable(str(key)) for key in counts}), 1)


def _numbered(names: Sequence[str], first: int) -> tuple[Category, ...]:
    return tuple(Category(id=number, name=name) for number, name in enumerate(names, start=first))


def _indices(categories: Sequence[Category], numbers: Sequence[int]) -> dict[_Key, int]:
    """Return the index of each class, by its name and by its number in the data set."""
    by_name: dict[_Key, int] = {category.name: index for index, category in enumerate(categories)}
    return by_name | {number: index for index, number in enumerate(numbers)}


def _image_ids(dataset: Any, findings: FindingLog) -> NDArray[np.int64] | None:
    """Return the column `image_id` if a table can hold it."""
    dtype = getattr(dataset.features.get("image_id"), "dtype", "")
    if "int" not in dtype:
        return None
    column = dataset.select_columns(["image_id"])
    batches = [column[start : start + 2**16]["image_id"] for start in range(0, len(column), 2**16)]
    if not any(batch.null_count for batch in batches):
        ids = np.concatenate([batch.to_numpy() for batch in batches])
        if are_image_ids(ids):
            return ids.astype(np.int64)
    findings.note(Finding("image ids that are missing, repeated or out of range, so rows are numbered instead"))
    return None


def _extra_columns(features: Mapping[str, Any], taken: set[str | None], findings: FindingLog) -> _Extras:
    """Return other columns of scalars: their type in the table, and the names of a ClassLabel."""
    extras: _Extras = {}
    for name, feature in features.items():
        if name in taken or name in build_schema("images").names:
            continue
        kind = type(feature).__name__
        dtype = getattr(feature, "pa_type", None)
        if kind == "ClassLabel":
            extras[name] = pa.string(), tuple(map(readable, feature.names))
        elif kind == "Value" and _is_scalar(dtype):
            extras[name] = pa.string() if pa.types.is_large_string(dtype) or pa.types.is_null(dtype) else dtype, None
        elif name != LABELLED_COLUMN or _labelled_names(features) is None:
            findings.note(Finding("columns without scalar values, dropped", detail=name))
    return extras


def _labelled_names(features: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the class names of the column `labelled_categories`; None if there is no such column of class lists."""
    names = getattr(getattr(features.get(LABELLED_COLUMN), "feature", None), "names", None)
    return None if names is None else tuple(map(readable, names))


def _labelled(value: list[int] | None, names: tuple[str, ...], index_of: Mapping[_Key, int]) -> list[int] | None:
    """Return the classes that an image is labelled for; None for all."""
    if value is None:
        return None
    known = (names[number] for number in value if number is not None and 0 <= number < len(names))
    return sorted({index_of[name] for name in known if name in index_of})


def _is_scalar(dtype: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
    more = (pa.types.is_large_string, pa.types.is_null, pa.types.is_timestamp)
    return any(test(dtype) for test in (*tests, *more))


def _extra_value(value: Any, names: tuple[str, ...] | None) -> Any:
    if names is not None:
        return names[value] if value is not None and 0 <= value < len(names) else None
    return readable(value) if isinstance(value, str) else value
