"""The exceptions that the command line prints as a single line; anything else is a bug and keeps its traceback."""

import signal


class UserError(ValueError):
    """A mistake in the input: the message says what is wrong, where, and what would be right."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot go on, though its input was right: the message says where it stands and what can be done."""

    exit_code = 1


class RunStopped(RunError):  # noqa: N818 - it is no error that a run does as it was asked
    """A run that was asked to stop, and has saved all it needs to resume; its exit code is 128 and the signal's number.

    Args:
        message: For the user.
        signal_number: The signal that asked; SIGTERM by default.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def one_line(message: object, *, limit: int | None = None) -> str:
    """Put a message on one line.

    Args:
        message: Text, or an exception: its message then, or the name of its type where it has none.
        limit: Most characters; a longer message ends in an ellipsis.
    """
    text = " ".join(str(message).split())
    if not text and isinstance(message, BaseException):
        text = type(message).__name__
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"
