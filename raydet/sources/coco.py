"""COCO instances JSON → records.

What the format leaves open is settled so: category indices are contiguous, by rising source id; a missing `area` is
that of the box and a missing `iscrowd` is false; ids written as strings of digits or as whole floats are taken for
integers; backslashes in file names are slashes. Annotations of unknown images or categories are left out and counted.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from raydet import storage
from raydet.errors import UserError
from raydet.schema import MAX_IMAGE_ID, Category, build_schema
from raydet.sources import Finding, FindingLog, ImageFolder, Records, Source, SourceImage, SourceObjects, readable

MAX_ANNOTATION_ID = 2**63
"""Ids stand in an int64 column."""

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
    content = _load_json(annotations_uri)
    where = storage.absolute_uri(annotations_uri)
    images, annotations, categories = (_list(content, key, where) for key in ("images", "annotations", "categories"))
    if not images:
        raise UserError(f'{where} lists no image: "images" is empty')
    ordered_categories = _read_categories(categories, where)
    image_ids = [_image_id(entry, f"{where}: images[{index}]") for index, entry in enumerate(images)]
    paths = [_file_name(entry, f"{where}: images[{index}]") for index, entry in enumerate(images)]
    _refuse_repeated(image_ids, f"{where}: images", "id")
    findings = FindingLog()
    path_of = dict(zip(image_ids, paths, strict=True))
    objects = _read_annotations(annotations, path_of, ordered_categories, where, findings)
    extra_fields = _extra_fields(images)
    names = [field.name for field in extra_fields]
    texts = {field.name for field in extra_fields if field.type == pa.string()}

    def records() -> Iterator[SourceImage]:
        for image_id, path, entry in zip(image_ids, paths, images, strict=True):
            yield SourceImage(
                image_id=image_id,
                path=readable(path),
                objects=objects.get(image_id) or SourceObjects(),
                size_hw=_stated_size_hw(entry),
                extra={name: _scalar(entry.get(name), as_text=name in texts) for name in names},
                refusal=folder.refuse_outside(path),
            )

    return Source(Records(records), len(images), ordered_categories, tuple(extra_fields), findings)


def _load_json(uri: str) -> dict[str, Any]:
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        raise UserError(f"no such annotations file: {storage.absolute_uri(uri)}") from None
    except OSError as error:
        raise UserError(f"cannot read the annotations file {uri}: {' '.join(str(error).split())}") from None
    try:
        content = json.loads(data, object_hook=_without_masks)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri} is not JSON: {error}; expected a COCO instances file") from None
    if not isinstance(content, dict):
        raise UserError(f"{uri} holds a {type(content).__name__}; a COCO instances file is an object")
    return content


def _without_masks(item: dict[str, Any]) -> dict[str, Any]:
    """Masks are most of a COCO file and of no use here: dropped while parsing, they never fill the memory."""
    item.pop("segmentation", None)
    return item


def _list(content: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    if key not in content:
        hint = "; for images without labels use `raydet prepare images`" if key == "annotations" else ""
        raise UserError(
            f'{where} lacks the key "{key}"; a COCO instances file has images, annotations, categories{hint}'
        )
    entries = content[key]
    if not isinstance(entries, list):
        raise UserError(f'{where}: "{key}" must be a list, got a {type(entries).__name__}')
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {key}[{index}] must be an object, got {_shown(entry)}")
    return entries


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
        if abs(category_id) >= MAX_ANNOTATION_ID:
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


def _read_annotations(
    entries: list[dict[str, Any]],
    path_of: Mapping[int, str],
    categories: tuple[Category, ...],
    where: str,
    findings: FindingLog,
) -> dict[int, SourceObjects]:
    """Groups the annotations by image; ids are kept if they are all unique and above 0, else they are numbered anew."""
    index_of = {category.id: index for index, category in enumerate(categories)}
    given = [_integer(entry.get("id")) for entry in entries]
    keep = len(set(given)) == len(given) and all(item is not None and 0 < item < MAX_ANNOTATION_ID for item in given)
    if not keep:
        findings.note(Finding("annotation ids that are missing, repeated or below 1, so all are numbered anew"))
    ids = given if keep else list(range(1, len(given) + 1))
    objects: defaultdict[int, SourceObjects] = defaultdict(SourceObjects)
    for index, (annotation_id, entry) in enumerate(zip(ids, entries, strict=True)):
        place = f"{where}: annotations[{index}]"
        image_id = _required_integer(entry, "image_id", place)
        category_id = _required_integer(entry, "category_id", place)
        box_xywh = _box_xywh(entry, place)
        if image_id not in path_of:
            kind = "annotations of an unknown image, left out"
            findings.note(Finding(kind, annotation_id=annotation_id, detail=f"its image_id is {image_id}"))
        elif category_id not in index_of:
            kind, detail = "annotations of an unknown category, left out", f"its category_id is {category_id}"
            findings.note(Finding(kind, readable(path_of[image_id]), image_id, annotation_id, detail=detail))
        else:
            of_image = objects[image_id]
            of_image.ids.append(annotation_id or 0)
            of_image.boxes_xywh.append(box_xywh)
            of_image.categories.append(index_of[category_id])
            of_image.areas.append(_area(entry, box_xywh))
            of_image.iscrowd.append(_is_crowd(entry, place))
    return dict(objects)


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


def _extra_fields(images: list[dict[str, Any]]) -> list[pa.Field]:
    """One column for each further key whose values are all scalars; mixed types become text."""
    types: dict[str, set[type]] = {}
    for entry in images:
        for key, value in entry.items():
            if value is not None:
                types.setdefault(key, set()).add(type(value))
    taken = _KNOWN_IMAGE_KEYS | set(build_schema("images").names)
    return [
        pa.field(readable(key), _arrow_type(kinds, [entry.get(key) for entry in images]))
        for key, kinds in types.items()
        if key not in taken and kinds <= {bool, int, float, str}
    ]


def _arrow_type(kinds: set[type], values: list[Any]) -> pa.DataType:
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int} and all(value is None or abs(value) < MAX_ANNOTATION_ID for value in values):
        return pa.int64()
    if kinds <= {int, float} and float in kinds:
        return pa.float64()
    return pa.string()


def _scalar(value: object, *, as_text: bool) -> object:
    return readable(str(value)) if as_text and value is not None else value
