"""`python -m tests.hostile`: run cases and print what became of them."""

import argparse
import os
import random
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.hostile import base, corpus, runner
from tests.hostile.case import Case
from tests.hostile.judge import Verdict

OUTCOMES = ("accepted", "refused", "failed", "stopped", "flagged", "broken")


def main() -> int:
    """Run the selected cases; return 1 if one is flagged."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--match", default="", help="regular expression that the name of a case must contain")
    parser.add_argument("--weight", choices=runner.IMPORTS, action="append", help="weights to run; by default all")
    parser.add_argument("--share", type=int, default=1, help="run only one of this many cases, always the same ones")
    parser.add_argument("--part", type=int, default=0, help="with --share: which of the shares, from 0")
    parser.add_argument("--sample", type=int, help="run this many cases, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample and of the order")
    parser.add_argument("--budget-s", type=float, default=1e9, help="start no case after this time")
    parser.add_argument("--num-at-once", type=int, default=2, help="cases that run at the same time")
    parser.add_argument("--keep", type=Path, help="folder where flagged cases are kept")
    parser.add_argument("--out", type=Path, help="file of the verdicts, one JSON object per line")
    parser.add_argument("--list", action="store_true", help="only print the names")
    options = parser.parse_args()
    weights = options.weight or list(runner.IMPORTS)
    with runner.temporary_folder("hostile-base-") as good:
        _make(good, base.make)
        if weights != ["light"]:
            _make(good, base.make_model)
        cases = [case for case in corpus.all_cases(good) if case.weight in weights]
        cases = [case for case in cases if re.search(options.match, case.name)]
        cases = [case for case in cases if case.is_in_part(options.part, options.share)]
        random.Random(options.seed).shuffle(cases)
        cases = cases[: options.sample]
        if options.list:
            print("\n".join(sorted(case.name for case in cases)))
            return 0
        if any(case.kind == "pictures" for case in cases):
            _make(good, base.make_pictures)
        verdicts = _run(cases, good, options)
    print(summary(verdicts))
    return int(any(verdict.faults for verdict in verdicts))


def _make(folder: Path, function: Callable[[Path], None]) -> None:
    """Make good data in a process of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"the good data could not be made: {function.__name__}")


def _run(cases: list[Case], good: Path, options: argparse.Namespace) -> list[Verdict]:
    """Run the cases, those that need more imports last."""
    started, verdicts = time.monotonic(), []
    runner.end_on_sigterm()
    for weight in runner.IMPORTS:
        own = (case for case in cases if case.weight == weight and time.monotonic() - started < options.budget_s)
        for verdict in runner.run(own, good, num_at_once=options.num_at_once, keep=options.keep):
            verdicts.append(verdict)
            if verdict.faults:
                print(f"{verdict.name} ({verdict.seconds:.1f} s)\n    " + "\n    ".join(verdict.faults), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(verdict.to_json() + "\n")
    print(f"{len(verdicts)} of {len(cases)} cases in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return verdicts


def summary(verdicts: list[Verdict], *, num_columns: int = 2) -> str:
    """Return a Markdown table of the outcomes by kind (`num_columns` of 1), or by kind and format."""
    named = [(tuple(verdict.name.split("/")[:num_columns]), verdict.outcome) for verdict in verdicts]
    counts, rows = Counter(named), sorted({row for row, _ in named})
    titles = ("kind", "format")[:num_columns]
    lines = [
        f"| {' | '.join(titles)} | cases | {' | '.join(OUTCOMES)} |",
        "|---" * num_columns + "|---:" * (1 + len(OUTCOMES)) + "|",
    ]
    for row in rows:
        numbers = [counts[row, outcome] for outcome in OUTCOMES]
        lines.append(f"| {' | '.join(row)} | {sum(numbers):,} | {' | '.join(f'{number:,}' for number in numbers)} |")
    totals = [sum(counts[row, outcome] for row in rows) for outcome in OUTCOMES]
    first = " | ".join(["all", *[""] * (num_columns - 1)])
    lines.append(f"| {first} | {sum(totals):,} | {' | '.join(f'{total:,}' for total in totals)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
