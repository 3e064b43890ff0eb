"""File access at URIs and local paths through pyarrow file systems.

If an object store returns a server error (500, 503, "slow down"), drops the connection or does not respond, each
request is retried for about a minute; then its error is raised as an OSError. The clients inside pyarrow's file systems
retry, so this holds for everything read or written through `resolve`, including ranges of a Parquet file and parts of
an upload. Missing files and missing permissions are not retried.
"""

import contextlib
import errno
import inspect
import io
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from raydet.common.errors import UserError, one_line
from raydet.common.untrusted.documents import MAX_JSON_BYTES, MAX_YAML_BYTES, DocumentError, parse_json, parse_yaml
from raydet.common.untrusted.opening import ANYWHERE, LocalRoots, NotAFileError

S3_ATTEMPTS = 11
"""Attempts per S3 request. The client waits 25 ms, 50 ms, … 25.6 s between them, 51 s in total.

Its "standard" strategy, the alternative, has jitter, but about a hundred failed attempts exhaust a retry budget that
all threads share: thirty concurrent reads did not survive ten seconds of 503.
"""
GCS_RETRY_S = 60
"""Retry time per request to Google Cloud Storage; its client adds jitter."""
REMOTE_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Schemes of remote stores that pyarrow supports natively."""
WEB_SCHEMES = ("http", "https")
_TOKEN_BYTES = 8
_S3_OPTIONS_LOST_ON_COPY = {"smart_defaults", "tls_verify_certificates", "tls_ca_dir_path"}


def is_web(uri: str) -> bool:
    """Return True if a URI starts with http:// or https://, ignoring case."""
    return uri.partition("://")[0].lower() in WEB_SCHEMES and "://" in uri


def absolute_uri(uri: str) -> str:
    """Make a local path absolute, for workers with different working directories; return URIs unchanged."""
    if "://" in uri:
        return uri
    return os.path.abspath(os.path.expanduser(uri))


def refuse_no_place(uri: str) -> None:
    """Refuse the URI of a remote store that names no bucket.

    Raises:
        UserError: The URI ends after its scheme.
    """
    scheme, separator, place = uri.partition("://")
    if separator and scheme.lower() in REMOTE_SCHEMES and not place.partition("?")[0].strip("/"):
        raise UserError(f"{uri} names no bucket; write {scheme}://BUCKET/PATH")


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Open the file system of a URI.

    Args:
        uri: A local path, ``file://``, ``s3://``, ``gs://`` or any other scheme that pyarrow or fsspec supports.

    Returns:
        The file system and the path inside it, without a trailing slash. An S3 file system loses its
        retry strategy when pickled, so resolve the URI in the process that uses it.

    Raises:
        UserError: The scheme is unknown, or the URI is incomplete.
        OSError: The store cannot be reached.
    """
    uri = absolute_uri(uri)
    if "\0" in uri:
        raise UserError(f"{uri} contains a NUL character, which no name may have")
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri.rstrip("/") or "/"
    refuse_no_place(uri)
    scheme = urlsplit(uri).scheme
    try:
        filesystem, path = pafs.FileSystem.from_uri(_with_gcs_retries(uri))
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and scheme in REMOTE_SCHEMES:
            raise  # looking up the bucket's region is a request, which may fail
        filesystem = _fsspec_file_system(scheme)
        if filesystem is None:
            raise UserError(f"cannot open {uri}: {error}") from None
        path = uri.split("://", 1)[1]
    if (
        isinstance(filesystem, pafs.S3FileSystem)
        and not _S3_OPTIONS_LOST_ON_COPY & parse_qs(urlsplit(uri).query).keys()
    ):
        filesystem = _with_s3_retries(filesystem)
    return filesystem, path.rstrip("/")


def _fsspec_file_system(scheme: str) -> pafs.FileSystem | None:
    """Return fsspec's file system for a scheme; None if there is none, or if it needs more than the scheme."""
    import fsspec

    try:
        known = fsspec.get_filesystem_class(scheme) if scheme else None
        if known is None:
            return None
        _, *options = inspect.signature(known.__init__).parameters.values()
        if any(option.default is option.empty and option.kind is option.POSITIONAL_OR_KEYWORD for option in options):
            return None
        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))
    except (ValueError, ImportError):
        return None


