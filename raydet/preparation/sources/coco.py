"""COCO instances JSON → records.

What the format leaves open is settled so: category indices are contiguous, by rising source id; a missing `area` is
that of the box and a missing `iscrowd` is false; ids written as strings of digits or as whole floats are taken for
integers; backslashes in file names are slashes. Annotations of unknown images or categories are left out and counted.
The file is read piece by piece and its entries wait on this machine's disk, so that it may be larger than the memory.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from raydet.common.errors import UserError, one_line
from raydet.images.files import ImageFolder, readable
from raydet.preparation.sources.coco_index import MAX_INTEGER, AnnotationEntry, CocoIndex, ImageEntry
from raydet.preparation.sources.source import Finding, FindingLog, Records, Source, SourceImage
from raydet.tables import storage
from raydet.tables.json_stream import Elements, JsonError, Stream, members
from raydet.tables.schema import MAX_IMAGE_ID, Category, build_schema
from raydet.tables.spill import spill_errors

_LISTS = ("images", "annotations", "categories")
_KNOWN_IMAGE_KEYS = frozenset(["id", "file_name", "width", "height"])


def read_coco(annotations_uri: str, folder: ImageFolder) -> Source:
    """Reads a COCO instances file.

    Args:
        annotations_uri: The JSON file.
        folder: What the file names in it are relative to.

    Returns:
        One record for each entry of `images`, in their order. Further scalar keys of those entries (weather, licence)
        become extra columns. Boxes refer to an image of the size that the entry states, if any.

    Raises:
        UserError: The file is missing, is not JSON, or not COCO; the message names the place in it.
    """
    where = storage.absolute_uri(annotations_uri)
    index, extra_columns = CocoIndex(), _ExtraColumns()
    with spill_errors():
        categories = _read_entries(annotations_uri, index, extra_columns)
    if not index.num_images:
        raise UserError(f'{where} lists no image: "images" is empty')
    findings = FindingLog()
    with spill_errors():
        keeps_ids = index.join(categories)
    if not keeps_ids:
        findings.note(Finding("annotation ids that are missing, repeated or below 1, so all are numbered anew"))
    _note_lost(index, findings)
    fields = extra_columns.fields()
    texts = {field.name for field in fields if field.type == pa.string()}

    def records() -> Iterator[SourceImage]:
        for entry, objects in index.images():
            yield SourceImage(
                image_id=entry.image_id,
                path=readable(entry.path),
                objects=objects,
                size_hw=entry.size_hw,
                extra={
                    field.name: _scalar(entry.extra.get(field.name), as_text=field.name in texts) for field in fields
                },
                refusal=folder.refuse_outside(entry.path),
            )

    return Source(Records(records), index.num_images, categories, tuple(fields), findings)


def _read_entries(uri: str, index: CocoIndex, extra_columns: "_ExtraColumns") -> tuple[Category, ...]:
    """Puts images and annotations into the index; returns the categories."""
    where = storage.absolute_uri(uri)
    categories: tuple[Category, ...] = ()
    found: set[str] = set()
    with _opened(uri) as stream:
        for key, entries in _lists(stream, where):
            found.add(key)
            if key == "images":
                _add_images(entries, index, extra_columns, where)
            elif key == "annotations":
                index.add_annotations(_annotation(entry, place) for entry, place in _placed(entries, key, where))
            else:
                categories = _read_categories([entry for entry, _ in _placed(entries, key, where)], where)
    for key in _LISTS:
        if key not in found:
            hint = "; for images without labels use `raydet prepare images`" if key == "annotations" else ""
            raise UserError(
                f'{where} lacks the key "{key}"; a COCO instances file has images, annotations, categories{hint}'
            )
    return categories


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[Stream]:
    try:
        with storage.open_stream(uri) as stream:
            yield stream
    except FileNotFoundError:
        raise UserError(f"no such annotations file: {storage.absolute_uri(uri)}") from None
    except OSError as error:
        raise UserError(f"cannot read the annotations file {uri}: {one_line(error)}") from None
    except JsonError as error:
        raise UserError(f"{uri} {error}; expected a COCO instances file, which is an object") from None


def _lists(stream: Stream, where: str) -> Iterator[tuple[str, Elements]]:
    """The lists of a COCO file as they come; other members are passed over."""
    seen: set[str] = set()
    for key, value in members(stream, object_hook=_without_masks):
        if key in _LISTS:
            if not isinstance(value, Elements):
                raise UserError(f'{where}: "{key}" must be a list, got a {type(value).__name__}')
            if key in seen:
                raise UserError(f'{where} has the key "{key}" twice')
            seen.add(key)
            yield key, value


def _without_masks(item: dict[str, Any]) -> dict[str, Any]:
    """Masks are most of a COCO file and of no use here."""
    item.pop("segmentation", None)
    return item


def _placed(entries: Iterable[Any], key: str, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The entries of a list, each with its place for messages."""
    for index, entry in enumerate(entries):
        place = f"{where}: {key}[{index}]"
        if not isinstance(entry, dict):
            raise UserError(f"{place} must be an object, got {_shown(entry)}")
        yield entry, place


def _add_images(entries: Iterable[Any], index: CocoIndex, extra_columns: "_ExtraColumns", where: str) -> None:
    for number, (entry, place) in enumerate(_placed(entries, "images", where)):
        image_id = _image_id(entry, place)
        image = ImageEntry(image_id, _file_name(entry, place), _stated_size_hw(entry), extra_columns.take(entry))
        before = index.add_image(image)
        if before is not None:
            raise UserError(f"{where}: images[{before}] and [{number}] have the same id {image_id}")


