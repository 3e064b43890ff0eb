"""A callback of a user, which workers import by its path."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class Journal(TrainerCallback):
    """Writes what a run reports to `journal.jsonl` in the run's log folder."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        with Path(args.output_dir, "journal.jsonl").open("a") as file:
            file.write(json.dumps([state.global_step, logs]) + "\n")
