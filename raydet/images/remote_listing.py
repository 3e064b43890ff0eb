"""Parallel listing of an object store: a prefix with millions of keys → sorted Arrow arrays of file paths.

A store lists the keys of one prefix page by page. Several prefixes are listed at the same time, and each result becomes
an Arrow array immediately, because a list of Python strings takes several times as much memory.
"""

import bisect
from collections.abc import Iterator

import pyarrow as pa
from pyarrow import fs as pafs

from raydet.common.threads import in_order

_MIN_FOLDERS = 1024
"""More folders limit the memory of each result; fewer save requests."""


def files_below(
    filesystem: pafs.FileSystem, root: str, *, min_folders: int = _MIN_FOLDERS
) -> Iterator[pa.LargeStringArray]:
    """Yield the files below a folder as relative paths in ascending order; an absent folder has none.

    Folders are listed level by level, each level in parallel, until there are enough of them; then each is listed in
    one go with everything below it. Only the results of a few folders are in memory at a time. The files of a single
    folder are listed by a single thread.

    Args:
        filesystem: File system, used by many threads.
        root: Folder inside the file system, without a trailing slash.
        min_folders: Number of folders at which the search by levels ends, and each folder is listed in one go.
    """
    places: list[str | pa.LargeStringArray] = [""]
    while 0 < sum(isinstance(place, str) for place in places) < min_folders:
        levels = in_order(lambda place: _level(filesystem, root, place), places)
        places = [place for level in levels for place in level]
    yield from in_order(lambda place: _all_below(filesystem, root, place), places)


def _all_below(filesystem: pafs.FileSystem, root: str, place: str | pa.LargeStringArray) -> pa.LargeStringArray:
    """List all files below a folder, which ends with `/`; return an array of listed files as it is."""
    if not isinstance(place, str):
        return place
    files, _ = _list(filesystem, root, place, recursive=True)
    return _as_array(files)


def _level(filesystem: pafs.FileSystem, root: str, place: str | pa.LargeStringArray) -> list[str | pa.LargeStringArray]:
    """List one level of a folder: its subfolders, and runs of files between them, in the order of complete paths."""
    if not isinstance(place, str):
        return [place]
    files, folders = _list(filesystem, root, place, recursive=False)
    if place in folders:  # keys with an empty component, such as `a//b`, which have no folder of their own
        return [_all_below(filesystem, root, place)]
    level: list[str | pa.LargeStringArray] = []
    start = 0
    for folder in folders:
        # Files below `a/` sort between the files `a-1.jpg` and `a0.jpg`.
        stop = bisect.bisect(files, folder)
        level += [_as_array(files[start:stop]), folder] if start < stop else [folder]
        start = stop
    return [*level, _as_array(files[start:])] if start < len(files) else level


def _list(filesystem: pafs.FileSystem, root: str, folder: str, *, recursive: bool) -> tuple[list[str], list[str]]:
    """List the files and the subfolders, which end with `/`, as sorted paths relative to the root."""
    path = f"{root}/{folder}".rstrip("/")
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
    # Some fsspec file systems return paths with a leading slash.
    skip = len(root.strip("/")) + 1
    files = sorted(info.path.strip("/")[skip:] for info in infos if info.is_file)
    folders = [] if recursive else sorted(f"{info.path.strip('/')[skip:]}/" for info in infos if not info.is_file)
    return files, folders


def _as_array(files: list[str]) -> pa.LargeStringArray:
    return pa.array(files, pa.large_string())
