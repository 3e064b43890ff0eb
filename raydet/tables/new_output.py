"""Atomic outputs that appear complete or not at all: a page, a JSON or ONNX file, an exported folder.

A lock file beside each output allows several outputs in one folder, written one after another or simultaneously.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pyarrow import fs as pafs

from raydet.common.errors import UserError
from raydet.tables import storage
from raydet.tables.folder_lock import Hold, hold
from raydet.tables.output_errors import one_line_errors, refuse_place

_COPY_CHUNK_BYTES = 2**20


@contextlib.contextmanager
def new_folder(out: str, *, command: str) -> Iterator[Path]:
    """Context manager: yield a local folder to fill, which appears at `out` only if the block succeeds.

    Raises:
        UserError: `out` already contains files, another run is writing it, or its name is invalid.
        RunError: The disk is full, or there is no permission to write `out`.
    """
    out = storage.absolute_uri(out)
    with one_line_errors(out):
        refuse_place(out, pafs.FileType.File, "is a file; --out must name a folder")
        with _hold_place(out, command):
            _refuse_content(out)
            filesystem, path = storage.resolve(out)
            if not isinstance(filesystem, pafs.LocalFileSystem):
                with tempfile.TemporaryDirectory(prefix="raydet-") as name:
                    yield Path(name)
                    _upload(Path(name), filesystem, path)
                return
            _remove_partials(Path(path))
            partial = Path(path).with_name(storage.partial_name(Path(path).name))
            partial.mkdir()
            try:
                yield partial
                partial.rename(path)
            except BaseException:
                storage.delete_folder(str(partial))
                raise


@contextlib.contextmanager
def new_file(out: str, *, command: str, endings: Sequence[str]) -> Iterator[BinaryIO]:
    """Context manager: yield a file to write, which replaces `out` only if the block succeeds.

    The name of `out` must end in one of the given endings, such as `.json`.

    Raises:
        UserError: `out` has a different ending or is a folder, another run is writing it, or its name is invalid.
        RunError: The disk is full, or there is no permission to write `out`.
    """
    out = storage.absolute_uri(out)
    if not out.partition("?")[0].endswith(tuple(endings)):
        raise UserError(f"--out must name a file that ends in {' or '.join(endings)}, got {out}")
    with one_line_errors(out):
        refuse_place(out, pafs.FileType.Directory, f"is a folder; --out must name a file that ends in {endings[0]}")
        with _hold_place(out, command):
            if storage.is_local(out):
                _remove_partials(Path(storage.resolve(out)[1]))
                with storage.open_output(out, sync=True) as file:
                    yield file
                return
            # A partial upload cannot be undone, so the file is written locally and uploaded when complete.
            with tempfile.TemporaryFile() as local:
                yield local
                local.seek(0)
                with storage.open_output(out) as file:
                    shutil.copyfileobj(local, file, _COPY_CHUNK_BYTES)


@contextlib.contextmanager
def _hold_place(out: str, command: str) -> Iterator[Hold]:
    """Lock an output by a lock file beside it."""
    folder, name = storage.split(out)
    with hold(folder, f".{name}.lock", out=out, command=command) as held:
        yield held


def _remove_partials(target: Path) -> None:
    for entry in target.parent.iterdir():
        if storage.is_partial(entry.name, of=target.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()


def _refuse_content(out: str) -> None:
    filesystem, path = storage.resolve(out)
    if isinstance(filesystem, pafs.LocalFileSystem):
        names = sorted(entry.name for entry in Path(path).iterdir()) if Path(path).exists() else []
    else:
        names = storage.list_files(out, recursive=True)
    if names:
        raise UserError(f"--out {out} already contains files, such as {names[0]}; choose another --out, or remove it")


def _upload(folder: Path, filesystem: pafs.FileSystem, path: str) -> None:
    try:
        pafs.copy_files(str(folder), path, destination_filesystem=filesystem)
    except BaseException:
        filesystem.delete_dir_contents(path, missing_dir_ok=True)
        raise
