"""The caller's process: isolation from Ray's changes to environment, signal handlers, loggers and stderr."""

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

from raydet.cluster.ray_internals import messages_logged
from raydet.tables import storage

LOG_FILE = "ray.log"
RAY_MESSAGES = logging.getLogger("ray.messages")
"""Separate logger for Ray's messages: at our log level, the logger `ray` drops everything below an error."""
RAY_MESSAGES.setLevel(logging.WARNING)
_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals whose handlers Ray, Ray Train and Ray Tune replace."""


@contextlib.contextmanager
def process_restored() -> Iterator[None]:
    """Context manager: restore environment variables, signal handlers and Ray's loggers when the block ends."""
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
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: the handler was not set from Python, which cannot restore it.
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextlib.contextmanager
def _loggers_restored() -> Iterator[None]:
    before = {name: _state_of(logger) for name, logger in _ray_loggers().items()}
    try:
        yield
    finally:
        for name, logger in _ray_loggers().items():
            # A logger created meanwhile is reset to defaults.
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
        if name.startswith("ray.") and logger is not RAY_MESSAGES and isinstance(logger, logging.Logger)
    }


def _state_of(logger: logging.Logger) -> tuple[int, bool, bool, list[logging.Handler], list[logging.Filter]]:
    return logger.level, logger.propagate, logger.disabled, list(logger.handlers), list(logger.filters)  # type: ignore[arg-type]


class _LogHandler(logging.StreamHandler[TextIO]):
    """Log handler that ignores write errors: the run reports a full disk once, instead of a traceback per line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Ignore the error."""


@contextlib.contextmanager
def chatter_logged(log_uri: str) -> Iterator[None]:
    """Redirect the output of Ray's processes, C++ code and loggers to a file; `sys.stderr` still reaches the terminal.

    Use inside `process_restored`, which restores the loggers. The file is `ray.log` in a folder; if that is not local,
    the output is dropped.
    """
    path = os.devnull
    if storage.is_local(log_uri):
        storage.make_folder(log_uri)
        path = storage.resolve(storage.join(log_uri, LOG_FILE))[1]
    with Path(path).open("a") as log, warnings.catch_warnings(), messages_logged(RAY_MESSAGES):
        warnings.filterwarnings("ignore", module=r"ray\.")
        # Ray Data has no replacement yet; see `ray_internals.actors_on`.
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
    """Point file descriptor 2 at a file; `sys.stderr`, if it is the process's own, still writes to the terminal."""
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