def _annotation(entry: dict[str, Any], where: str) -> AnnotationEntry:
    image_id = _required_integer(entry, "image_id", where)
    category_id = _required_integer(entry, "category_id", where)
    box_xywh = _box_xywh(entry, where)
    area, iscrowd = _area(entry, box_xywh), _is_crowd(entry, where)
    return AnnotationEntry(_integer(entry.get("id")), image_id, category_id, box_xywh, area, iscrowd)


def _note_lost(index: CocoIndex, findings: FindingLog) -> None:
    for lost in index.lost():
        if lost.path is None:
            kind, detail = "annotations of an unknown image, left out", f"its image_id is {lost.image_id}"
            findings.note(Finding(kind, annotation_id=lost.annotation_id, detail=detail))
        else:
            kind, detail = "annotations of an unknown category, left out", f"its category_id is {lost.category_id}"
            findings.note(Finding(kind, readable(lost.path), lost.image_id, lost.annotation_id, detail=detail))


def _integer(value: object) -> int | None:
    """An integer, also when written as a string of digits or as a whole float; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and len(value) <= 20 and value.strip().removeprefix("-").isdecimal():
        return int(value)
    return None


def _required_integer(entry: dict[str, Any], key: str, where: str) -> int:
    if key not in entry:
        raise UserError(f'{where} lacks the key "{key}"')
    value = _integer(entry[key])
    if value is None:
        raise UserError(f"{where}: {key} must be an integer, got {_shown(entry[key])}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _image_id(entry: dict[str, Any], where: str) -> int:
    image_id = _required_integer(entry, "id", where)
    if not 0 <= image_id < MAX_IMAGE_ID:
        raise UserError(f"{where}: id must be from 0 to 2**53 - 1 (evaluators hold it in a float), got {image_id}")
    return image_id


def _refuse_repeated(values: list[Any], where: str, key: str) -> None:
    first_seen: dict[Any, int] = {}
    for index, value in enumerate(values):
        if value in first_seen:
            raise UserError(f"{where}[{first_seen[value]}] and [{index}] have the same {key} {_shown(value)}")
        first_seen[value] = index


def _read_categories(entries: list[dict[str, Any]], where: str) -> tuple[Category, ...]:
    if not entries:
        raise UserError(f'{where} lists no class: "categories" is empty')
    categories = []
    for index, entry in enumerate(entries):
        place = f"{where}: categories[{index}]"
        category_id = _required_integer(entry, "id", place)
        if abs(category_id) >= MAX_INTEGER:
            raise UserError(f"{place}: id {category_id} does not fit into 64 bits")
        if not isinstance(entry.get("name"), str | int) or isinstance(entry["name"], bool):
            raise UserError(f"{place}: name must be a string, got {_shown(entry.get('name'))}")
        categories.append(Category(id=category_id, name=readable(str(entry["name"]))))
    _refuse_repeated([category.id for category in categories], f"{where}: categories", "id")
    _refuse_repeated([category.name for category in categories], f"{where}: categories", "name")
    return tuple(sorted(categories, key=lambda category: category.id))


def _file_name(entry: dict[str, Any], where: str) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: file_name must be a string, got {_shown(name)}")
    return name.replace("\\", "/").removeprefix("./")


def _stated_size_hw(entry: dict[str, Any]) -> tuple[int, int] | None:
    height, width = _integer(entry.get("height")), _integer(entry.get("width"))
    return (height, width) if height and width else None


def _box_xywh(entry: dict[str, Any], where: str) -> tuple[float, float, float, float]:
    """The box; numbers that are null, and boxes that are null or empty, become NaN and so have no area."""
    if "bbox" not in entry:
        raise UserError(f'{where} lacks the key "bbox"')
    bbox = entry["bbox"]
    if bbox is None or bbox == []:
        return (math.nan,) * 4
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise UserError(f"{where}: bbox must be four numbers [x, y, width, height], got {_shown(bbox)}")
    try:
        x, y, width, height = (math.nan if value is None else _number(value) for value in bbox)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: bbox must be four numbers [x, y, width, height], got {_shown(bbox)}") from None
    return x, y, width, height


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    return float(value)


def _area(entry: dict[str, Any], box_xywh: tuple[float, float, float, float]) -> float:
    try:
        area = _number(entry.get("area"))
    except (TypeError, ValueError, OverflowError):
        area = math.nan
    return area if math.isfinite(area) and area >= 0 else box_xywh[2] * box_xywh[3]


def _is_crowd(entry: dict[str, Any], where: str) -> bool:
    value = entry.get("iscrowd")
    if value is None or isinstance(value, bool):
        return bool(value)
    number = _integer(value)
    if number not in (0, 1):
        raise UserError(f"{where}: iscrowd must be 0 or 1, got {_shown(value)}")
    return number == 1


class _ExtraColumns:
    """Further keys of images whose values are all scalars: a column for each; mixed types become text."""

    def __init__(self) -> None:
        self._types: dict[str, set[type]] = {}
        self._beyond_int64: set[str] = set()
        self._taken = _KNOWN_IMAGE_KEYS | set(build_schema("images").names)

    def take(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Takes note of the types of an image's values, and returns those that may stand in a column."""
        values = {}
        for key, value in entry.items():
            if value is None or key in self._taken:
                continue
            self._types.setdefault(key, set()).add(type(value))
            if isinstance(value, int) and abs(value) >= MAX_INTEGER:
                self._beyond_int64.add(key)
            if isinstance(value, bool | int | float | str):
                values[readable(key)] = value
        return values

    def fields(self) -> list[pa.Field]:
        """The columns of all that was taken."""
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