def _with_s3_retries(filesystem: pafs.S3FileSystem) -> pafs.S3FileSystem:
    # from_uri creates a client that gives up after six seconds, and no URI option changes that.
    _, (options,) = filesystem.__reduce__()
    return pafs.S3FileSystem(**options, retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=S3_ATTEMPTS))


def _with_gcs_retries(uri: str) -> str:
    query = urlsplit(uri).query
    if urlsplit(uri).scheme not in ("gs", "gcs") or "retry_limit_seconds" in parse_qs(query):
        return uri
    return f"{uri}{'&' if query else '?'}retry_limit_seconds={GCS_RETRY_S}"


def is_local(uri: str) -> bool:
    """Return True if a URI refers to this machine's file system."""
    return isinstance(resolve(uri)[0], pafs.LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """Append path components to a URI, before any options after `?`."""
    path, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + options


def split(uri: str) -> tuple[str, str]:
    """Return the parent folder of a URI, with its options, and its last component."""
    path, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    folder, _, name = path.rstrip("/").rpartition("/")
    return f"{folder or '/'}{mark}{options}", name


def exists(uri: str) -> bool:
    """Return True if the file or folder exists."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def is_folder(uri: str) -> bool:
    """Return True if there is a folder of this name."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type == pafs.FileType.Directory)


def open_stream(uri: str) -> pa.NativeFile | io.BufferedReader:
    """Open a file for sequential reading, without decompression; a local one must be a regular file."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        return io.BufferedReader(ANYWHERE.open(path))
    return filesystem.open_input_stream(path, compression=None)


def read_bytes(uri: str, *, max_bytes: int | None = None, roots: LocalRoots = ANYWHERE) -> bytes:
    """Read a file; a local one must be a regular file in `roots`.

    Raises:
        OSError: The file cannot be read, or is larger than `max_bytes`.
    """

    def refuse_size(num_bytes: int) -> None:
        if max_bytes is not None and num_bytes > max_bytes:
            raise OSError(errno.EFBIG, f"it is larger than {max_bytes / 1e6:,.0f} MB")

    filesystem, path = resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        return roots.read(path, refuse_size)
    with filesystem.open_input_stream(path, compression=None) as stream:
        data: bytes = stream.read() if max_bytes is None else stream.read(max_bytes + 1)
    refuse_size(len(data))
    return data


def read_yaml(uri: str) -> Any:
    """Read a YAML document of plain values, within the limits of `parse_yaml`.

    Raises:
        DocumentError: It is not YAML, or exceeds a limit.
        OSError: The file cannot be read.
    """
    with open_stream(uri) as stream:
        return parse_yaml(stream.read(MAX_YAML_BYTES + 1))


def read_given_yaml(uri: str, what: str) -> Any:
    """Read a YAML document that the user names; `what` describes it in messages.

    Raises:
        UserError: The file is missing, or cannot be read.
    """
    try:
        return read_yaml(uri)
    except FileNotFoundError:
        raise UserError(f"no such {what}: {uri}") from None
    except (DocumentError, OSError) as error:
        raise UserError(f"cannot read the {what} {uri}: {one_line(error)}") from None


def read_json(uri: str, *, allow_nan: bool = False) -> Any:
    """Read a JSON document, within the limits of `read_limited` and `parse_json`; raises as these do."""
    return parse_json(read_limited(uri, MAX_JSON_BYTES), allow_nan=allow_nan)


def read_limited(uri: str, max_bytes: int) -> bytes:
    """Read a file that a stranger may have made: a regular file, not a link, of limited size.

    Raises:
        UserError: It is something else, or too large.
        FileNotFoundError: It does not exist.
    """
    with open_input(uri) as file:
        if file.size() > max_bytes:
            raise UserError(f"{uri} is larger than {max_bytes // 2**20} MiB")
        data: bytes = file.read(max_bytes)
    return data


def open_input(uri: str) -> pa.NativeFile:
    """Open a file that a stranger may have made, for random access: a regular file, and not a link.

    A local file is judged once it is open, so that nothing can be put in its place; opening waits for no pipe.

    Raises:
        UserError: It is a link, pipe, device or folder.
        FileNotFoundError: It does not exist.
    """
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return filesystem.open_input_file(path)
    try:
        descriptor, _ = ANYWHERE.descriptor_of(path, follows_links=False)
    except NotAFileError as error:
        raise UserError(f"{uri} cannot be read: {error.strerror}; copy the file itself") from None
    try:
        return filesystem.open_input_file(f"/dev/fd/{descriptor}")  # opens the same file again
    finally:
        os.close(descriptor)


def read_range(uri: str, offset: int, size: int) -> bytes:
    """Read up to `size` bytes of a file from an offset; fewer if the file ends within this range."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as file:
        data: bytes = file.read_at(size, offset)
    return data


@contextlib.contextmanager
def open_output(uri: str, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Context manager: yield a new file that replaces `uri` when the block succeeds.

    Until then readers see the old content, or no file. A local file is written under an unpredictable name in the same
    folder and then renamed, so an existing symbolic link is replaced and never followed. A killed upload to an object
    store leaves no object; its parts stay in the store, invisible, until a lifecycle rule for incomplete uploads
    removes them. Missing parent folders are created. `sync` flushes a local file to disk before renaming, so that it
    survives a power failure.
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
        # Garbage collection would close the stream and publish the partial object, so close and delete it here.
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
    """Return an unpredictable temporary name for a file or folder that is renamed to `name` when complete."""
    return f".{_truncated(name)}.{secrets.token_hex(_TOKEN_BYTES)}.partial"


def is_partial(name: str, *, of: str | None = None) -> bool:
    """Return True for names made by `partial_name`, for the file or folder `of` or for any."""
    prefix = ".+" if of is None else re.escape(_truncated(of))
    return re.fullmatch(rf"\.{prefix}\.[0-9a-f]{{{2 * _TOKEN_BYTES}}}\.partial", name, re.S) is not None


def _truncated(name: str) -> str:
    # Most file systems limit names to 255 bytes.
    return name.encode(errors="surrogateescape")[:200].decode(errors="ignore")


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a file atomically: readers see either the old or the new content."""
    with open_output(uri, sync=True) as file:
        file.write(data)


def list_files(uri: str, *, recursive: bool = False) -> list[str]:
    """List the files in a folder as sorted relative paths; an absent folder has none."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
    # Some fsspec file systems return paths with a leading slash.
    prefix = path.strip("/") + "/"
    return sorted(info.path.lstrip("/").removeprefix(prefix) for info in infos if info.type == pafs.FileType.File)


def list_folders(uri: str) -> list[str]:
    """List the folders in a folder as sorted names; an absent folder has none."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)


def make_folder(uri: str) -> None:
    """Create a folder and its parents; a no-op on object stores."""
    filesystem, path = resolve(uri)
    filesystem.create_dir(path, recursive=True)


def delete_file(uri: str) -> None:
    """Remove a file, if it exists."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.File:
        filesystem.delete_file(path)


def delete_folder(uri: str) -> None:
    """Remove a folder with its contents, if it exists."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)


def publish_folder(local_folder: str, uri: str) -> None:
    """Replace the folder at a URI with a finished local folder.

    On a local disk the swap takes two renames; `recover_folder` repairs the state after a kill between them. Files and
    folders get permissions from the umask, not from `local_folder`. Object stores have no rename: the files are copied,
    each atomically.
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
    """Undo a `publish_folder` that was killed before the new folder was in place, and remove its partial folders."""
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
    """Copy a folder from a URI to this machine."""
    filesystem, path = resolve(uri)
    for name in list_files(uri, recursive=True):
        target = Path(local_folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(f"{path}/{name}", str(target), source_filesystem=filesystem)


def has_code(error: OSError, *codes: int) -> bool:
    """Return True if an error has one of the codes (`errno.ENOSPC`, …), even if only its text survived Ray."""
    return error.errno in codes or any(os.strerror(code) in str(error) for code in codes)
