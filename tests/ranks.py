"""Ranks of a process group as processes on this machine."""

import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from typing import Any


def run_ranks(
    context: BaseContext, run_rank: Callable[..., None], arguments: Sequence[tuple[Any, ...]], *, timeout_s: float
) -> None:
    """Run one process for each tuple of arguments, and require that all of them succeed in time."""
    processes: list[Any] = [context.Process(target=run_rank, args=own, daemon=True) for own in arguments]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + timeout_s
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
