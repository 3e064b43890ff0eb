"""The Ray cluster of this process, without importing Ray: whether it is connected, and what it would connect to."""

import os
import sys
from collections.abc import Callable


def is_connected() -> bool:
    """Return True if this process is connected to Ray."""
    ray = sys.modules.get("ray")  # a connection implies the import
    return ray is not None and bool(ray.is_initialized())


def starts_cluster(address: str | None = None) -> bool:
    """Return True if a session at this address, by default RAY_ADDRESS, starts a cluster on this machine."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def announce(line: Callable[[str], None]) -> None:
    """Say what a session waits for first, unless this process is already connected."""
    if not is_connected():
        address = os.environ.get("RAY_ADDRESS")
        line("starting Ray on this machine" if starts_cluster() else f"connecting to Ray at {address}")
