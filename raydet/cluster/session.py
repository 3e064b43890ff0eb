"""The Ray session of a job: a connection to a cluster, or a cluster started on this machine."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import ray

from raydet.cluster.caller import RAY_MESSAGES, chatter_logged, process_restored
from raydet.cluster.ray_internals import listening_on_loopback, local_cluster_options
from raydet.common.errors import RunError, RunStopped, one_line
from raydet.common.ray_address import starts_cluster
from raydet.common.signals import STOPPED, ending_on_sigterm

START_ATTEMPTS = 3
"""Attempts to start a cluster on this machine."""
SECONDS_TO_ANSWER = 10.0
"""Time limit for the head of a named cluster to answer."""


@contextlib.contextmanager
def session(log_uri: str, address: str | None = None) -> Iterator[None]:
    """Context manager: connect to a cluster, or start one on this machine, while the block runs; SIGTERM ends it.

    A nested session, or one in a process that is already connected to Ray, uses that cluster, so that jobs can be
    chained. Afterwards environment variables, signal handlers, Ray's loggers and stderr are restored.

    Args:
        log_uri: Folder for `ray.log`, Ray's own output; if it is not local, that output is dropped.
        address: Address of the cluster; "local" starts one. The default is RAY_ADDRESS, and "local" if that is unset.

    Raises:
        RunError: The cluster does not answer, or Ray did not start.
        RunStopped: The process received SIGTERM, for instance from `ray job stop`.
    """
    with process_restored():
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with chatter_logged(log_uri), ending_on_sigterm():
            _connect(address)
            try:
                with ending_on_sigterm():  # again, because Ray has replaced the handler
                    yield
            finally:
                ray.shutdown()


def _connect(address: str | None) -> None:
    named = address or f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    is_local = starts_cluster(address)
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if is_local:
        options |= {"include_dashboard": False, **local_cluster_options()}
    else:
        _require_answer(address, named)
    attempts_left = START_ATTEMPTS if is_local else 1
    while True:
        attempts_left -= 1
        try:
            with listening_on_loopback() if is_local else contextlib.nullcontext():
                ray.init(**options)
            return
        except SystemExit:  # Ray's own handler of SIGTERM
            raise RunStopped(STOPPED) from None
        except Exception as error:  # Ray also raises plain exceptions
            reason = one_line(error, limit=300)
            if not attempts_left:
                what = "Ray did not start on this machine" if is_local else f"cannot connect to Ray at {named}"
                raise RunError(f"{what}: {reason}") from error
            # Ray gives each of its processes a few seconds to start, which may not suffice on a busy machine.
            RAY_MESSAGES.warning("Ray did not start, trying again: %s", reason)
            ray.shutdown()


def _require_answer(address: str, named: str) -> None:
    """Check that HOST:PORT accepts connections; Ray itself would wait for more than five minutes."""
    host, colon, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if "://" in host or not colon or not port.isdecimal():
        return  # "auto" or a session folder, which Ray resolves
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
            return
        except (OSError, OverflowError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"cannot connect to Ray at {named}: {getattr(error, 'strerror', None) or error}; check that the "
                    "head is running and that this is its `ray start --port` (default 6379)"
                ) from None
            time.sleep(0.5)
