"""The caller's process: what Ray changes in it during a call, and how it is put back when the call returns."""

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from raydet.cluster.ray_internals import remarks_logged
from raydet.tables import storage

LOG_FILE = "ray.log"
REMARKS = logging.getLogger("ray.remarks")
"""For Ray's log. `ray` itself passes on nothing below an error once Ray has been asked to be quiet."""
REMARKS.setLevel(logging.WARNING)
_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Those that Ray, Ray Train and Ray Tune set handlers of."""


@contextlib.contextmanager
def process_restored() -> Iterator[None]:
    """Put back environment variables, signal handlers and Ray's loggers at the end of a `with`, as they were before."""
    with _environment_restored(), _signals_restored(), _loggers_restored():
        yield


@contextlib.contextmanager
def _environment_restored() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one can set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: set by something other than Python, which can only leave it.
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextlib.contextmanager
def _loggers_restored() -> Iterator[None]:
    before = {name: _state_of(logger) for name, logger in _ray_loggers().items()}
    try:
        yield
    finally:
        for name, logger in _ray_loggers().items():
            # A logger that came to be in between is as a new one.
            level, propagates, is_disabled, handlers, filters = before.get(name, (logging.NOTSET, True, False, [], []))
            logger.setLevel(level)
            logger.propagate, logger.disabled = propagates, is_disabled
            logger.handlers, logger.filters = list(handlers), list(filters)


def _ray_loggers() -> dict[str, logging.Logger]:
    known = {name: logging.getLogger(name) for name in _LOGGERS}
    loggers = logging.root.manager.loggerDict.copy()
    return known | {
        name: logger
        for name, logger in loggers.items()
        if name.startswith("ray.") and logger is not REMARKS and isinstance(logger, logging.Logger)
    }


def _state_of(logger: logging.Logger) -> tuple[int, bool, bool, list[logging.Handler], list[logging.Filter]]:
    return logger.level, logger.propagate, logger.disabled, list(logger.handlers), list(logger.filters)  # type: ignore[arg-type]


class _LogHandler(logging.StreamHandler[TextIO]):
    """Writes what can be written: a full disk is told of once, by the run, and not by a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Nothing."""


@contextlib.contextmanager
def chatter_logged(log_uri: str) -> Iterator[None]:
    """Send the output of Ray's processes, its C++ part and its loggers to a file; Python's own stderr stays a screen.

    Use it inside `process_restored`, which puts the loggers back.

    Args:
        log_uri: Folder for `ray.log`; when it is not local, the output is dropped.
    """
    path = os.devnull
    if storage.is_local(log_uri):
        storage.make_folder(log_uri)
        path = storage.resolve(storage.join(log_uri, LOG_FILE))[1]
    with Path(path).open("a") as log, warnings.catch_warnings(), remarks_logged(REMARKS):
        warnings.filterwarnings("ignore", module=r"ray\.")
        # What Ray Data will have instead for the number of retries is not there yet.
        warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
        handler = _LogHandler(log)
        handler.setLevel(logging.INFO)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        for name in _LOGGERS:
            logging.getLogger(name).handlers = [handler]
            logging.getLogger(name).propagate = False
        with _stderr_redirected(log):
            yield


@contextlib.contextmanager
def _stderr_redirected(log: TextIO) -> Iterator[None]:
    """Point file descriptor 2 at a file; `sys.stderr`, where it was the process's own, still writes to the screen."""
    python_stderr = sys.stderr
    python_stderr.flush()
    screen = os.dup(2)
    try:
        with open(
            screen, "w", buffering=1, encoding=python_stderr.encoding, errors=python_stderr.errors, closefd=False
        ) as own_stderr:
            os.dup2(log.fileno(), 2)
            if python_stderr.isatty() or python_stderr is sys.__stderr__:
                sys.stderr = own_stderr
            try:
                yield
            finally:
                sys.stderr = python_stderr
                os.dup2(screen, 2)
    finally:
        os.close(screen)
