"""COCO JSON → validated entries, one at a time; errors state the position in the file.

The file is read in chunks, so it may be larger than memory. Ids written as digit strings or as integral floats are
accepted as integers; backslashes in file names become slashes.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

from raydet.common.errors import UserError, one_line
from raydet.tables import storage
from raydet.tables.json_stream import JsonError, members
from raydet.tables.schema import MAX_IMAGE_ID, Category

MAX_INTEGER = 2**63
"""Integers of this size or more do not fit into an int64 column."""

Entry = dict[str, Any]
BoxXywh = tuple[float, float, float, float]

_LARGE_BYTES, _HEAD_BYTES = 16 * 2**20, 1024

_EXPECTED = "a COCO instances file, a JSON object"
_LISTS = ("images", "annotations", "categories")
_MOST_SHOWN = 5


def read_lists(uri: str) -> Iterator[tuple[str, Iterator[tuple[Entry, str]]]]:
    """Read the lists of a COCO instances file in file order.

    Yields:
        "images", "annotations" or "categories", each once, with an iterator over the entries of that list, each with
        its position for error messages. Consume an iterator before requesting the next list. Masks are removed.

    Raises:
        UserError: The file is missing, is not JSON, or is not a COCO instances file; also raised while entries are
            consumed.
    """
    where = storage.absolute_uri(uri)
    found: set[str] = set()
    with errors_in_one_line(uri, _EXPECTED), storage.open_stream(uri) as stream:
        for key, value in members(stream, object_hook=_without_masks):
            if key not in _LISTS:
                continue
            if not isinstance(value, Iterator):
                raise UserError(f'{where}: "{key}" must be a list, got a {type(value).__name__}')
            if key in found:
                raise UserError(f'{where} has the key "{key}" twice')
            found.add(key)
            yield key, _entries(value, uri, f"{where}: {key}")
    for key in _LISTS:
        if key not in found:
            hint = "; for images without labels use `raydet prepare images`" if key == "annotations" else ""
            raise UserError(
                f'{where} lacks the key "{key}"; a COCO instances file has images, annotations and categories{hint}'
            )


def read_whole(uri: str) -> bytes:
    """Read a JSON file into memory; a large one must begin as JSON does.

    Raises:
        UserError: It does not.
        OSError: The file cannot be read.
    """
    with storage.open_stream(uri) as stream:
        head = stream.read(_LARGE_BYTES + 1)
    if len(head) <= _LARGE_BYTES:
        return bytes(head)
    if head[:_HEAD_BYTES].lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")[:1] not in (b"{", b"["):
        raise UserError(f"{uri} is not JSON: it begins with neither {{ nor [")
    del head
    return storage.read_bytes(uri)


def _entries(elements: Iterator[Any], uri: str, where: str) -> Iterator[tuple[Entry, str]]:
    with errors_in_one_line(uri, _EXPECTED):
        yield from placed(elements, where)


@contextlib.contextmanager
def errors_in_one_line(uri: str, expected: str) -> Iterator[None]:
    """Context manager: convert a failure to read an annotations file.

    Args:
        uri: Path or URI of the file.
        expected: Format of the file, for the message.

    Raises:
        UserError: The file is missing, cannot be read, or is not JSON.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"no such annotations file: {storage.absolute_uri(uri)}") from None
    except OSError as error:
        with contextlib.suppress(OSError):  # the storage, of which `error` tells
            if storage.is_folder(uri):
                raise UserError(f"{storage.absolute_uri(uri)} is a folder; {_files_in(uri, expected)}") from None
        raise UserError(f"cannot read the annotations file {uri}: {one_line(error)}") from None
    except JsonError as error:
        raise UserError(f"{uri} {error}; expected {expected}") from None


def _files_in(uri: str, expected: str) -> str:
    """Name the files of a folder that was given in place of an annotations file."""
    suffix = next((kind for kind in ("json", "xml") if kind.upper() in expected), "csv")
    names = [name for name in storage.list_files(uri) if name.lower().endswith(f".{suffix}")]
    shown = ", ".join(names[:_MOST_SHOWN]) + (" …" if len(names) > _MOST_SHOWN else "")
    return f"name a file in it, such as {shown}" if names else f"expected {expected}"


