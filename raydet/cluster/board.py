"""The notice board of a job: its workers report to the driver, and the driver may ask them to stop."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def open_board() -> Any:
    """A board on the node of this process, with which it ends anyway; on another it could be lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@ray.remote(num_cpus=0)
class Board:
    """A notice board: workers pin entries to it and show how far they are; the driver reads it and may ask to stop."""

    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._progress: dict[str, Any] = {}
        self._is_to_stop = False

    def pin(self, entry: Any) -> None:
        """Adds an entry that stays."""
        self._entries.append(entry)

    def show(self, progress: dict[str, Any] | None = None) -> bool:
        """Says how far the work is; only the newest counts. Returns whether the driver asks to stop."""
        if progress is not None:
            self._progress = progress
        return self._is_to_stop

    def ask_to_stop(self) -> bool:
        """Has the workers save what they have and end; returns whether they have shown any progress yet."""
        self._is_to_stop = True
        return bool(self._progress)

    def read(self, start: int) -> tuple[list[Any], dict[str, Any]]:
        """The entries from number `start` on, and how far the work is."""
        return self._entries[start:], self._progress
