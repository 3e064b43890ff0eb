"""COCO instances JSON → records.

Conventions where the format is silent: category indices are contiguous, in ascending order of source id; a missing
`area` is the area of the box, and a missing `iscrowd` is false. Annotations of unknown images or categories are dropped
and counted. Entries are buffered on this machine's disk, so a file may be larger than memory.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from raydet.common.errors import UserError
from raydet.config import PrepareCocoConfig
from raydet.images.files import ImageFolder, readable
from raydet.preparation.sources.coco_index import AnnotationEntry, CocoIndex, ImageEntry
from raydet.preparation.sources.source import (
    LABELLED_FIELD,
    Finding,
    FindingLog,
    Source,
    SourceImage,
    SourceObjects,
)
from raydet.tables import coco_json, storage
from raydet.tables.coco_json import MAX_INTEGER
from raydet.tables.schema import LABELLED_COLUMN, Category, build_schema
from raydet.tables.spill import spill_errors

_KNOWN_IMAGE_KEYS = frozenset(["id", "file_name", "width", "height"])
_FEDERATED_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")


def read_coco(config: PrepareCocoConfig, folder: ImageFolder) -> Source:
    """Read a COCO instances file, whose file names are relative to a folder.

    Returns:
        One record per entry of `images`, in file order. Further scalar keys of the entries (weather, licence) become
        extra columns. Boxes refer to the image size that the entry states, if any. Where entries state classes that are
        absent or not exhaustively labelled, as in LVIS, the images are labelled for the absent ones and those of their
        boxes, without those not exhaustively labelled.

    Raises:
        UserError: The file is missing, is not JSON, or is not COCO; the message states the position in the file.
    """
    where = storage.absolute_uri(config.annotations)
    index, extra_columns = CocoIndex(), _ExtraColumns()
    with spill_errors():
        categories = _read_entries(config.annotations, index, extra_columns)
    if not index.num_images:
        raise UserError(f'{where} has no images: "images" is empty')
    findings = FindingLog()
    with spill_errors():
        keeps_ids = index.join(categories)
    if not keeps_ids:
        findings.note(Finding("annotation ids that are missing, repeated or below 1, so all are renumbered"))
    _note_orphans(index, findings)
    fields = extra_columns.fields()
    if extra_columns.is_federated:
        fields.append(LABELLED_FIELD)
    index_of = {category.id: place for place, category in enumerate(categories)}
    texts = {field.name for field in fields if field.type == pa.string()}

    def records() -> Iterator[SourceImage]:
        for entry, objects in index.images():
            yield SourceImage(
                image_id=entry.image_id,
                path=readable(entry.path),
                objects=objects,
                size_hw=entry.size_hw,
                extra={
                    field.name: _scalar(entry.extra.get(field.name), as_text=field.name in texts)
                    if field is not LABELLED_FIELD
                    else _labelled(entry.extra.get(LABELLED_COLUMN), objects, index_of)
                    for field in fields
                },
                refusal=folder.refuse_outside(entry.path),
            )

    return Source(records, index.num_images, categories, tuple(fields), findings)


def _read_entries(uri: str, index: CocoIndex, extra_columns: "_ExtraColumns") -> tuple[Category, ...]:
    """Add images and annotations to the index; return the categories."""
    where = storage.absolute_uri(uri)
    categories: tuple[Category, ...] = ()
    for key, entries in coco_json.read_lists(uri):
        if key == "images":
            _add_images(entries, index, extra_columns, where)
        elif key == "annotations":
            index.add_annotations(_annotation(entry, place) for entry, place in entries)
        else:
            categories = _categories(entries, where)
    return categories


def _add_images(
    entries: Iterable[tuple[dict[str, Any], str]], index: CocoIndex, extra_columns: "_ExtraColumns", where: str
) -> None:
    for number, (entry, place) in enumerate(entries):
        image_id = coco_json.image_id(entry, "id", place)
        path = coco_json.file_name(entry, place)
        before = index.add_image(ImageEntry(image_id, path, _stated_size_hw(entry), extra_columns.take(entry)))
        if before is not None:
            raise UserError(f"{where}: images[{before}] and [{number}] have the same id {image_id}")


def _annotation(entry: dict[str, Any], place: str) -> AnnotationEntry:
    image_id = coco_json.required_integer(entry, "image_id", place)
    category_id = coco_json.required_integer(entry, "category_id", place)
    box_xywh = coco_json.box_xywh(entry, place)
    area = coco_json.stated_area(entry)
    if area is None or not math.isfinite(area) or area < 0:
        area = box_xywh[2] * box_xywh[3]
    iscrowd = coco_json.is_crowd(entry, place)
    return AnnotationEntry(coco_json.integer(entry.get("id")), image_id, category_id, box_xywh, area, iscrowd)


def _note_orphans(index: CocoIndex, findings: FindingLog) -> None:
    for orphan in index.orphans():
        if orphan.path is None:
            kind, detail = "annotations of an unknown image, dropped", f"its image_id is {orphan.image_id}"
            findings.note(Finding(kind, annotation_id=orphan.annotation_id, detail=detail))
        else:
            kind, detail = "annotations of an unknown category, dropped", f"its category_id is {orphan.category_id}"
            findings.note(Finding(kind, readable(orphan.path), orphan.image_id, orphan.annotation_id, detail=detail))


def _categories(entries: Iterable[tuple[dict[str, Any], str]], where: str) -> tuple[Category, ...]:
    found = [coco_json.category(entry, place) for entry, place in entries]
    if not found:
        raise UserError(f'{where} has no classes: "categories" is empty')
    categories = [Category(category.id, readable(category.name)) for category in found]
    coco_json.refuse_repeated([category.id for category in categories], f"{where}: categories", "id")
    coco_json.refuse_repeated([category.name for category in categories], f"{where}: categories", "name")
    return tuple(sorted(categories, key=lambda category: category.id))


def _stated_size_hw(entry: dict[str, Any]) -> tuple[int, int] | None:
    height, width = (coco_json.integer(entry.get(side)) for side in ("height", "width"))
    return (height, width) if height and width else None


class _ExtraColumns:
    """Extra columns from further keys of the image entries; only keys with scalar values, mixed types become text."""

    def __init__(self) -> None:
        self._types: dict[str, set[type]] = {}
        self._beyond_int64: set[str] = set()
        self._taken = _KNOWN_IMAGE_KEYS | {*build_schema("images").names, LABELLED_COLUMN}
        self.is_federated = False

    def take(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Record the types of an image's values; return the scalar ones, and LVIS's lists as `labelled_categories`."""
        values: dict[str, Any] = {}
        for key, value in entry.items():
            if value is None or key in self._taken:
                continue
            self._types.setdefault(key, set()).add(type(value))
            if isinstance(value, int) and abs(value) >= MAX_INTEGER:
                self._beyond_int64.add(key)
            if isinstance(value, bool | int | float | str):
                values[readable(key)] = value
        federated = [entry.get(key) for key in _FEDERATED_KEYS]
        if any(isinstance(ids, list) for ids in federated):
            self.is_federated = True
            values[LABELLED_COLUMN] = [_class_ids(ids) for ids in federated]
        return values

    def fields(self) -> list[pa.Field]:
        """Return the columns of the recorded keys."""
        scalars = {bool, int, float, str}
        return [pa.field(readable(key), self._type(key)) for key, kinds in self._types.items() if kinds <= scalars]

    def _type(self, key: str) -> pa.DataType:
        kinds = self._types[key]
        if kinds == {bool}:
            return pa.bool_()
        if kinds == {int} and key not in self._beyond_int64:
            return pa.int64()
        if kinds <= {int, float} and float in kinds:
            return pa.float64()
        return pa.string()


def _scalar(value: object, *, as_text: bool) -> object:
    return readable(str(value)) if as_text and value is not None else value


def _class_ids(value: object) -> list[int]:
    ids = map(coco_json.integer, value if isinstance(value, list) else ())
    return [class_id for class_id in ids if class_id is not None]


def _labelled(lists: list[list[int]] | None, objects: SourceObjects, index_of: Mapping[int, int]) -> list[int] | None:
    """Return the classes that an image is labelled for; None for all, where LVIS's two lists are missing."""
    if lists is None:
        return None
    absent, not_exhaustive = ({index_of[class_id] for class_id in ids if class_id in index_of} for ids in lists)
    return sorted((absent | set(objects.categories)) - not_exhaustive)
