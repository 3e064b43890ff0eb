"""One-line errors for failures of file systems and object stores while a command writes its output."""

import contextlib
import errno
from collections.abc import Iterator

from pyarrow import fs as pafs

from raydet.common.errors import RunError, UserError, one_line
from raydet.tables import storage

_WRONG_NAME = (errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def one_line_errors(out: str) -> Iterator[None]:
    """Context manager: convert an OSError of the block to a one-line UserError or RunError."""
    try:
        yield
    except OSError as error:
        raise refusal_of(error, out) from error


def refusal_of(error: OSError, out: str) -> UserError | RunError:
    """Convert an error of a file system or object store to a one-line error of the run that writes `out`."""
    reason = one_line(error.strerror or error)
    place = str(error.filename) if error.filename else out
    if storage.has_code(error, *_NO_ROOM):
        return RunError(f"cannot write to {out}: {reason}; free space and run the same command again")
    if storage.has_code(error, *_NO_RIGHT):
        advice = "or choose another --out" if place.startswith(out) else "and run the same command again"
        return RunError(f"no permission for {place}: {reason}; grant it {advice}")
    if error.errno in _WRONG_NAME and (place.startswith(out) or out.startswith(place)):
        return UserError(f"--out {out} cannot be written: {reason}; choose another --out")
    return RunError(f"cannot read or write {place}: {reason}; run the same command again")


def refuse_place(out: str, kind: pafs.FileType, reason: str) -> None:
    """Refuse an output that is a web URL or already exists as the wrong kind; the reason follows `--out OUT`.

    Raises:
        UserError: The output is refused.
    """
    if "\0" in out:
        raise UserError(f"--out {out} contains a NUL character, which no name may have; choose another --out")
    if storage.is_web(out):
        raise UserError(f"--out {out} is a web URL, which raydet cannot write; use a path, s3:// or gs://")
    filesystem, path = storage.resolve(out)
    if filesystem.get_file_info(path).type == kind:
        raise UserError(f"--out {out} {reason}")
