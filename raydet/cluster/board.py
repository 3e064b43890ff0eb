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
        self._entries: list[dict[str, Any]] = []
        self._progress: dict[str, Any] = {}
        self._mistake = ""
        self._failure = ""
        self._is_to_stop = False

    def pin(self, entry: dict[str, Any]) -> None:
        """Add a permanent entry."""
        self._entries.append(entry)

    def show(self, progress: dict[str, Any]) -> bool:
        """Replace the progress and return True if the driver asks the workers to stop."""
        self._progress = progress
        return self._is_to_stop

    def ask_to_stop(self) -> None:
        """Ask the workers to save their state and exit."""
        self._is_to_stop = True

    def report_mistake(self, message: str) -> None:
        """Store the one-line message of a `UserError`."""
        self._mistake = message

    def mistake(self) -> str:
        """Return the message of `report_mistake`, or an empty string."""
        return self._mistake

    def report_failure(self, message: str) -> None:
        """Store the one-line message of a `RunError`; the first report wins."""
        self._failure = self._failure or message

    def failure(self) -> str:
        """Return the message of `report_failure`, or an empty string."""
        return self._failure

    def read(self, start: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the entries from index `start` on, and the progress."""
        return self._entries[start:], self._progress
