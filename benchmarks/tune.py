"""Result and cost of a search: a few short training runs on generated images, including the default.

    python benchmarks/tune.py [--trials 8] [--epochs 8] [--max-concurrent 1] [--out FOLDER] [--quick]

The default has a low learning rate, as for a pretrained model. The model here is small and starts from scratch, so that
the search can improve on the default. Seconds are those of the complete search. The last line is one JSON object;
`epochs_saved` is the fraction of all epochs saved by stopping trials early.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from raydet import PrepareShapesConfig, TuneConfig, prepare_shapes, tune
from raydet.common.console import Console
from raydet.tuning.results import TuneResult

IMAGE_SIZE = 96


def main() -> None:
    """Prepare images, search, and print the results."""
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as folder:
        data, out = Path(folder) / "data", options.out or str(Path(folder) / "tune")
        num_train = 80 if options.quick else 160
        prepare_shapes(
            PrepareShapesConfig(out=str(data), num_train=num_train, num_val=40, image_size=IMAGE_SIZE, max_shapes=4)
        )
        started = time.perf_counter()
        result = tune(_search(options, data, out), console=Console())
        seconds = time.perf_counter() - started
    for line in result.lines():
        print(line)
    print(json.dumps(_numbers(result, seconds, options.epochs)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--max-concurrent", type=int, help="concurrent trials; as many as the machine has room for by default"
    )
    parser.add_argument("--out", help="folder of the search, which is kept; a temporary one by default")
    parser.add_argument("--quick", action="store_true", help="three tiny trials, as a smoke test")
    options = parser.parse_args()
    if options.quick:
        options.trials, options.epochs = 3, 2
    return options


def _search(options: argparse.Namespace, data: Path, out: str) -> TuneConfig:
    return TuneConfig(
        out=out,
        train_config={
            "train_data": str(data / "train"),
            "val_data": str(data / "val"),
            "model": "rt_detr_v2_small",
            "image_size": IMAGE_SIZE,
            "epochs": options.epochs,
            "batch_size": 16,
            "validate_batch_size": 20,
            "learning_rate": 1e-4,
            "backbone_learning_rate": 1e-4,
            "augmentation": "flip",
            "log_images": 0,
        },
        space={
            "learning_rate": {"loguniform": [1e-4, 5e-3]},
            "backbone_learning_rate": {"loguniform": [1e-4, 5e-3]},
            "batch_size": {"choice": [8, 16]},
            "ema_decay": {"choice": [0.0, 0.9]},
        },
        num_trials=options.trials,
        max_concurrent=options.max_concurrent,
        grace_epochs=max(1, options.epochs // 4),
        reduction_factor=2,
    )


def _numbers(result: TuneResult, seconds: float, epochs: int) -> dict[str, dict[str, float | int | None]]:
    peak_kb = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    trained = sum(len(trial.history) for trial in result.trials)
    states = [trial.state for trial in result.trials]
    return {
        "default": {"ap": result.default_value},
        "best": {
            "ap": result.value,
            "seconds": round(seconds, 1),
            "peak_mb": round(peak_kb / 1024),
            "trials": len(result.trials),
            "stopped": states.count("stopped"),
            "failed": states.count("failed"),
            "epochs_saved": round(1 - trained / (epochs * len(result.trials)), 3),
        },
    }


if __name__ == "__main__":
    main()
