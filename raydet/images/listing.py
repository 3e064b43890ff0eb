"""A folder, a list file or tar files → one row per image, in a fixed order, in Arrow batches; or one per video."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.errors import UserError
from raydet.common.redaction import refuse_password
from raydet.common.threads import in_order
from raydet.common.untrusted.opening import ANYWHERE, LocalRoots, NotAFileError, OutsideError
from raydet.common.untrusted.text import text_stream
from raydet.images.files import (
    IMAGE_EXTENSIONS,
    LIST_SUFFIXES,
    VIDEO_EXTENSIONS,
    ImageFolder,
    ReadError,
    beside,
    image_files_below,
    is_image_name,
    is_video_name,
    list_below,
    no_image_below,
    read_error,
    readable,
    refuse_name,
    videos_below,
)
from raydet.images.references import FileReader, Reference
from raydet.images.tars import COMPRESSED_SUFFIXES, image_members, refuse_compressed
from raydet.tables import storage
from raydet.tables.table import open_table

CHECKED_LINES = 1000
"""Number of lines of a list that are checked before a run starts; checking millions would take too long."""
MAX_SHARDS = 1_000_000
MAX_LINE_CHARS = 64 * 2**10
_OPTIONS = re.compile(r"\?(?=\w+=)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

_IMAGE_NAME = rf"[^/]\.(?:{'|'.join(sorted(IMAGE_EXTENSIONS))})$"
_OUTSIDE = r"\x00|://|^/|^.:/|(?:^|/)\.\.(?:/|$)"
"""The relative paths that `ImageFolder.refuse_outside` refuses in a remote folder."""

ListedKind = Literal["folder", "list", "tar", "video", "windowed"]


LISTING_SCHEMA = pa.schema([("path", pa.string()), ("uri", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
"""The displayed path of an image, and the reference to its bytes."""
_BATCH_ROWS = 2**16


class Entry(NamedTuple):
    """One image: its displayed path, and the reference to its bytes."""

    path: str
    reference: Reference


@dataclass(frozen=True)
class Listing:
    """Kind and images of a collection, with the columns of `schema`.

    Iterating over the batches lists the images lazily and may raise UserError. The first batch is listed already.
    `skipped` counts the other files of a folder by extension, as far as they are listed, or missing frames of a video.
    """

    kind: ListedKind
    batches: Iterator[pa.RecordBatch]
    skipped: Counter[str] = field(default_factory=Counter)
    schema: pa.Schema = LISTING_SCHEMA


def is_pattern(uri: str) -> bool:
    """Return True for a pattern: a name with `*`, `?`, `[…]` or `{…}` that is not the literal name of a file.

    `?name=value` introduces the options of a URI and is not a pattern.
    """
    if "://" not in uri:
        return any(character in uri for character in "*?[{") and not Path(uri).exists()
    return any(character in _OPTIONS.split(uri)[0] for character in "*?[{")


def list_images(uri: str, allow_root: Sequence[str] | None = None, *, takes_file: bool = False) -> Listing:
    """List the images of a folder, a list file, a tar file, or a pattern of tar files.

    Args:
        uri: Absolute path or URI that exists, or a pattern.
        allow_root: Further local folders that links in a folder may lead to.
        takes_file: The data may also be a single image file, which counts as a list.

    Raises:
        UserError: The data is none of these, or contains no image.
    """
    name = uri.lower()
    refuse_compressed(uri)
    if is_pattern(uri):
        return _tars(*_matching(uri))
    if name.endswith(".tar"):
        folder, _, file = uri.rpartition("/")
        return _tars(folder, [file])
    if name.endswith(LIST_SUFFIXES):
        return _listing("list", _batches(_read_list(uri)))
    if _is_file(uri):
        if takes_file and is_image_name(uri):
            return _listing("list", _batches([Entry(uri.rpartition("/")[2], Reference(uri))]))
        raise UserError(
            f"{uri} is a file, but neither a list of paths ({' or '.join(LIST_SUFFIXES)}), a .tar nor a video; "
            "name an images table, a folder of images, a list, tar files or a video"
        )
    return _list_folder(uri, allow_root)


def list_videos(uri: str, allow_root: Sequence[str] | None = None) -> Listing:
    """List the videos of a folder or a list file, or a single video.

    Args:
        uri: Absolute path or URI that exists, or a pattern.
        allow_root: Further local folders that links in a folder may lead to.

    Raises:
        UserError: The data is none of these, or contains no video.
    """
    if is_video(uri):
        return _listing("list", _batches([Entry(uri.rpartition("/")[2], Reference(uri))]))
    if uri.lower().endswith(LIST_SUFFIXES):
        return _listing("list", _batches(_videos_of_list(uri)))
    if is_pattern(uri) or _is_file(uri):
        raise UserError(f"--fps needs a video, a folder of videos or a list of them as --data; {uri} is none")
    folder, skipped = ImageFolder(uri, what="video", allow_root=allow_root), Counter[str]()
    paths = videos_below(folder, skipped)
    if not paths:
        raise UserError(
            f"--fps needs videos, but there is none below {folder.uri} ({skipped.total():,} other files); "
            f"video files end in {', '.join(sorted(VIDEO_EXTENSIONS))}"
        )
    refuse = refuse_name if folder.is_local else folder.refuse_outside  # a reader judges local links
    entries = (Entry(readable(path), Reference(None if refuse(path) else folder.uri_of(path))) for path in paths)
    return _listing("folder", _batches(entries), skipped)


def is_video(uri: str) -> bool:
    """Return True for a file with the extension of a video."""
    return not is_pattern(uri) and is_video_name(uri) and _is_file(uri)


def _videos_of_list(uri: str) -> Iterator[Entry]:
    for entry in _read_list(uri):
        if not is_video_name(entry.path):
            raise UserError(f"--fps needs videos, but {uri} names {readable(entry.path)}")
        yield entry


def _is_file(uri: str) -> bool:
    filesystem, path = storage.resolve(uri)
    return bool(filesystem.get_file_info(path).is_file)


def _list_folder(uri: str, allow_root: Sequence[str] | None) -> Listing:
    """List a folder of images; a folder without images may contain tar files, or an incomplete table."""
    folder, skipped = ImageFolder(uri, allow_root=allow_root), Counter[str]()
    try:
        batches = _local_images(folder, skipped) if folder.is_local else _remote_images(folder, skipped)
        return _listing("folder", batches, skipped)
    except UserError:
        files = _files_below(folder)
        if any(file.endswith(".parquet") for file in files):
            open_table(uri, "images")  # raises the specific error
        if any(map(is_video_name, files)) and not any(map(is_image_name, files)):
            raise UserError(f"no image file below {uri}, but videos; set --fps to score their frames") from None
        for file in files:
            if file.lower().endswith(COMPRESSED_SUFFIXES):
                refuse_compressed(storage.join(uri, file))
        shards = [file for file in files if file.lower().endswith(".tar")]
        if not shards:
            raise
        return _tars(uri, shards, folder.roots)


def _listing(
    kind: ListedKind,
    batches: Iterator[pa.RecordBatch],
    skipped: Counter[str] | None = None,
    schema: pa.Schema = LISTING_SCHEMA,
) -> Listing:
    first = next(batches)  # raises the error of invalid data before anything is written
    return Listing(kind, itertools.chain([first], batches), Counter() if skipped is None else skipped, schema)


def _local_images(folder: ImageFolder, skipped: Counter[str]) -> Iterator[pa.RecordBatch]:
    return _batches(
        Entry(readable(path), Reference(folder.uri_of(path) if refuse_name(path) is None else None))
        for path in image_files_below(folder, skipped)
    )


def _remote_images(folder: ImageFolder, skipped: Counter[str]) -> Iterator[pa.RecordBatch]:
    """List the images of a remote folder without a Python object for each."""
    start, _, end = folder.uri_of("\n").partition("\n")
    num_files = num_images = 0
    for files in folder.remote_files():
        num_files += len(files)
        paths = files.filter(pc.match_substring_regex(files, _IMAGE_NAME, ignore_case=True))
        num_images += len(paths)
        skipped["any"] = num_files - num_images
        for at in range(0, len(paths), _BATCH_ROWS):
            own = paths.slice(at, _BATCH_ROWS).cast(pa.string())
            uris = pc.binary_join_element_wise(start, own, end, "")
            uris = pc.if_else(pc.match_substring_regex(own, _OUTSIDE), None, uris)
            none = pa.nulls(len(own), pa.int64())
            columns = [pc.replace_substring(own, "\0", "\\0"), uris, none, none]
            yield pa.RecordBatch.from_arrays(columns, schema=LISTING_SCHEMA)
    if not num_images:
        raise no_image_below(folder, num_files)


def _batches(entries: Iterable[Entry]) -> Iterator[pa.RecordBatch]:
    entries = iter(entries)
    while chunk := list(itertools.islice(entries, _BATCH_ROWS)):
        columns: list[Any] = [[path for path, _ in chunk], *zip(*(reference for _, reference in chunk), strict=True)]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, LISTING_SCHEMA, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, schema=LISTING_SCHEMA)


def _tars(folder: str, shards: list[str], roots: LocalRoots = ANYWHERE) -> Listing:
    return _listing("tar", _batches(_list_tars(folder, shards, roots)))


def _list_tars(folder: str, shards: list[str], roots: LocalRoots) -> Iterator[Entry]:
    """List the images in tar files, given as paths relative to a folder, in order."""
    reader = FileReader(roots=roots)

    def entries_of(shard: str) -> list[Entry]:
        uri = storage.join(folder, shard)
        try:
            with reader.open(uri) as file:
                members = image_members(file, uri)
        except FileNotFoundError:
            raise UserError(f"no such tar file: {uri}") from None
        except (OutsideError, NotAFileError) as error:
            raise UserError(f"cannot read the tar file {uri}: {read_error(error)}") from None
        return [
            Entry(
                f"{shard}/{member.name}", Reference(None if member.leaves_folder else uri, member.offset, member.size)
            )
            for member in members
        ]

    num_images = 0
    for entries in in_order(entries_of, shards):
        num_images += len(entries)
        yield from entries
    if num_images == 0:
        which = storage.join(folder, shards[0]) if len(shards) == 1 else f"the {len(shards)} tar files in {folder}"
        raise UserError(f"no image in {which}; image files end in {', '.join(sorted(IMAGE_EXTENSIONS))}")


def _matching(pattern: str) -> tuple[str, list[str]]:
    """Return the folder that a pattern starts with, and the matching tar files relative to it."""
    first = min(place for character in "*?[{" if (place := pattern.find(character)) >= 0)
    folder, rest = pattern[:first].rpartition("/")[0], pattern[pattern.rindex("/", 0, first) + 1 :]
    shards: list[str] = []
    for expanded in _expand_braces(rest, pattern):
        if not any(character in expanded for character in "*?["):
            shards.append(expanded)
            continue
        parts = expanded.split("/")
        found = _files_below(ImageFolder(folder)) if len(parts) > 1 else storage.list_files(folder)
        shards += [path for path in found if _matches(path.split("/"), parts)]
    if not shards:
        raise UserError(f"no file matches {pattern}")
    for shard in shards:
        if not shard.lower().endswith(".tar"):
            refuse_compressed(storage.join(folder, shard))
            raise UserError(
                f"{pattern} matches {storage.join(folder, shard)}, which is not a .tar file; a pattern must match "
                "only tar files; for images, name their folder or a list of paths"
            )
    return folder, shards


def _files_below(folder: ImageFolder) -> list[str]:
    with suppress(OSError):
        return sorted(list_below(folder))
    return []


def _matches(path: list[str], pattern: list[str]) -> bool:
    return len(path) == len(pattern) and all(fnmatchcase(*pair) for pair in zip(path, pattern, strict=True))


def _expand_braces(text: str, pattern: str) -> list[str]:
    """Expand braces: `a-{08..10}` → a-08, a-09, a-10; `{a,b}` → a, b; several braces in all combinations, in order."""
    pieces = _BRACES.split(text)
    choices = [[piece] if number % 2 == 0 else _choices(piece, pattern) for number, piece in enumerate(pieces)]
    num_shards = 1
    for options in choices:
        num_shards *= len(options)
    if num_shards > MAX_SHARDS:
        raise UserError(f"{pattern} expands to {num_shards:,} files; the limit is {MAX_SHARDS:,}")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    limits = _RANGE.fullmatch(inside)
    if limits:
        first, last = limits.groups()
        if int(last) < int(first) or int(last) - int(first) >= MAX_SHARDS:
            raise UserError(f"{{{inside}}} in {pattern} must count upwards, over at most {MAX_SHARDS:,} files")
        width = len(first) if first.startswith("0") else 0
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    if "," not in inside:
        raise UserError(f"{{{inside}}} in {pattern} must be a range such as {{000..012}} or a choice such as {{a,b}}")
    return inside.split(",")


def _read_list(uri: str) -> Iterator[Entry]:
    """Read the paths and URIs of a list file; relative paths are resolved from the folder of the list."""
    folder = uri.rpartition("/")[0]
    roots: set[str] = set()
    num_lines, num_found, first_missing = 0, 0, ""
    for number, path in _lines(uri):
        full = path if "://" in path or path.startswith("/") else beside(folder, path)
        if path.endswith("/") or (num_lines < CHECKED_LINES and os.path.isdir(full)):  # noqa: PTH112 long names
            raise UserError(f"line {number} of {uri} names a folder: {path}; a list names image files")
        root = "/".join(full.split("/")[:3]) if "://" in full else ""
        if storage.is_web(root):
            # A web server that is down could not be distinguished from a missing image.
            raise UserError(
                f"line {number} of {uri} is a web URL: {path}; copy the images to a folder or object store first"
            )
        if root not in roots or "?" in full or "#" in full:
            refuse_password(full if root else "", what=f"line {number} of {uri}")
            roots.add(root)
            storage.resolve(root or "/")  # refuse an unknown scheme before the run starts
        if num_lines < CHECKED_LINES:
            exists = bool(root) or os.path.exists(full)  # noqa: PTH110 Path raises for names that are too long
            num_found += exists
            first_missing = first_missing or ("" if exists else full)
        num_lines += 1
        if num_lines == CHECKED_LINES:
            _require_any(uri, num_found, num_lines, first_missing)
        yield Entry(path, Reference(full))
    if num_lines == 0:
        raise UserError(f"{uri} is an empty list: it names no images; write one path or URI per line")
    _require_any(uri, num_found, num_lines, first_missing)


def _require_any(uri: str, num_found: int, num_lines: int, first_missing: str) -> None:
    if num_found == 0:
        raise UserError(
            f"none of the first {num_lines:,} files listed in {uri} exists, such as {first_missing}; "
            "relative paths are resolved from the folder of the list"
        )


def _lines(uri: str) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and content of each line that names an image."""
    try:
        opened = FileReader().open(uri)
    except (NotAFileError, ReadError) as error:
        raise UserError(f"cannot read the list {uri}: {read_error(error) or error}") from None
    with opened as file:
        text = text_stream(file)
        try:
            for number, line in enumerate(iter(partial(text.readline, MAX_LINE_CHARS), ""), start=1):
                if len(line) == MAX_LINE_CHARS:
                    raise UserError(f"line {number} of {uri} has more than {MAX_LINE_CHARS:,} characters: not a list")
                path = line.strip()
                if path and not path.startswith("#"):
                    yield number, path
        except UnicodeDecodeError:
            raise UserError(f"{uri} is not text in UTF-8; save the list as UTF-8, one path or URI per line") from None
