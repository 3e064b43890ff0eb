"""A Ray head with a dashboard on loopback, started as a person would start it, for tests that submit jobs."""

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
    """A port of loopback that nothing listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_head(command: Sequence[str], environment: Mapping[str, str], address: str, log: Path) -> Iterator[None]:
    """Runs `ray start --head --block …` for the time of a `with`, from when its dashboard asks for a token on.

    Args:
        command: The words of the command; it gets temporary files and ports of its own by them.
        environment: Of all its processes.
        address: Of the dashboard.
        log: What it prints.
    """
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not _asks_for_a_token(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield
    finally:
        # It and all that it started are a session of their own.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _asks_for_a_token(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False
    return True
