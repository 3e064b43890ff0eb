"""A Ray head with a dashboard on loopback, started from the command line, for tests that submit jobs."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """Return a loopback port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_head(command: Sequence[str], environment: Mapping[str, str], address: str, log: Path) -> Iterator[None]:
    """Context manager: run `ray start --head --block …`; enter the block once the dashboard demands a token.

    Args:
        command: Words of the command, including its own ports and folder for temporary files.
        environment: Environment of all processes.
        address: Address of the dashboard.
        log: File for the output.
    """
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not _demands_token(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield
    finally:
        # The head and all its processes form a separate session.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _demands_token(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False
    return True
