"""Gate a release: fail unless the candidate is, with 95 % confidence, no worse than the current model.

    ray job submit … -- python jobs/release_gate.py --truth s3://…/test --current s3://…/current --candidate s3://…/new

Both are detections of the same images. Exit code 0: release; 3: do not; 1 and 2: a failure or a mistake, as ever.
"""

import argparse

import raydet
from raydet.cli.main import run_function

REFUSED = 3
"""Differs from the exit codes of failures and mistakes, so that a pipeline can tell a worse model from a broken job."""


def gate() -> int:
    parser = argparse.ArgumentParser()
    for name in ("truth", "current", "candidate"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--max-loss", type=float, default=0.01, help="loss of AP that is acceptable")
    options = parser.parse_args()
    result = raydet.compare(raydet.CompareConfig(truth=options.truth, first=options.current, second=options.candidate))
    print(*result.lines(), sep="\n")
    difference = result.numbers.difference.overall["AP"]
    # The interval decides, not the difference itself, which may be chance: with few images the interval is wide, and
    # the gate stays closed until there is evidence. It is paired: both models see the same images, so that hard ones
    # cancel out.
    passes = difference.low is not None and difference.low > -options.max_loss
    word = "release" if passes else "do not release"
    print(f"{word}: the difference in AP must be above {-options.max_loss:+g} with 95 % confidence")
    return 0 if passes else REFUSED


run_function(gate)
