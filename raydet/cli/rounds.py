"""Rounds of a loop: the record of each in OUT/loop.json, and the result of the command."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from raydet.common.console import counted, shown
from raydet.common.errors import UserError
from raydet.common.notebook.showing import Shown
from raydet.common.redaction import without_secrets
from raydet.common.untrusted.documents import DocumentError
from raydet.tables import storage
from raydet.tables.output_folder import OutputFolder

LOOP_FILE = "loop.json"


@dataclass(frozen=True, kw_only=True)
class Round:
    """A finished round.

    Attributes:
        number: Number, from 1.
        num_labels: Detections that became labels.
        checkpoint: URI of the trained model; None if there were no labels to train on.
        ap_before: AP of the current model on the images of `truth`; None if undefined.
        ap_after: AP of the trained model.
        difference: ap_after - ap_before.
        low: Lower bound of the paired 95 % interval of the difference; None with too few images.
        high: Upper bound.
        is_promoted: True if the trained model became the current one.
    """

    number: int
    num_labels: int
    checkpoint: str | None = None
    ap_before: float | None = None
    ap_after: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    is_promoted: bool = False

    @property
    def name(self) -> str:
        """Name of the round, of its folder, and of its run in OUT/metrics."""
        return name_of(self.number)

    def line(self) -> str:
        """Describe the outcome of the round."""
        start = f"{self.name}: {counted(self.num_labels, 'label')}"
        if self.checkpoint is None:
            return f"{start}; nothing to train on"
        bounds = "too few images for an interval"
        if self.low is not None:
            bounds = f"95 % interval {shown(self.low, '+.3f')} … {shown(self.high, '+.3f')}"
        change = f"AP {shown(self.ap_before)} → {shown(self.ap_after)}, {shown(self.difference, '+.3f')} ({bounds})"
        return f"{start}; {change}; {'promoted' if self.is_promoted else 'not promoted'}"


@dataclass(frozen=True, kw_only=True)
class LoopResult(Shown):
    """Result of `loop`.

    Attributes:
        out: URI of the loop's folder.
        checkpoint: URI or Hub name of the current model: that of the last promoted round, or the first model.
        rounds: The rounds so far.
        already_done: True if the loop was already finished.
    """

    out: str
    checkpoint: str
    rounds: tuple[Round, ...]
    already_done: bool = False

    def lines(self) -> list[str]:
        """Return the rounds and the current model, for the terminal."""
        lines = ["nothing to do: this loop is finished"] if self.already_done else []
        lines += [item.line() for item in self.rounds]
        if is_stuck(self.rounds):
            lines.append("the loop ends here: another round from the same model would repeat the last one exactly")
        elif self.already_done:
            lines.append("raise --rounds to continue")
        return [*lines, f"checkpoint: {self.checkpoint}"]


def name_of(number: int) -> str:
    """Return the name of a round by its number."""
    return f"round-{number:03d}"


def is_stuck(rounds: Sequence[Round]) -> bool:
    """Return True if the last round left the current model as it was, so that another one would repeat it."""
    return bool(rounds) and not rounds[-1].is_promoted


def read_rounds(folder: OutputFolder) -> list[Round]:
    """Read the rounds of a loop; empty before the end of the first one.

    Raises:
        UserError: The file is damaged.
    """
    try:
        content = storage.read_json(folder.uri_of(LOOP_FILE))
        return [Round(**item) for item in content["rounds"]]
    except FileNotFoundError:
        return []
    except (DocumentError, LookupError, TypeError) as error:
        raise UserError(f"{folder.uri_of(LOOP_FILE)} is damaged ({error}); choose another --out") from None


def write_rounds(folder: OutputFolder, checkpoint: str, rounds: Sequence[Round]) -> None:
    """Write the current model and the rounds of a loop atomically."""
    content = {"checkpoint": checkpoint, "rounds": [dataclasses.asdict(item) for item in rounds]}
    folder.write_bytes(json.dumps(without_secrets(content), indent=1).encode(), LOOP_FILE)
