"""Result and cost of a search: a few short training runs on generated images, including the default.

    python benchmarks/tune.py [--trials 8] [--epochs 8] [--max-concurrent 1] [--out FOLDER] [--quick]

The default has a low learning rate, as for a pretrained model. The model here is small and starts from scratch, so that
the search can improve on the default. Seconds are those of the complete search. The last line is one JSON object;
`epochs_saved` is the fraction of all epochs saved by stopping trials early; `between_trials_s` the seconds from the end
of a trial to the first step of the next (median, with `--max-concurrent 1`); `waited_for_images` the largest part of
the time of a trial's steps in which it waited for images.
"""

import argparse
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from raydet import PrepareShapesConfig, TuneConfig, prepare_shapes, tune
from raydet.common.console import Console
from raydet.training.history import EpochRecord
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
            "between_trials_s": _between_trials_s(result),
            "waited_for_images": round(max(_waited_for_images(trial.history) for trial in result.trials), 3),
        },
    }


def _between_trials_s(result: TuneResult) -> float | None:
    """Return the seconds from the end of a trial to the first step of the next one, median; None if trials overlap."""
    spans = []
    for trial in result.trials:
        first, last = trial.history[0], trial.history[-1]
        validation_s = (last.validation and last.validation.seconds) or 0.0
        spans.append(
            (
                datetime.fromisoformat(first.ended).timestamp() - first.seconds,
                datetime.fromisoformat(last.ended).timestamp() + validation_s,
            )
        )
    spans.sort()
    gaps = [start - end for (_, end), (start, _) in itertools.pairwise(spans)]
    return round(statistics.median(gaps), 1) if gaps and min(gaps) > 0 else None


def _waited_for_images(history: Sequence[EpochRecord]) -> float:
    later = history[1:] or history  # the first epoch starts before its images are there
    return sum(one.step_s["data"] for one in later) / sum(sum(one.step_s.values()) for one in later)


if __name__ == "__main__":
    main()
