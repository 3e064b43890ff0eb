"""Where bytes live: a URI or local path → a pyarrow file system and a path in it.

A server of an object store that answers with errors of its own (500, 503, "slow down"), drops connections or does not
answer is asked again, for about a minute in each request; then its error is raised, as an OSError. This is done by the
clients within pyarrow's file systems, so that it holds for everything that is read or written through `resolve`, the
ranges of a Parquet file and the parts of an upload too. What is not there or not allowed is said at once.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from raydet.common.errors import UserError

S3_ATTEMPTS = 11
"""Of a request to S3. The client waits 25 ms, 50 ms, … 25.6 s between them, 51 s in all.

Its "standard" strategy, the other one to choose, has jitter but gives up for all threads together once some hundred
attempts have failed: thirty reads side by side did not live through ten seconds of 503.
"""
GCS_RETRY_S = 60
"""For how long a request to Google Cloud Storage is tried; its client adds the jitter."""
REMOTE_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Of stores that pyarrow itself speaks to over a network."""
WEB_SCHEMES = ("http", "https")
_TOKEN_BYTES = 8
_S3_OPTIONS_OUT_OF_REACH = {"smart_defaults", "tls_verify_certificates", "tls_ca_dir_path"}


def is_web(uri: str) -> bool:
    """Whether a URI begins with http:// or https://, in whatever case."""
    return uri.partition("://")[0].lower() in WEB_SCHEMES and "://" in uri


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
        The file system and the path inside it, without a trailing slash. Pickling the one of S3 loses its patience:
        resolve the URI where it is used.

    Raises:
        UserError: No file system is known for the scheme.
        OSError: The store cannot be reached.
    """
    uri = absolute_uri(uri)
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri.rstrip("/") or "/"
    scheme = urlsplit(uri).scheme
    try:
        filesystem, path = pafs.FileSystem.from_uri(_with_gcs_retries(uri))
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and scheme in REMOTE_SCHEMES:
            raise  # where a bucket is has to be asked for, and that may fail as any request may
        try:
            import fsspec

            filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))
            path = uri.split("://", 1)[1]
        except (ValueError, ImportError):
            raise UserError(f"cannot open {uri}: {error}") from None
    if (
        isinstance(filesystem, pafs.S3FileSystem)
        and not _S3_OPTIONS_OUT_OF_REACH & parse_qs(urlsplit(uri).query).keys()
    ):
        filesystem = _with_s3_retries(filesystem)
    return filesystem, path.rstrip("/")


def _query_names(uri: str) -> set[str]:
    return set(parse_qs(urlsplit(uri).query))


def _with_s3_retries(filesystem: pafs.S3FileSystem) -> pafs.S3FileSystem:
    # As from_uri makes it, it gives up after six seconds, and there is no parameter of the URI that changes this.
    _, (options,) = filesystem.__reduce__()
    return pafs.S3FileSystem(**options, retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=S3_ATTEMPTS))


def _with_gcs_retries(uri: str) -> str:
    names = _query_names(uri)
    if urlsplit(uri).scheme not in ("gs", "gcs") or "retry_limit_seconds" in names:
        return uri
    return f"{uri}{'&' if names else '?'}retry_limit_seconds={GCS_RETRY_S}"


def is_local(uri: str) -> bool:
    """Whether the URI names a place in this machine's own file tree."""
    return isinstance(resolve(uri)[0], pafs.LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """Appends path components to a URI, before the options that may stand behind a `?`."""
    path, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + options


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def open_stream(uri: str) -> pa.NativeFile:
    """Opens a file to be read from its beginning, as it is."""
    filesystem, path = resolve(uri)
    return filesystem.open_input_stream(path, compression=None)


def read_bytes(uri: str) -> bytes:
    """Reads one whole file."""
    with open_stream(uri) as stream:
        data: bytes = stream.readall()
    return data


def read_range(uri: str, offset: int, size: int) -> bytes:
    """Reads a part of a file.

    Args:
        uri: The file.
        offset: Bytes before the part.
        size: Bytes of the part.

    Returns:
        The part; shorter than asked for, where the file ends within it.
    """
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as file:
        data: bytes = file.read_at(size, offset)
    return data


def file_size(uri: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: There is no file of that name.
    """
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(f"there is no file {uri}")
    return int(info.size)


@contextlib.contextmanager
def open_output(uri: str, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Opens a new file that appears at `uri`, complete, when the `with` block ends without an exception.

    Until then a reader sees the old content or none. A local file is written under an unpredictable name beside its
    place and then renamed, so that a link in that place is replaced and never written through.
    An upload to an object store that was killed leaves no object. Its parts stay with the store, invisible, until
    a rule of the bucket for incomplete uploads removes them.

    Args:
        uri: Path or URI of the file; missing parent folders are created.
        sync: Flush a local file to the disk before it is renamed, so that it survives a loss of power.
    """
    filesystem, path = resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        with _local_output(Path(path), sync=sync) as file:
            yield file
        return
    stream: pa.NativeFile | None = None
    try:
        stream = filesystem.open_output_stream(path, compression=None)
        yield stream
        stream.close()
    except OSError:
        raise
    except BaseException:
        # Interrupted: dropping the stream closes it, and that makes an object of what has been written so far.
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
            filesystem.delete_file(path)
        raise


@contextlib.contextmanager
def _local_output(path: Path, *, sync: bool) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        partial = partial_name(path.name)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=folder)
            raise
    finally:
        os.close(folder)


def partial_name(name: str) -> str:
    """Returns an unpredictable name under which to write a file or folder before it is renamed to `name`."""
    return f".{_beginning(name)}.{secrets.token_hex(_TOKEN_BYTES)}.partial"


def is_partial(name: str, *, of: str | None = None) -> bool:
    """Returns True for names that `partial_name` gives: for the file or folder `of`, or for any."""
    beginning = ".+" if of is None else re.escape(_beginning(of))
    return re.fullmatch(rf"\.{beginning}\.[0-9a-f]{{{2 * _TOKEN_BYTES}}}\.partial", name, re.S) is not None


def _beginning(name: str) -> str:
    # A name may have 255 bytes on most file systems.
    return name.encode(errors="surrogateescape")[:200].decode(errors="ignore")


def write_bytes(uri: str, data: bytes) -> None:
    """Writes one whole file: a reader sees the old content or the new, never half of it."""
    with open_output(uri, sync=True) as file:
        file.write(data)


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

    On a local disk the change is two renames, and `recover_folder` mends what a kill between them leaves. Files and
    folders get the permissions of the umask, whatever those of `local_folder` are. Object stores have no rename: the
    files are copied, each of them whole.
    """
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        pafs.copy_files(local_folder, path, destination_filesystem=filesystem)
        return
    target, previous = Path(path), _previous(path)
    recover_folder(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(partial_name(target.name))
    try:
        _copy_contents(Path(local_folder), partial)
        if target.exists():
            target.rename(previous)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(error.errno or 0, f"cannot write {uri}: {error.strerror or error}") from error
    shutil.rmtree(previous, ignore_errors=True)


def _copy_contents(source: Path, target: Path) -> None:
    target.mkdir()
    for entry in source.iterdir():
        if entry.is_dir():
            _copy_contents(entry, target / entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)


def recover_folder(uri: str) -> None:
    """Undoes a `publish_folder` that was killed before the new folder stood in its place."""
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return
    target, previous = Path(path), _previous(path)
    if previous.is_dir() and not previous.is_symlink() and not target.exists():
        previous.rename(target)
    if previous.is_symlink():
        previous.unlink()
    shutil.rmtree(previous, ignore_errors=True)
    if target.parent.is_dir():
        for entry in target.parent.iterdir():
            if is_partial(entry.name, of=target.name):
                shutil.rmtree(entry, ignore_errors=True)


def _previous(path: str) -> Path:
    target = Path(path)
    return target.with_name(f".{target.name}.previous")


def fetch_folder(uri: str, local_folder: str) -> None:
    """Copies a folder, from wherever it is, to this machine."""
    filesystem, path = resolve(uri)
    for name in list_files(uri, recursive=True):
        target = Path(local_folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(f"{path}/{name}", str(target), source_filesystem=filesystem)


def has_code(error: OSError, *codes: int) -> bool:
    """Whether an error is of one of these kinds (`errno.ENOSPC`, …); by way of Ray only its text may be left."""
    return error.errno in codes or any(os.strerror(code) in str(error) for code in codes)
