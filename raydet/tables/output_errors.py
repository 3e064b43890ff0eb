"""Errors of file systems and object stores while a command writes its output, each as one line."""

import contextlib
import errno
from collections.abc import Iterator

from pyarrow import fs as pafs

from raydet.common.errors import RunError, UserError
from raydet.tables import storage

_WRONG_NAME = (errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def one_line_errors(out: str) -> Iterator[None]:
    """Raises an OSError in the `with` block as UserError or RunError, in one line."""
    try:
        yield
    except OSError as error:
        raise refusal_of(error, out) from error


def refusal_of(error: OSError, out: str) -> UserError | RunError:
    """Says in one line what an error of a file system or object store means for a run that writes `out`."""
    reason = " ".join(str(error.strerror or error).split()) or type(error).__name__
    place = str(error.filename) if error.filename else out
    if storage.has_code(error, *_NO_ROOM):
        return RunError(f"cannot write to {out}: {reason}; make room and run the same command again")
    if storage.has_code(error, *_NO_RIGHT):
        advice = "get it, or choose another --out" if place.startswith(out) else "get it and run the same command again"
        return RunError(f"no permission for {place}: {reason}; {advice}")
    if error.errno in _WRONG_NAME and (place.startswith(out) or out.startswith(place)):
        return UserError(f"--out {out} cannot be written: {reason}; choose another --out")
    return RunError(f"cannot read or write {place}: {reason}; run the same command again")


def refuse_place(out: str, kind: pafs.FileType, reason: str) -> None:
    """Refuses an output that is a web address, or in whose place there is something of the wrong kind.

    Raises:
        UserError: It is one.
    """
    if storage.is_web(out):
        raise UserError(f"--out {out} is a web address, which raydet cannot write; use a path, s3:// or gs://")
    filesystem, path = storage.resolve(out)
    if filesystem.get_file_info(path).type == kind:
        raise UserError(f"--out {out} {reason}")
