"""The pairs of image and label file in a YOLO data set, and its classes."""

import contextlib
import os
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from raydet.common.errors import UserError, one_line
from raydet.common.untrusted.documents import MAX_YAML_BYTES, DocumentError, parse_yaml
from raydet.common.untrusted.opening import LocalRoots
from raydet.common.untrusted.text import TextError, decode_text
from raydet.config import PrepareYoloConfig
from raydet.images.files import (
    MAX_FILE_BYTES,
    ImageFolder,
    image_files_below,
    images_below,
    is_image_name,
    list_below,
    readable,
)
from raydet.preparation.sources.source import read_class_names
from raydet.tables import storage
from raydet.tables.schema import Category

_SPLIT_KEYS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class YoloFiles:
    """The files of a data set.

    Attributes:
        images: Folder that holds all images, possibly in subfolders.
        labels: Folder that holds all label files.
        pairs: Paths of images and of their label files, each relative to its folder, sorted by image path.
        categories: The classes; their ids are the numbers in the label files.
        num_orphans: Label files without an image; not counted for lists of images.
        outside: Paths of listed images outside the data set, which must not be read.
        skipped: Number of other files in the folders of images, by extension; without .txt files.
    """

    images: ImageFolder
    labels: ImageFolder
    pairs: list[tuple[str, str]]
    categories: tuple[Category, ...]
    num_orphans: int = 0
    outside: tuple[str, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        del self.skipped[".txt"]


def find_files(config: PrepareYoloConfig) -> YoloFiles:
    """Find the images, label files and classes of a data set; raises as the two functions below do."""
    if config.data is not None:
        return find_in_data_yaml(config.data, config.split, allow_root=config.allow_root)
    assert config.images is not None and config.labels is not None and config.classes is not None
    return find_in_folders(config.images, config.labels, config.classes, allow_root=config.allow_root)


def find_in_folders(
    images_uri: str, labels_uri: str, classes: Sequence[str], *, allow_root: Sequence[str] | None = None
) -> YoloFiles:
    """Find the images below one folder and the label files with the same relative paths below another.

    Raises:
        UserError: There is no such folder, no image, or no class.
    """
    images = ImageFolder(images_uri, allow_root=allow_root)
    labels = ImageFolder(labels_uri, what="label", allow_root=allow_root)
    skipped = Counter[str]()
    pairs = [(path, str(PurePosixPath(path).with_suffix(".txt"))) for path in image_files_below(images, skipped)]
    categories = tuple(Category(index, name) for index, name in enumerate(read_class_names(classes)))
    return YoloFiles(images, labels, pairs, categories, _count_orphans(labels, pairs), skipped=skipped)


def find_in_data_yaml(data_uri: str, split: str, *, allow_root: Sequence[str] | None = None) -> YoloFiles:
    """Find the images and label files of one split of an Ultralytics data set.

    `path` is relative to the folder of data.yaml, which is its default, or else to the working directory. The split is
    one or several folders or .txt lists of images, relative to `path`. Lines of a list are relative to the list and
    must lie below `path` or beside data.yaml. The path of a label file is that of its image with `labels` in place of
    the last `images`.

    Raises:
        UserError: data.yaml, the split or a file that it names is missing or invalid, or there is no folder of labels.
    """
    data_uri = _plain(data_uri)
    content = _load_yaml(data_uri)
    entries = _split_entries(content, split, data_uri)
    root = _dataset_root(content, data_uri)
    found: list[tuple[str, list[str]]] = []
    for entry in entries:
        where = _resolve_entry(root, entry, data_uri)
        if not where.strip("/"):
            raise UserError(f"{data_uri}: `{split}` is the root of the file system; expected a folder of images")
        found.append((where, []) if not where.endswith(".txt") else ("", _read_list(where, root, allow_root or ())))
    folders = [folder for folder, _ in found if folder]
    named = [path for _, paths in found for path in paths]
    homes = (root, posixpath.dirname(data_uri))
    listed = [path for path in named if any(_is_below(home, path) for home in homes)]
    outside = tuple(sorted({*named} - {*listed}))
    if outside and not listed and not folders:
        raise UserError(
            f"{data_uri}: `{split}` lists {outside[0]}, which lies outside the data set in {root}; "
            "`path` must name a folder that holds all its images"
        )
    images = ImageFolder(_common_folder(folders + [posixpath.dirname(path) for path in listed]), allow_root=allow_root)
    skipped = Counter[str]()
    absolute = listed + [
        storage.join(folder, path)
        for folder in folders
        for path in images_below(ImageFolder(folder, allow_root=allow_root), skipped)
    ]
    absolute = sorted({*absolute})
    if not absolute:
        raise UserError(f"{data_uri}: no image file in `{split}`, {', '.join(entries)}")
    label_paths = [_label_path(path) for path in absolute]
    labels = ImageFolder(
        _common_folder([posixpath.dirname(path) for path in label_paths]), what="label", allow_root=allow_root
    )
    pairs = [
        (_below(images.uri, image), _below(labels.uri, label))
        for image, label in zip(absolute, label_paths, strict=True)
    ]
    num_orphans = 0 if listed else _count_orphans(labels, pairs)
    return YoloFiles(images, labels, pairs, _read_names(content, data_uri), num_orphans, outside, skipped)


def _load_yaml(uri: str) -> dict[str, Any]:
    try:
        content = parse_yaml(decode_text(storage.read_bytes(uri, max_bytes=MAX_YAML_BYTES)))
    except FileNotFoundError:
        raise UserError(f"no such file: {uri}; --data must name the data.yaml of the data set") from None
    except (OSError, DocumentError, TextError) as error:
        with contextlib.suppress(OSError):  # the storage, of which `error` tells
            if storage.exists(storage.join(uri, "data.yaml")):
                raise UserError(f"{uri} is a folder; did you mean --data {storage.join(uri, 'data.yaml')}?") from None
        raise UserError(f"cannot read {uri}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{uri} must be a mapping with train, val and names, got {type(content).__name__}")
    if "kpt_shape" in content:
        raise UserError(f"{uri} describes keypoints (kpt_shape); prepare yolo reads boxes and polygons")
    return content


def _read_names(content: Mapping[str, Any], where: str) -> tuple[Category, ...]:
    names = content.get("names")
    pairs = dict(enumerate(names)) if isinstance(names, list) else names if isinstance(names, dict) else {}
    if not pairs:
        raise UserError(f"{where}: names must list the classes, or map their numbers to them, got {names!r}")
    categories = []
    for number, name in pairs.items():
        if isinstance(number, bool) or not str(number).isdecimal() or not isinstance(name, str | int | float):
            raise UserError(f"{where}: names must map numbers from 0 to names, got {number!r}: {name!r}")
        categories.append(Category(int(number), readable(str(name))))
    for what, values in (("number", [item.id for item in categories]), ("name", [item.name for item in categories])):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            raise UserError(f"{where}: two classes have the {what} {repeated[0]!r}")
    num_stated = content.get("nc", len(categories))
    if num_stated != len(categories):
        raise UserError(f"{where}: nc is {num_stated!r}, but names has {len(categories)} classes")
    return tuple(sorted(categories, key=lambda category: category.id))


def _split_entries(content: Mapping[str, Any], split: str, where: str) -> list[str]:
    value = next((content[key] for key in _SPLIT_KEYS[split] if content.get(key)), None)
    if value is None:
        there = [key for key in _SPLIT_KEYS if any(content.get(name) for name in _SPLIT_KEYS[key])]
        raise UserError(f"{where} has no split `{split}`; it has {', '.join(there) or 'none'}")
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{where}: {split} must be a folder, a .txt list of images, or several of them, got {value!r}")
    return [entry.replace("\\", "/") for entry in entries]


def _dataset_root(content: Mapping[str, Any], data_uri: str) -> str:
    home = posixpath.dirname(data_uri)
    path = content.get("path")
    if path is None:
        return home
    candidates = [_joined(home, str(path)), _plain(str(path))]
    # A data set that was moved or renamed is still around its data.yaml.
    return next((folder for folder in candidates if _exists(folder)), home)


def _resolve_entry(root: str, entry: str, where: str) -> str:
    # Some tools export `../train/images` for `train/images`.
    candidates = [_joined(root, entry), _joined(root, entry.removeprefix("../"))]
    place = next((candidate for candidate in candidates if _exists(candidate)), None)
    if place is None:
        raise UserError(f"{where} names {entry}, but there is no {candidates[0]}")
    return place


def _read_list(uri: str, root: str, allow_root: Sequence[str]) -> list[str]:
    """Read a .txt list of images as absolute paths; its lines are relative to the file, or else to the data set."""
    # A stranger's data.yaml names it, so it must not be a link to a file elsewhere.
    roots = LocalRoots(posixpath.dirname(uri), root, *allow_root)
    try:
        lines = decode_text(storage.read_bytes(uri, max_bytes=MAX_FILE_BYTES, roots=roots)).splitlines()
    except (OSError, TextError) as error:
        raise UserError(f"cannot read the list of images {uri}: {one_line(error)}") from None
    names = [line.strip().replace("\\", "/") for line in lines if line.strip()]
    if not names:
        raise UserError(f"{uri} lists no images")
    others = [name for name in names if not is_image_name(name)]
    if others:
        raise UserError(f"{uri} lists {others[0]}, which has no image file extension")
    homes = [posixpath.dirname(uri), root]
    home = next((home for home in homes if _exists(_joined(home, names[0]))), homes[0])
    return [_joined(home, name) for name in names]


def _count_orphans(labels: ImageFolder, pairs: Sequence[tuple[str, str]]) -> int:
    known = {label for _, label in pairs}
    others = {path for path in list_below(labels) if path.endswith(".txt")} - known
    return sum(PurePosixPath(path).name != "classes.txt" for path in others)


def _label_path(image_path: str) -> str:
    before, found, after = image_path.rpartition("/images/")
    moved = f"{before}/labels/{after}" if found else image_path
    return str(moved.rpartition(".")[0]) + ".txt"


def _common_folder(folders: Sequence[str]) -> str:
    scheme, separator, _ = folders[0].partition("://")
    prefix = scheme + separator if separator else ""
    paths = [folder.removeprefix(prefix) for folder in folders]
    return prefix + posixpath.commonpath(paths)


def _exists(uri: str) -> bool:
    """Return True if a file or folder exists; local names may be impossible."""
    return storage.exists(uri) if "://" in uri else os.path.exists(uri)  # noqa: PTH110 Path raises for long names


def _is_below(folder: str, path: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _below(folder: str, path: str) -> str:
    return path.removeprefix(folder.rstrip("/") + "/")


def _joined(folder: str, path: str) -> str:
    """Join a folder and a path, and remove `..`."""
    whole = path if "://" in path or path.startswith("/") else f"{folder}/{path}"
    scheme, separator, rest = whole.rpartition("://")
    return scheme + separator + posixpath.normpath(rest)


def _plain(uri: str) -> str:
    """Return local URIs as absolute paths and others unchanged."""
    return storage.resolve(uri)[1] if storage.is_local(uri) else uri
