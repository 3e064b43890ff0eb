"""Cost of checkpoints every 20 steps on a slow object store, compared with the same training without them.

    python benchmarks/checkpoints.py [--quick] [--put-seconds 2]

The store is a local S3 server that delays each upload by `--put-seconds`. The training is real, except that a step
only waits, as with an accelerator. Each round trains once without checkpoints and once with them. The cost is the
additional time from the first step of an epoch to its last, as a fraction of the time without checkpoints. The last
line is one JSON object.
"""

import argparse
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT))  # for tests.s3_stand_in

if TYPE_CHECKING:
    from benchmarks.accelerator import spans_of
    from benchmarks.ingest import write_table
    from benchmarks.simulated import train_simulated
else:  # a script imports its neighbours without the package name
    from accelerator import spans_of
    from ingest import write_table
    from simulated import train_simulated

from tests import s3_stand_in  # noqa: E402

EVERY_STEPS, STEP_S = 20, 0.5
BATCH_SIZE, SIDE = 8, 320
STEPS_PER_EPOCH = 50


def main() -> None:
    """Train with and without checkpoints in turn and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--put-seconds", type=float, default=2.0, help="additional time of each upload (default: 2)")
    parser.add_argument("--model", default="rt_detr_v2_small")
    parser.add_argument("--quick", action="store_true", help="one round of two epochs instead of three of three")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the server logs every request
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rounds = []
    for number in range(1 if options.quick else 3):
        with tempfile.TemporaryDirectory(prefix="rdb", ignore_cleanup_errors=True) as name, s3_stand_in.started() as s3:
            folder = Path(name)
            write_table(folder / "train", num_images=BATCH_SIZE * STEPS_PER_EPOCH, size_hw=(480, 640))
            write_table(folder / "val", num_images=BATCH_SIZE, size_hw=(480, 640))
            os.environ.update(s3.environment)
            epochs = 2 if options.quick else 3
            without = _seconds(folder, "without", options.model, epochs=epochs)
            s3.put_delay_s = options.put_seconds
            with_them = _seconds(folder, "with", options.model, epochs=epochs, save_every_steps=EVERY_STEPS)
            s3.put_delay_s = 0.0
        rounds.append({"without": without, "with": with_them, "cost": with_them / without - 1})
        print(f"round {number + 1}: {json.dumps(rounds[-1])}", flush=True)
    medians = {key: round(statistics.median(one[key] for one in rounds), 4) for key in rounds[0]}
    cost = f"{100 * medians['cost']:.1f} % of the steps' time"
    print(f"checkpoints every {EVERY_STEPS} steps cost {cost} (target: below 5 %)")
    print(json.dumps(medians))


def _seconds(folder: Path, name: str, model: str, *, epochs: int, save_every_steps: int | None = None) -> float:
    """Train, and return the seconds from the first step of an epoch to its last, median of all epochs but the first."""
    log = folder / f"{name}-log"
    log.mkdir()
    train_simulated(
        folder,
        log,
        seconds=STEP_S,
        model=model,
        out=f"{s3_stand_in.BUCKET}/{name}",
        image_size=SIDE,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        save_every_steps=save_every_steps,
    )
    (spans,) = spans_of(log).values()
    own = [[span for span in spans if span[0] == epoch] for epoch in range(1, epochs)]
    return statistics.median(one[-1][2] - one[0][1] for one in own)


if __name__ == "__main__":
    main()
