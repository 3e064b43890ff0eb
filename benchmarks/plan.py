"""Errors of `raydet plan`: short runs, the plans made from them, and real runs with ten times the images.

    python benchmarks/plan.py [--quick] [--jobs predict,train] [--images 300] [--train-images 40] [--rounds 3]

The model is `rt_detr_v2_small` at 256 pixels (random weights), and the images are generated. In each round a short run
with one worker is measured; plans for ten times the images with one and with two workers (the latter an extrapolation)
are compared with real runs of the same commands on the same machine. Seconds are those of the run's own records;
training with two workers is left out. The aim with the same number of workers is a median error of at most 25 % over
all rounds. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from raydet import PlanConfig, PrepareShapesConfig, plan, prepare_shapes
from raydet.cluster.job_record import JOB_FILE
from raydet.models.checkpoints import HISTORY_FILE

MODEL, IMAGE_SIZE = "rt_detr_v2_small", 256
TIMES, EPOCHS = 10, 2


def main() -> None:
    """Measure, plan, run, and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--jobs",
        type=lambda text: text.split(","),
        help="commands to measure; default: predict,train, or predict with --quick",
    )
    parser.add_argument(
        "--images", type=int, help="images of the short run of predict; default: 300, or 100 with --quick"
    )
    parser.add_argument("--train-images", type=int, default=40, help="images per epoch of the short training run")
    parser.add_argument("--rounds", type=int, help="number of rounds; default: 3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="finishes within three minutes on two idle cores")
    options = parser.parse_args()
    jobs = options.jobs or (["predict"] if options.quick else ["predict", "train"])
    sizes = {"predict": options.images or (100 if options.quick else 300), "train": options.train_images}
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _prepare(folder, sizes)
        for number in range(options.rounds or (1 if options.quick else 3)):
            for job in jobs:
                short, _ = _run(job, folder, sizes[job], 1)
                for workers in (1,) if job == "train" or options.quick else (1, 2):
                    size = sizes[job] * TIMES
                    planned_s = plan(PlanConfig(run=short, images=size, num_workers=workers)).total_s
                    _, measured_s = _run(job, folder, size, workers)
                    found.setdefault(f"{job}_{workers}", []).append((planned_s, measured_s))
                    print(
                        f"round {number + 1}: {job}_{workers}: {planned_s:.1f} s planned, {measured_s:.1f} s",
                        flush=True,
                    )
    _print_results(found)


def _prepare(folder: Path, sizes: dict[str, int]) -> None:
    from raydet.models.loading import build_detector
    from raydet.tables.table import open_table

    for size in {times * size for size in sizes.values() for times in (1, TIMES)}:
        prepare_shapes(PrepareShapesConfig(out=f"{folder}/{size}", num_train=size, num_val=8, image_size=320))
    categories = open_table(f"{folder}/{sizes['predict']}/train", "images").categories
    build_detector(MODEL, categories, image_size=IMAGE_SIZE, seed=0).save(f"{folder}/checkpoint")


def _run(job: str, folder: Path, size: int, workers: int) -> tuple[str, float]:
    """Run a command in a separate process; return its output folder, and the seconds according to its own records."""
    out, threads = tempfile.mkdtemp(dir=folder) + "/out", max(1, (os.cpu_count() or 1) // workers)
    command = [sys.executable, "-m", "raydet", job, f"--out={out}", f"--num-workers={workers}", "--use-gpu=false"]
    command.append(f"--threads-per-worker={threads}")
    if job == "predict":
        command += [f"--checkpoint={folder}/checkpoint", f"--data={folder}/{size}/train"]
    else:
        command += [f"--model={MODEL}", f"--image-size={IMAGE_SIZE}", f"--epochs={EPOCHS}", "--log-images=0"]
        command += [f"--train-data={folder}/{size}/train", f"--val-data={folder}/{size}/val"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"raydet {job} failed:\n{result.stderr[-4000:]}")
    if job == "predict":
        return out, float(json.loads(Path(out, JOB_FILE).read_text())["wall_s"])
    started = json.loads(Path(out, "log", JOB_FILE).read_text())["job"]["started"]
    last = json.loads(Path(out, HISTORY_FILE).read_text())[-1]
    seconds = datetime.fromisoformat(last["ended"]) - datetime.fromisoformat(started)
    return out, seconds.total_seconds() + last["validation_s"]


def _print_results(found: dict[str, list[tuple[float, float]]]) -> None:
    result: dict[str, Any] = {}
    print(f"\n{'run':<12} {'planned s':>10} {'measured s':>10} {'error':>7}   each round")
    for name, pairs in found.items():
        errors = [planned / measured - 1 for planned, measured in pairs]
        planned, measured = (statistics.median(column) for column in zip(*pairs, strict=True))
        each = ", ".join(f"{error:+.0%}" for error in errors)
        print(f"{name:<12} {planned:>10.1f} {measured:>10.1f} {statistics.median(errors):>+7.0%}   {each}")
        result[name] = {"planned_s": planned, "measured_s": measured, "error": statistics.median(errors)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
