"""AP of a recipe, and its spread over seeds and numbers of workers.

    python benchmarks/workers_and_seeds.py [--config jobs/configs/bccd.yaml] [--data TRAIN VAL] [--seeds 0,1,2]

The benchmark trains with a recipe, on BCCD by default, with one worker for each seed and with two workers for the first
seed. Rounding makes any two runs diverge after some steps, so that APs cannot be equal; the target for two workers is
an AP within the spread of the seeds. AP is that of the best epoch, which the run keeps. The last line is one JSON
object.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

from raydet import PrepareCocoConfig, TrainConfig, prepare_coco, train
from raydet.config.options import load_file

PROJECT = Path(__file__).parents[1]

Result = dict[str, float | None]


def main() -> None:
    """Train the runs one after another and print the results."""
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as folder:
        data = options.data or _prepare_bccd(folder)
        runs = [(f"workers_1_seed_{seed}", 1, seed) for seed in options.seeds]
        if options.two_workers:
            runs.append((f"workers_2_seed_{options.seeds[0]}", 2, options.seeds[0]))
        results: dict[str, Result] = {}
        for name, num_workers, seed in runs:
            config = load_file(
                TrainConfig,
                options.config,
                train_data=data[0],
                val_data=data[1],
                out=str(Path(folder) / name),
                num_workers=num_workers,
                seed=seed,
                epochs=options.epochs,
            )
            results[name] = _train(config)
            print(f"{name}: best AP {results[name]['ap']:.4f} in {results[name]['seconds']:.0f} s", flush=True)
    _print_verdict(results, num_seeds=len(options.seeds))
    print(json.dumps(results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default=str(PROJECT / "jobs" / "configs" / "bccd.yaml"), help="recipe to train with"
    )
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "VAL"), help="images tables; BCCD by default")
    parser.add_argument("--epochs", type=int, help="those of the recipe by default")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--two-workers", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def _prepare_bccd(folder: str) -> list[str]:
    source = Path(os.environ.get("RAYDET_TEST_DATA", PROJECT.parent / "shared" / "data")) / "bccd"
    tables = []
    for split in ("train", "val"):
        tables.append(str(Path(folder) / split))
        annotations = str(source / f"instances_{split}.json")
        prepare_coco(PrepareCocoConfig(images=str(source / "images"), annotations=annotations, out=tables[-1]))
    return tables


def _train(config: TrainConfig) -> Result:
    started = time.perf_counter()
    result = train(config)
    seconds = time.perf_counter() - started
    rates = [record.images_per_s for record in result.history]
    peak_kb = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "images_per_s": round(statistics.median(rates), 2),
        "seconds": round(seconds, 1),
        "peak_mb": round(max(peak_kb / 1024, max(record.peak_memory_mb or 0 for record in result.history))),
        "ap": result.best.value("AP"),
        "ap_of_last_epoch": result.history[-1].value("AP"),
    }


def _print_verdict(results: dict[str, Result], *, num_seeds: int) -> None:
    values = [result["ap"] or 0.0 for result in results.values()]
    seeds = values[:num_seeds]
    deviation = statistics.stdev(seeds) if num_seeds > 1 else 0.0
    print(
        f"one worker: mean AP {statistics.mean(seeds):.4f}, deviation {deviation:.4f}, "
        f"from {min(seeds):.4f} to {max(seeds):.4f}"
    )
    for two_workers in values[num_seeds:]:
        place = "within" if min(seeds) <= two_workers <= max(seeds) else "outside"
        print(f"two workers: AP {two_workers:.4f}, {place} the spread of the seeds")


if __name__ == "__main__":
    main()
