"""Cost of the checks of a table's rows: reading a table of detections and one of labels, with and without them.

    python benchmarks/table_checks.py [--quick] [--rounds 9]

The rounds alternate; the table shows the median of the ratios within a round.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from benchmarks.generated_boxes import generate, write_tables
else:  # a script imports its neighbours without the package name
    from generated_boxes import generate, write_tables

from raydet.tables.columns import BATCH_ROWS
from raydet.tables.table import Table, open_table


def main() -> None:
    """Measure both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="100,000 detections instead of 1,000,000")
    options = parser.parse_args()
    num_detections = 100_000 if options.quick else 1_000_000
    summary = {}
    print(f"{'table':>10} {'boxes':>10} {'plain s':>8} {'checked s':>9} {'cost':>7}")
    with tempfile.TemporaryDirectory() as name:
        parts = [generate(num_detections // 10, num_detections // 2, num_detections, seed=0)]
        write_tables(parts, Path(name))
        for kind, folder in (("detections", "detections"), ("images", "truth")):
            table = open_table(str(Path(name, folder)), ("images", "detections"))
            pairs = [(_seconds(table, checks=False), _seconds(table, checks=True)) for _ in range(options.rounds + 1)]
            plain, checked = zip(*pairs[1:], strict=True)  # the first round reads the disk
            cost = median(after / before for before, after in pairs[1:]) - 1
            num_boxes = num_detections if kind == "detections" else num_detections // 2
            print(f"{kind:>10} {num_boxes:>10,} {median(plain):>8.3f} {median(checked):>9.3f} {cost:>7.1%}")
            summary[kind] = {"plain_s": median(plain), "checked_s": median(checked), "cost": round(cost, 4)}
    print(json.dumps(summary))


def _seconds(table: Table, *, checks: bool) -> float:
    with mock.patch.object(Table, "_check", Table._check if checks else lambda *_: None):
        started = time.perf_counter()
        for _ in table.iter_batches(batch_size=BATCH_ROWS):
            pass
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
