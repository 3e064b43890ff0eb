"""Scoring with several adapters in one pass beside one run for each merged checkpoint.

    python benchmarks/adapters.py [--images 300] [--adapters 3] [--rounds 5] [--image-size 128] [--threads N]
        [--data FOLDER] [--quick]

The base is the small LW-DETR of `benchmarks/lora.py` with random weights; each adapter has rank 16 and other random
weights. By default the images are generated JPEGs of 640 × 480 pixels. Each round runs both contestants in this
process, in turn; their times include loading the models and writing the tables, but no imports. CPU seconds are those
of all threads, and suffer less from other load on the machine. The tables of both must be equal to the last bit. The
last line is one JSON object.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raydet import PredictConfig, predict
from raydet.models.loading import build_detector
from raydet.tables.schema import Category
from raydet.tables.table import open_table

if TYPE_CHECKING:
    from benchmarks.contest import run_in_turn
    from benchmarks.generated_jpegs import jpegs
    from benchmarks.lora import random_model
else:  # a script imports its neighbours without the package name
    from contest import run_in_turn
    from generated_jpegs import jpegs
    from lora import random_model

CONTESTANTS = ("one pass", "a run each")


def main() -> None:
    """Score all images with all adapters, in both ways, and print the comparison."""
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        data = options.data or _write_images(folder / "images", options.images)
        base = random_model(folder / "base", options.image_size)
        runs = [_save_adapted(base, folder / f"run{number}", number) for number in range(options.adapters)]
        common: dict[str, Any] = {"data": data, "limit": options.images, "num_workers": 1, "score_threshold": 0.01}
        common |= {"threads_per_worker": options.threads, "use_gpu": False}

        def score(contestant: str) -> dict[str, Any]:
            out = folder / contestant
            shutil.rmtree(out, ignore_errors=True)
            started, cpu_started = time.perf_counter(), time.process_time()
            if contestant == "one pass":
                adapters = [str(run / "adapter") for run in runs]
                result = predict(PredictConfig(checkpoint=base, adapter=adapters, out=str(out), **common))
            else:
                for run in runs:
                    result = predict(
                        PredictConfig(checkpoint=str(run / "checkpoint"), out=str(out / run.name), **common)
                    )
            seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
            return {"seconds": seconds, "cpu_s": cpu_s, "images_per_s": result.num_images / seconds}

        for contestant in CONTESTANTS:  # imports and caches
            score(contestant)
        _check_equal(folder, [run.name for run in runs])
        measured = run_in_turn(
            CONTESTANTS, score, lambda run: f"{run['images_per_s']:.2f} images/s", rounds=options.rounds
        )
    _print(measured, options)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=128, help="side in pixels of the model's images")
    parser.add_argument("--threads", type=int, help="torch threads; by default those of the machine")
    parser.add_argument("--data", help="folder of images, instead of generated ones")
    parser.add_argument("--quick", action="store_true", help="one round over 60 images")
    options = parser.parse_args()
    if options.quick:
        options.images, options.rounds = 60, 1
    return options


def _write_images(folder: Path, num_images: int) -> str:
    folder.mkdir()
    for number, content in enumerate(jpegs(num_images)):
        (folder / f"{number:05d}.jpg").write_bytes(content)
    return str(folder)


def _save_adapted(base: str, folder: Path, seed: int) -> Path:
    """Save an adapter and the merged checkpoint, with random numbers for what a training would have changed."""
    categories = [Category(number, f"class {number}") for number in range(seed + 2)]
    detector = build_detector(base, categories, image_size=None, seed=seed, lora={"r": 16})
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in detector.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    (folder / "adapter").mkdir(parents=True)
    detector.save_adapter(str(folder / "adapter"), base=base)
    detector.save(str(folder / "checkpoint"))
    return folder


def _check_equal(folder: Path, names: list[str]) -> None:
    for name in names:
        one, other = (open_table(str(folder / contestant / name), "detections") for contestant in CONTESTANTS)
        rows = [[row for batch in table.iter_batches() for row in batch.to_pylist()] for table in (one, other)]
        assert rows[0] == rows[1], f"the tables of {name} differ"


def _print(measured: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    pairs = list(zip(*(measured[name] for name in CONTESTANTS), strict=True))
    ratios, cpu_ratios = ([other[key] / one[key] for one, other in pairs] for key in ("seconds", "cpu_s"))
    print(f"{options.images} images, {options.adapters} adapters, {options.image_size} pixels")
    print(f"{'':<12} {'images/s through all adapters':>30} {'s':>8} {'CPU s':>8}")
    for name, runs in measured.items():
        rate, seconds, cpu_s = (
            statistics.median(run[key] for run in runs) for key in ("images_per_s", "seconds", "cpu_s")
        )
        print(f"{name:<12} {rate:>30.2f} {seconds:>8.2f} {cpu_s:>8.2f}")
    print(f"one pass is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    text = f"{min(cpu_ratios):.2f} to {max(cpu_ratios):.2f}"
    print(f"a run each takes {statistics.median(cpu_ratios):.2f} times the CPU time ({text})")
    print(json.dumps({"runs": measured, "ratios": ratios, "cpu_ratios": cpu_ratios}))


if __name__ == "__main__":
    main()
