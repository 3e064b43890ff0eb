"""Accuracy of `raydet plan`: a probe of this machine, then real runs with one and two workers.

    python benchmarks/plan_vs_measured.py [--quick] [--jobs predict,train] [--images 4000] [--seconds 20] [--rounds 1]

The model is `rt_detr_v2_small` at 256 pixels (random weights), the images are generated. Each round measures a probe
once per job, plans with it, and runs `raydet predict` or `raydet train` from the command line: all cores compute, with
one worker or with two that share the threads. The benchmark compares the seconds of the complete command and the images
per second after start-up: for `predict` those of the middle of the run, from its report; for `train` those of the
second of three epochs (decoding stops before the end of the last epoch). The target is a difference of at most 20 %.
The last line is one JSON object; its `images_per_s` covers the complete time of the command.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from raydet import PlanConfig, PrepareShapesConfig, prepare_shapes
from raydet.cluster.job_record import JOB_FILE
from raydet.cluster.timeline import Window
from raydet.config import PlannedJob
from raydet.planning.plan import plan_for
from raydet.planning.probe import measure
from raydet.planning.throughput import NodeGroup, Probe

MODEL, IMAGE_SIZE = "rt_detr_v2_small", 256
TRAIN_BATCH, EPOCHS = 8, 3
AIM = 0.2

Numbers = dict[str, float]


def main() -> None:
    """Measure, plan, run, and print the differences."""
    options = _parse()
    runs: dict[str, list[tuple[Numbers, Numbers]]] = {}
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as folder:
        _prepare(Path(folder), options)
        for number in range(options.rounds):
            for job in options.jobs:
                config = _config(job, folder, options)
                probe = measure(config, say=lambda text: print(f"  {text}", flush=True))
                for workers in options.workers:
                    planned = _plan(config, probe, workers)
                    out = Path(folder) / f"{job}-{workers}-{number}"
                    measured = (_predict if job == "predict" else _train)(Path(folder), out, workers)
                    runs.setdefault(f"{job}_{workers}", []).append((planned, measured))
                    print(
                        f"round {number + 1}: {job} with {workers}: planned {planned}, measured {measured}", flush=True
                    )
    _print_results(runs)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=lambda text: text.split(","), help="predict,train; with --quick predict")
    parser.add_argument("--workers", type=lambda text: [int(word) for word in text.split(",")], help="1,2")
    parser.add_argument("--images", type=int, help="images to score: 4000, with --quick 400")
    parser.add_argument("--train-images", type=int, default=320, help="images in each of the three epochs")
    parser.add_argument("--image-size", type=int, default=320, help="side of the generated images in pixels")
    parser.add_argument("--seconds", type=float, help="seconds per measurement of the probe: 20, with --quick 4")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="finishes within three minutes on two cores")
    options = parser.parse_args()
    quick = bool(options.quick)
    options.jobs = options.jobs or (["predict"] if quick else ["predict", "train"])
    options.workers = options.workers or ([1] if quick else [1, 2])
    options.images = options.images or (400 if quick else 4000)
    options.seconds = options.seconds or (4.0 if quick else 20.0)
    return options


def _prepare(folder: Path, options: argparse.Namespace) -> None:
    from raydet.models.loading import build_detector
    from raydet.tables.table import open_table

    for name, num_images in (("scored", options.images), ("learned", options.train_images)):
        prepare_shapes(
            PrepareShapesConfig(out=str(folder / name), num_train=num_images, num_val=8, image_size=options.image_size)
        )
    categories = open_table(str(folder / "scored" / "train"), "images").categories
    build_detector(MODEL, categories, image_size=IMAGE_SIZE, seed=0).save(str(folder / "checkpoint"))


def _config(job: PlannedJob, folder: str, options: argparse.Namespace) -> PlanConfig:
    is_predict = job == "predict"
    return PlanConfig(
        images=options.images if is_predict else options.train_images,
        epochs=1 if is_predict else EPOCHS,
        job=job,
        checkpoint=f"{folder}/checkpoint" if is_predict else None,
        model=None if is_predict else MODEL,
        image_size=None if is_predict else IMAGE_SIZE,
        data=f"{folder}/{'scored' if is_predict else 'learned'}/train",
        batch_size=None if is_predict else TRAIN_BATCH,
        use_gpu=False,
        seconds=options.seconds,
    )


def _plan(config: PlanConfig, probe: Probe, workers: int) -> Numbers:
    threads = max(1, probe.num_cpus // workers)
    requested = PlanConfig(**{**vars(config), "num_workers": workers, "threads_per_worker": threads})
    here = NodeGroup(name="this machine", num_nodes=1, num_cpus=probe.num_cpus)
    result = plan_for(requested, [here], [probe])
    rate, seconds = result.forecast.images_per_s, result.total_s
    return {"images_per_s": round(rate, 2), "seconds": round(seconds, 1), "over_all": result.num_images / seconds}


def _predict(folder: Path, out: Path, workers: int) -> Numbers:
    command = ["predict", f"--checkpoint={folder}/checkpoint", f"--data={folder}/scored/train", f"--out={out}"]
    seconds = _run([*command, *_shared_options(workers)])
    report = json.loads((out / JOB_FILE).read_text())
    rate = Window.of(report["timeline"]).images_per_s
    return {"images_per_s": round(rate, 2), "seconds": round(seconds, 1), "over_all": report["num_images"] / seconds}


def _train(folder: Path, out: Path, workers: int) -> Numbers:
    command = ["train", f"--model={MODEL}", f"--image-size={IMAGE_SIZE}", f"--train-data={folder}/learned/train"]
    command += [f"--val-data={folder}/learned/val", f"--out={out}", f"--epochs={EPOCHS}", "--log-images=0"]
    command += [f"--validate-every={EPOCHS}", f"--batch-size={TRAIN_BATCH}"]
    seconds = _run([*command, *_shared_options(workers)])
    history = json.loads((out / "log" / "history.json").read_text())
    num_images = sum(entry["images_per_s"] * entry["seconds"] for entry in history)
    rate = history[1]["images_per_s"]
    return {"images_per_s": round(rate, 2), "seconds": round(seconds, 1), "over_all": num_images / seconds}


def _shared_options(workers: int) -> list[str]:
    threads = max(1, (os.cpu_count() or 1) // workers)
    return [f"--num-workers={workers}", f"--threads-per-worker={threads}", "--use-gpu=false"]


def _run(arguments: list[str]) -> float:
    """Run a raydet command in a separate process and return its seconds."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("RAY_ADDRESS", None)
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "raydet", *arguments], capture_output=True, text=True, env=environment
    )
    if result.returncode:
        sys.exit(f"raydet {arguments[0]} failed:\n{result.stderr[-4000:]}")
    return time.perf_counter() - started


