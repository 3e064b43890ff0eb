"""Requests to stop: SIGTERM, as `ray job stop` and schedulers send it, and Ctrl-C become one line and an exit code."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from raydet.common.errors import RunStopped

_REPEAT_AFTER_S = 0.05

STOPPED = "run stopped; run the same command again to resume"


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """For the time of a `with`, SIGTERM ends what is inside: it drops what is in flight and cleans up after itself.

    Inside it looks like Ctrl-C, a KeyboardInterrupt: code that makes up for failures lets that pass, and while Ray
    waits for its workers it hands on no other exception that a handler raises. A second SIGTERM does what it did
    before the `with`. Outside the main thread, where signals do not come, nothing is changed.

    Raises:
        RunStopped: SIGTERM has come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    was_asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal was_asked
        was_asked = True
        signal.signal(signal.SIGTERM, previous)
        raise KeyboardInterrupt("SIGTERM")

    previous = signal.signal(signal.SIGTERM, ask)
    try:
        with _repeating_dropped_interrupts():
            yield
    except KeyboardInterrupt:
        if was_asked:
            raise RunStopped(STOPPED) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _repeating_dropped_interrupts() -> Iterator[None]:
    """For the time of a `with`, a KeyboardInterrupt that Python drops is raised again a moment later.

    Python drops an exception that a callback without a caller raises, such as the cleanup after each import.
    """
    timers: list[threading.Timer] = []
    previous = sys.unraisablehook

    def repeat(dropped: "sys.UnraisableHookArgs") -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            previous(dropped)
            return
        timers.append(threading.Timer(_REPEAT_AFTER_S, os.kill, (os.getpid(), signal.SIGINT)))
        timers[-1].start()

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = previous
        for timer in timers:
            timer.cancel()


class StopRequest:
    """The signal that asked a command to stop, if one did."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def to_error(self, message: str) -> RunStopped:
        """The exception with the exit code of the signal."""
        return RunStopped(message, self.signal_number or signal.SIGTERM)


@contextlib.contextmanager
def noting_stop_requests() -> Iterator[StopRequest]:
    """For the time of a `with`, the first SIGINT or SIGTERM is only noted; the next one acts as it did before.

    Outside the main thread, where signals do not come, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
