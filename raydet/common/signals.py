"""Stop requests: SIGTERM from `ray job stop` or a scheduler, and Ctrl-C, become one line and an exit code."""

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


INTERRUPTED = "raydet: run interrupted; run the same command again to resume"


class _CtrlC:
    """Handler of SIGINT: the first press interrupts the command, which cleans up; the second ends the process."""

    def __init__(self) -> None:
        self.is_pressed = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if self.is_pressed:
            with contextlib.suppress(Exception):  # the interrupted code may hold the lock of the stream
                print(f"\n{INTERRUPTED}", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGINT)
        self.is_pressed = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def ending_on_second_ctrl_c() -> Iterator[None]:
    """Context manager, for commands: a second Ctrl-C in the block ends the process at once, without cleaning up.

    The first one raises KeyboardInterrupt, as ever. A process that ignores Ctrl-C, as in the background of a shell,
    continues to do so.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _CtrlC())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Context manager: SIGTERM interrupts the block while it runs, so that the block can clean up.

    Inside the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does: handlers of `Exception` do not swallow it, and it
    is the only exception from a signal handler that Ray propagates while it waits for workers. A second SIGTERM is
    handled as before the block. Outside the main thread, which receives no signals, the context manager does nothing.

    Raises:
        RunStopped: SIGTERM arrived.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_requested = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_requested
        is_requested = True
        signal.signal(signal.SIGTERM, previous)
        raise KeyboardInterrupt("SIGTERM")

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        with _repeating_dropped_interrupts():
            yield
    except KeyboardInterrupt:
        if is_requested:
            raise RunStopped(STOPPED) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _repeating_dropped_interrupts() -> Iterator[None]:
    """Context manager: while the block runs, raise a KeyboardInterrupt that Python drops again a moment later.

    Python drops exceptions raised in callbacks without a caller, such as the cleanup after each import.
    """
    timers: list[threading.Timer] = []
    previous = sys.unraisablehook

    def repeat(dropped: "sys.UnraisableHookArgs") -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            previous(dropped)
            return
        _set_pressed(signal.getsignal(signal.SIGINT), False)
        timers.append(threading.Timer(_REPEAT_AFTER_S, os.kill, (os.getpid(), signal.SIGINT)))
        timers[-1].start()

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = previous
        for timer in timers:
            timer.cancel()


def _set_pressed(handler: object, is_pressed: bool) -> None:
    if isinstance(handler, _CtrlC):
        handler.is_pressed = is_pressed


class StopRequest:
    """The signal that asked a command to stop; falsy until one arrives."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def to_error(self, message: str) -> RunStopped:
        """Return a RunStopped with the exit code of the signal."""
        return RunStopped(message, self.signal_number or signal.SIGTERM)


@contextlib.contextmanager
def noting_stop_requests() -> Iterator[StopRequest]:
    """Context manager: record the first SIGINT or SIGTERM while the block runs; handle the next one as before.

    In a command, a Ctrl-C after the first request ends the process at once.

    Outside the main thread, which receives no signals, the context manager does nothing.
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
        _set_pressed(previous[signal.SIGINT], True)

    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
