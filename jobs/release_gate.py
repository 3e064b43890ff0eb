"""Gate a release: fail unless the candidate, with 95 % confidence, loses less than `--max-loss` AP to the current one.

    ray job submit … -- python jobs/release_gate.py --truth s3://…/test --current s3://…/current --candidate s3://…/new

Exit code 0: release; 3: do not release; 1 and 2: a failure or a mistake, as in every command.
"""

from dataclasses import dataclass

import raydet
from raydet.cli.main import run_function
from raydet.config.fields import option

REFUSED = 3
"""Differs from the exit codes of failures and mistakes, so that a pipeline can tell a worse model from a broken job."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Detections of two models on the same images → release the second, or not."""

    truth: str = option("images table with the truth")
    current: str = option("detections of the current model")
    candidate: str = option("detections of the candidate")
    max_loss: float = option("loss of AP, from 0 to 1, below which the candidate passes", 0.01)


def gate(options: Gate) -> int:
    config = raydet.CompareConfig(truth=options.truth, first=options.current, second=options.candidate)
    result = raydet.compare(config)
    print(*result.lines(), sep="\n")
    difference = result.numbers.difference.overall["AP"]
    # The interval decides, not the difference itself, which may be chance: with few images the interval is wide, and
    # the gate stays closed until there is evidence. It is paired: both models see the same images, so that hard ones
    # cancel out.
    passes = difference.low is not None and difference.low > -options.max_loss
    word = "release" if passes else "do not release"
    print(f"{word}: the difference in AP must be above {-options.max_loss:+g} with 95 % confidence")
    return 0 if passes else REFUSED


run_function(gate, Gate)
