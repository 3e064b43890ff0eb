"""The Ray cluster that a job runs on: connecting to it, or starting one on this machine."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import ray

from raydet.cluster.caller import REMARKS, chatter_logged, process_restored
from raydet.cluster.ray_internals import listening_on_loopback, local_cluster_options
from raydet.common.errors import RunError, RunStopped, one_line
from raydet.common.signals import STOPPED, ending_on_sigterm

START_ATTEMPTS = 3
"""At starting a cluster on this machine."""
SECONDS_TO_ANSWER = 10.0
"""For the head of a cluster that is named."""


@contextlib.contextmanager
def session(log_uri: str, address: str | None = None) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine, for the time of a `with`; SIGTERM ends what is inside.

    Inside another session, or where the caller has connected to Ray, that cluster is used, so that jobs can be strung
    together. Afterwards the process is as it was: environment variables, signal handlers, Ray's loggers, stderr.

    Args:
        log_uri: Folder for `ray.log`, Ray's own output; when it is not local, that output is dropped.
        address: Of the cluster; "local" starts one. By default RAY_ADDRESS says it, and without that one is started.

    Raises:
        RunError: There is no such cluster, or none can be started.
        RunStopped: SIGTERM has come, as `ray job stop` sends it.
    """
    with process_restored():
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with chatter_logged(log_uri), ending_on_sigterm():
            _connect(address)
            try:
                with ending_on_sigterm():  # once more: Ray has put its own handler in place
                    yield
            finally:
                ray.shutdown()


def _connect(address: str | None) -> None:
    named = address or f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, **local_cluster_options()}
    else:
        _refuse_silence(address, named)
    attempts_left = START_ATTEMPTS if address == "local" else 1
    while True:
        attempts_left -= 1
        try:
            with listening_on_loopback() if address == "local" else contextlib.nullcontext():
                ray.init(**options)
            return
        except SystemExit:  # Ray's own handler of SIGTERM
            raise RunStopped(STOPPED) from None
        except Exception as error:  # Ray raises plain ones, too
            reason = one_line(error, limit=300)
            if not attempts_left:
                is_own = address == "local"
                what = "Ray did not start on this machine" if is_own else f"cannot connect to Ray at {named}"
                raise RunError(f"{what}: {reason}") from error
            # Its processes have some seconds each to come up, which a busy machine may not grant them.
            REMARKS.warning("Ray did not start, trying again: %s", reason)
            ray.shutdown()


def _refuse_silence(address: str, named: str) -> None:
    """Makes sure that something answers at HOST:PORT, for which Ray itself would wait more than five minutes."""
    host, colon, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if "://" in host or not colon or not port.isdecimal():
        return  # auto, or the folder of a session: Ray knows where it is
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
            return
        except (OSError, OverflowError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"cannot connect to Ray at {named}: {getattr(error, 'strerror', None) or error}; is the head "
                    "running, and is this the port that its `ray start --port` names (6379 by default)?"
                ) from None
            time.sleep(0.5)
