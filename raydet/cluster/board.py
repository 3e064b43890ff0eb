"""The notice board of a job: workers report to the driver, which may ask them to stop."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def open_board() -> Any:
    """Create a board on this process's node, so that no other node's loss destroys it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@ray.remote(num_cpus=0)
class Board:
    """Actor that collects entries and progress from the workers and passes on the driver's request to stop."""

    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._progress: Any = None
        self._is_to_stop = False

    def pin(self, entry: Any) -> None:
        """Add a permanent entry."""
        self._entries.append(entry)

    def show(self, progress: Any = None) -> bool:
        """Replace the progress, if given, and return True if the driver asks the workers to stop."""
        if progress is not None:
            self._progress = progress
        return self._is_to_stop

    def ask_to_stop(self) -> bool:
        """Ask the workers to save their state and exit; return True if they have reported any progress."""
        self._is_to_stop = True
        return self._progress is not None

    def read(self, start: int) -> tuple[list[Any], Any]:
        """Return the entries from index `start` onwards, and the progress, None before the first."""
        return self._entries[start:], self._progress
