"""Exceptions that end a command → one line on the terminal and an exit code."""

import errno
import os
import traceback

from raydet.common.errors import RunError, UserError, one_line, printable, shortened
from raydet.common.redaction import without_secrets

TRACEBACK_VARIABLE = "RAYDET_TRACEBACK"
"""Environment variable; any value adds the traceback of an unexpected error."""
_LONGEST_LINE, _LONGEST_NAME = 1900, 300
_MISTAKES = (
    *(errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENXIO, errno.ENOTEMPTY),
)
"""Errors of the operating system that follow from a wrong path, rather than from the state of the machine."""


def lines_of(error: Exception) -> tuple[list[str], int]:
    """Describe an exception for the terminal, without secrets.

    Returns:
        The lines, one unless a traceback is wanted, and the exit code: 2 for a mistake in the input, 1 for a failure.
    """
    text, code = _description(error)
    words = printable(one_line(without_secrets(text))).split(" ")
    line = shortened(" ".join(shortened(word, _LONGEST_NAME) for word in words), _LONGEST_LINE)
    lines = [f"raydet: error: {line}"]
    if os.environ.get(TRACEBACK_VARIABLE):
        lines.insert(0, printable(without_secrets("".join(traceback.format_exception(error)).rstrip())))
    return lines, code


def _description(error: Exception) -> tuple[str, int]:
    if isinstance(error, (UserError, RunError)):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or use a machine with more memory", RunError.exit_code
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        is_mistake = error.errno in _MISTAKES and error.filename is not None
        advice = "check the path" if is_mistake else "run the same command again once this is repaired"
        reason = error.strerror or one_line(error, limit=500)
        return f"{place}{reason}; {advice}", UserError.exit_code if is_mistake else RunError.exit_code
    if isinstance(error, UnicodeError):
        return f"a name or a text is not valid Unicode: {one_line(error, limit=300)}", UserError.exit_code
    if isinstance(error, ValueError) and "null byte" in str(error):
        return "a path contains a NUL character, which no file name may have", UserError.exit_code
    reason = one_line(error, limit=500)
    advice = f"please report this, with the traceback that {TRACEBACK_VARIABLE}=1 prints"
    return f"unexpected {type(error).__name__}: {reason}; {advice}", RunError.exit_code
