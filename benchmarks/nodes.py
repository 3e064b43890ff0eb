"""Overhead of `train`, `predict` and `evaluate` on 1 to 3 nodes, and equality of their results.

    python benchmarks/nodes.py [--quick] [--jobs train predict evaluate] [--layouts 1x1 1x2 2x2 3x2]

A layout is NODESxWORKERS. Each node is a separate Ray node with its own processes, address and folder, but all nodes
share this machine, so that more nodes cannot be faster. The table shows the overhead of starting nodes and of passing
images and gradients between them, and that the results are the same: AP and losses of training with the same number of
workers, the rows of scoring, and the AP of the evaluation. Losses with one and with two workers differ by rounding.
Seconds are those of the complete command; images/s of training come from its own log, without start-up. The last line
is one JSON object.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydet import PrepareShapesConfig, prepare_shapes
from raydet.models.checkpoints import HISTORY_FILE
from raydet.models.loading import build_detector
from raydet.tables.table import open_table

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT))  # for tests.nodes

if TYPE_CHECKING:
    from benchmarks.contest import MemoryOfTree
    from benchmarks.generated_boxes import generate, write_tables
else:  # a script imports its neighbours without the package name
    from contest import MemoryOfTree
    from generated_boxes import generate, write_tables


from tests.nodes import Cluster, nodes  # noqa: E402

RAYDET = [sys.executable, "-m", "raydet"]
CPUS_PER_NODE = 4
"""CPUs announced to Ray per node, regardless of the hardware."""
TRAINING = ["--model=rt_detr_v2_tiny", "--image-size=64", "--augmentation=flip", "--learning-rate=1e-3"]
TRAINING += ["--log-images=0"]

Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the jobs: training images, epochs, images to score, detections to match."""

    num_train: int
    epochs: int
    num_scored: int
    num_detections: int


@dataclass(frozen=True)
class Job:
    """A benchmark job.

    Attributes:
        words: Makes the command from its output folder, the number of workers and the address of the cluster.
        num_images: Images that the command processes.
        outcome: Reads the result from the output folder.
    """

    words: Callable[[Path, int, str], list[str]]
    num_images: int
    outcome: Callable[[Path], Result]


