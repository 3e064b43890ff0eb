"""Exceptions that the command line prints as one line; any other exception is a bug and keeps its traceback."""

import re
import signal

_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


class UserError(ValueError):
    """Invalid input; the message says what is wrong, where, and what would be right."""

    exit_code = 2


class RunError(RuntimeError):
    """Failure of a run with valid input; the message says what failed and how to proceed."""

    exit_code = 1


class RunStopped(RunError):  # noqa: N818 - stopping on request is not an error
    """Stop requested by a signal, after saving what is needed to resume; the exit code is 128 + the signal number."""

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def printable(text: str) -> str:
    """Escape what could control a terminal or disguise text.

    This is all control characters except line breaks and tabs, invisible characters, marks that change the direction of
    text, separators of lines, and halves of surrogate pairs.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def first_line(message: object, *, otherwise: str | None = None) -> str:
    """Return the first line of a text or exception that is not blank, or else `otherwise` or the name of its type."""
    lines = (line.strip() for line in str(message).splitlines())
    blank = type(message).__name__ if otherwise is None else otherwise
    return next((line for line in lines if line), blank)


def one_line(message: object, *, limit: int | None = None) -> str:
    """Collapse a text or exception into one line; an exception without a message is shown by the name of its type.

    A line of more than `limit` characters is cut and ends in an ellipsis.
    """
    text = " ".join(str(message).split())
    if not text and isinstance(message, BaseException):
        text = type(message).__name__
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"


def shortened(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters: a longer one keeps its start and, as a quarter, its end."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end - 1]}…{text[-end:]}"