def _without_masks(item: Entry) -> Entry:
    """Remove masks, which make up most of a COCO file and are not used."""
    item.pop("segmentation", None)
    return item


def placed(entries: Iterable[Any], where: str) -> Iterator[tuple[Entry, str]]:
    """Yield the entries of a list, each with its position for error messages.

    Raises:
        UserError: An entry is not an object.
    """
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{where}[{index}] must be an object, got {_shown(entry)}")
        yield entry, f"{where}[{index}]"


# Fields of an entry. Each function raises a UserError that starts with the given position.


def integer(value: object) -> int | None:
    """Convert an integer, a digit string or an integral float to an integer; return None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and len(value) <= 20 and value.strip().removeprefix("-").isdecimal():
        return int(value)
    return None


def required_integer(entry: Entry, key: str, place: str) -> int:
    """Return the integer under a key."""
    value = integer(_required(entry, key, place))
    if value is None:
        raise UserError(f"{place}: {key} must be an integer, got {_shown(entry[key])}")
    return value


def image_id(entry: Entry, key: str, place: str) -> int:
    """Return the image id under a key."""
    value = required_integer(entry, key, place)
    if not 0 <= value < MAX_IMAGE_ID:
        raise UserError(f"{place}: {key} must be from 0 to 2**53 - 1 (evaluators store it in a float), got {value}")
    return value


def file_name(entry: Entry, place: str) -> str:
    """Return the file name of an image, with `/` as separator."""
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{place}: file_name must be a string, got {_shown(name)}")
    return plain_path(name)


def plain_path(name: str) -> str:
    """Normalise a file name: `/` as separator, no leading `./`."""
    return name.replace("\\", "/").removeprefix("./")


def category(entry: Entry, place: str) -> Category:
    """Return a class with its name unchanged."""
    category_id = required_integer(entry, "id", place)
    if abs(category_id) >= MAX_INTEGER:
        raise UserError(f"{place}: id {category_id} does not fit into 64 bits")
    name = entry.get("name")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise UserError(f"{place}: name must be a string, got {_shown(name)}")
    return Category(id=category_id, name=str(name))


def box_xywh(entry: Entry, place: str) -> BoxXywh:
    """Return the box in pixels; null coordinates and null or empty boxes become NaN."""
    bbox = _required(entry, "bbox", place)
    if bbox is None or bbox == []:
        return (math.nan,) * 4
    expected = f"{place}: bbox must be four numbers [x, y, width, height], got {_shown(bbox)}"
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise UserError(expected)
    try:
        x, y, width, height = (math.nan if value is None else _number(value) for value in bbox)
    except (TypeError, ValueError, OverflowError):
        raise UserError(expected) from None
    return x, y, width, height


def stated_area(entry: Entry) -> float | None:
    """Return the stated area, any number; None if it is missing or not a number."""
    try:
        return _number(entry.get("area"))
    except (TypeError, ValueError, OverflowError):
        return None


def is_crowd(entry: Entry, place: str) -> bool:
    """Return True if an annotation is marked as a crowd."""
    value = entry.get("iscrowd")
    if value is None or isinstance(value, bool):
        return bool(value)
    number = integer(value)
    if number not in (0, 1):
        raise UserError(f"{place}: iscrowd must be 0 or 1, got {_shown(value)}")
    return number == 1


def score(entry: Entry, place: str) -> float:
    """Return the score of a detection, any number."""
    value = _required(entry, "score", place)
    if isinstance(value, str):
        raise UserError(f"{place}: score must be a number, got {_shown(value)}")
    try:
        return _number(value)
    except (TypeError, OverflowError):
        raise UserError(f"{place}: score must be a number, got {_shown(value)}") from None


def refuse_repeated(values: list[Any], where: str, key: str) -> None:
    """Refuse a list whose entries have duplicate values under a key; `where` names the list in the message.

    Raises:
        UserError: Two values are equal.
    """
    first_seen: dict[Any, int] = {}
    for index, value in enumerate(values):
        if value in first_seen:
            raise UserError(f"{where}[{first_seen[value]}] and [{index}] have the same {key} {_shown(value)}")
        first_seen[value] = index


def _required(entry: Entry, key: str, place: str) -> Any:
    if key not in entry:
        raise UserError(f'{place} lacks the key "{key}"')
    return entry[key]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    return float(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