def _print_results(runs: dict[str, list[tuple[Numbers, Numbers]]]) -> None:
    print(
        f"\n{'run':<12} {'planned s':>10} {'measured s':>10} "
        f"{'off':>6}   {'planned':>8} {'measured images/s':>17} {'off':>6}"
    )
    result: dict[str, Any] = {}
    for name, pairs in runs.items():
        middle = {
            key: (
                statistics.median(planned[key] for planned, _ in pairs),
                statistics.median(measured[key] for _, measured in pairs),
            )
            for key in ("seconds", "images_per_s", "over_all")
        }
        off = {key: statistics.median(one[key] / other[key] - 1 for one, other in pairs) for key in middle}
        seconds, rates = middle["seconds"], middle["images_per_s"]
        verdict = "" if abs(off["seconds"]) <= AIM else f"   more than {AIM:.0%} off"
        print(
            f"{name:<12} {seconds[0]:>10.1f} {seconds[1]:>10.1f} {off['seconds']:>+6.0%}   "
            f"{rates[0]:>8.1f} {rates[1]:>17.1f} {off['images_per_s']:>+6.0%}{verdict}"
        )
        for number, kind in enumerate(("planned", "measured")):
            result[f"{name}_{kind}"] = {
                "images_per_s": round(middle["over_all"][number], 2),
                "seconds": round(seconds[number], 1),
                "peak_mb": None,
                "ap": None,
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