def main() -> None:
    """Run each job on each layout and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=("train", "predict", "evaluate"))
    parser.add_argument("--layouts", nargs="+", type=_layout)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small data, two layouts, one round")
    options = parser.parse_args()
    sizes = Sizes(24, 2, 200, 20_000) if options.quick else Sizes(400, 4, 4_000, 1_000_000)
    layouts = options.layouts or [(1, 1), (2, 2)] + ([] if options.quick else [(1, 2), (3, 2)])
    runs: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory(prefix="rdb", ignore_cleanup_errors=True) as folder:
        jobs = _jobs(Path(folder), sizes)
        for num_nodes, num_workers in sorted(layouts):
            (Path(folder) / f"c{num_nodes}{num_workers}").mkdir()
            with nodes(num_nodes, cpus=CPUS_PER_NODE, folder=Path(folder) / f"c{num_nodes}{num_workers}") as cluster:
                for name in options.jobs or jobs:
                    key = f"{name}_{num_nodes}_nodes_{num_workers}_workers"
                    for number in range(1 if options.quick else options.rounds):
                        out = Path(folder) / f"{key}_{number}"
                        runs.setdefault(key, []).append(_run(cluster, jobs[name], out, num_workers))
    _print(runs)


def _layout(text: str) -> tuple[int, int]:
    num_nodes, _, num_workers = text.partition("x")
    return int(num_nodes), int(num_workers)


def _jobs(folder: Path, sizes: Sizes) -> dict[str, Job]:
    """Prepare the data and make the jobs."""
    few, many = folder / "few", folder / "many"
    prepare_shapes(PrepareShapesConfig(out=str(few), num_train=sizes.num_train, num_val=24, image_size=64))
    prepare_shapes(PrepareShapesConfig(out=str(many), num_train=sizes.num_scored, num_val=1, image_size=64))
    categories = open_table(str(few / "train"), "images").categories
    build_detector("rt_detr_v2_tiny", categories, image_size=64, seed=3).save(str(folder / "checkpoint"))
    per_part = max(1, sizes.num_detections // 40)
    parts = [
        generate(per_part // 20, per_part // 4, per_part, seed=seed, first_id=1 + seed * (per_part // 20))
        for seed in range(40)
    ]
    write_tables(parts, folder)
    return {
        "train": Job(
            lambda out, workers, _: [
                *[*RAYDET, "train", f"--train-data={few}/train", f"--val-data={few}/val", *TRAINING, f"--out={out}"],
                *[f"--num-workers={workers}", f"--epochs={sizes.epochs}", "--threads-per-worker=1"],
            ],
            sizes.num_train * sizes.epochs,
            _outcome_of_training,
        ),
        "predict": Job(
            lambda out, workers, _: [
                *[*RAYDET, "predict", f"--checkpoint={folder}/checkpoint", f"--data={many}/train", f"--out={out}"],
                *[f"--num-workers={workers}", "--rows-per-file=64", "--threads-per-worker=1"],
            ],
            sizes.num_scored,
            _outcome_of_scoring,
        ),
        "evaluate": Job(
            lambda out, _, address: [
                *[*RAYDET, "evaluate", f"--truth={folder}/truth", f"--detections={folder}/detections", f"--out={out}"],
                *["--bootstrap=0", "--num-shards=40", f"--ray-address={address}"],
            ],
            sum(part.num_images for part in parts),
            _outcome_of_evaluation,
        ),
    }


def _run(cluster: Cluster, job: Job, out: Path, num_workers: int) -> Result:
    words = job.words(out, num_workers, cluster.address)
    started = time.perf_counter()
    memory = MemoryOfTree(cluster.head.process.pid)
    try:
        done = cluster.run(words, timeout_s=3600)
    finally:
        memory.stop()
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    result = {"images_per_s": job.num_images / seconds, "seconds": seconds, "peak_mb": memory.peak_mb}
    return {**result, **job.outcome(out)}


def _outcome_of_training(out: Path) -> Result:
    history = json.loads(Path(out, HISTORY_FILE).read_text())
    return {
        "images_per_s": statistics.median(entry["images_per_s"] for entry in history),
        "ap": history[-1]["AP"],
        "outcome": f"loss {history[-1]['loss']:.6f}",
    }


def _outcome_of_scoring(out: Path) -> Result:
    rows = open_table(str(out), "detections").read(["image_id", "detections"])
    # Rounded sums, because boxes of different batches differ in their last bits.
    scores = [sum(row["score"]) for row in rows["detections"].to_pylist()]
    return {"ap": None, "outcome": f"{rows.num_rows} rows, scores {sum(scores):.2f}"}


def _outcome_of_evaluation(out: Path) -> Result:
    rows = open_table(str(out / "metrics"), "metrics").read().to_pylist()
    values = [(row["metric"], row["category"], row["value"]) for row in rows]
    ap = next(row["value"] for row in rows if row["metric"] == "AP" and row["category"] is None)
    return {"ap": ap, "outcome": f"numbers {hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"}


def _print(runs: dict[str, list[Result]]) -> None:
    print(f"{'job, nodes, workers':<32} {'images/s':>9} {'seconds':>8} {'head MB':>8} {'AP':>8}  outcome")
    results = {}
    for name, own in runs.items():
        middle = {key: statistics.median(run[key] for run in own) for key in ("images_per_s", "seconds", "peak_mb")}
        outcomes = " | ".join(sorted({run["outcome"] for run in own}))
        ap = own[-1]["ap"]
        print(
            f"{name:<32} {middle['images_per_s']:>9.1f} {middle['seconds']:>8.1f} {middle['peak_mb']:>8.0f} "
            f"{'–' if ap is None else f'{ap:.4f}':>8}  {outcomes}"
        )
        results[name] = {key: round(value, 1) for key, value in middle.items()} | {"ap": ap, "outcome": outcomes}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
