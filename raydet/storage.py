"""Where bytes live: a URI or local path → a pyarrow file system and a path in it."""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from raydet.errors import UserError


def absolute_uri(uri: str) -> str:
    """Makes a local path absolute, so that workers with another working directory find it; URIs stay as they are."""
    if "://" in uri:
        return uri
    return os.path.abspath(os.path.expanduser(uri))


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Opens the file system behind a URI.

    Args:
        uri: A local path, ``file://``, ``s3://``, ``gs://`` or anything else that pyarrow or fsspec knows.

    Returns:
        The file system and the path inside it, without a trailing slash.

    Raises:
        UserError: No file system is known for the scheme.
    """
    uri = absolute_uri(uri)
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri.rstrip("/") or "/"
    scheme = urlsplit(uri).scheme
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        try:
            import fsspec

            filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))
            path = uri.split("://", 1)[1]
        except (ValueError, ImportError):
            raise UserError(f"cannot open {uri}: {error}") from None
    return filesystem, path.rstrip("/")


def is_local(uri: str) -> bool:
    """Whether the URI names a place in this machine's own file tree."""
    return isinstance(resolve(uri)[0], pafs.LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """Appends path components to a URI."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """Reads one whole file."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path, compression=None) as stream:
        data: bytes = stream.readall()
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Writes one whole file; on a local disk a reader sees the old content or the new, never half of it."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                # Or a loss of power may leave the new name with none of the new content.
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        return
    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(data)


def list_files(uri: str, *, recursive: bool = False) -> list[str]:
    """Lists the files below a folder, as sorted paths relative to it; an absent folder has none."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
    # fsspec's own file systems may list with a leading slash what was asked for without.
    prefix = path.strip("/") + "/"
    return sorted(info.path.lstrip("/").removeprefix(prefix) for info in infos if info.type == pafs.FileType.File)


def make_folder(uri: str) -> None:
    """Creates a folder with its parents; object stores need none."""
    filesystem, path = resolve(uri)
    filesystem.create_dir(path, recursive=True)


def delete_file(uri: str) -> None:
    """Removes a file; an absent one is fine."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.File:
        filesystem.delete_file(path)


def delete_folder(uri: str) -> None:
    """Removes a folder and what is in it; an absent one is fine."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)


def publish_folder(local_folder: str, uri: str) -> None:
    """Puts a finished local folder in the place of the one at a URI.

    On a local disk the change is two renames, and `recover_folder` mends what a kill between them leaves. Object
    stores have no rename: the files are copied, each of them whole.
    """
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        pafs.copy_files(local_folder, path, destination_filesystem=filesystem)
        return
    partial, previous = _neighbours(path)
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(local_folder, partial)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"cannot write {uri}: {error}") from error
    if Path(path).exists():
        Path(path).rename(previous)
    partial.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(uri: str) -> None:
    """Undoes a `publish_folder` that was killed before the new folder stood in its place."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        partial, previous = _neighbours(path)
        if previous.exists() and not Path(path).exists():
            previous.rename(path)
        shutil.rmtree(partial, ignore_errors=True)


def _neighbours(path: str) -> tuple[Path, Path]:
    target = Path(path)
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.previous")


def fetch_folder(uri: str, local_folder: str) -> None:
    """Copies a folder, from wherever it is, to this machine."""
    filesystem, path = resolve(uri)
    for name in list_files(uri, recursive=True):
        target = Path(local_folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(f"{path}/{name}", str(target), source_filesystem=filesystem)
