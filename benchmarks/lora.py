"""AP and trained parameters of low-rank adapters beside full fine-tuning, at equal steps.

    python benchmarks/lora.py [--seeds 3] [--contestants full lora frozen] [--rank 16] [--rates 3e-4 ...] [--epochs 40]
        [--learning-rate R] [--checkpoint MODEL] [--out FOLDER] [--image-size 256] [--threads N] [--quick]

The base is a detector with a vision transformer. By default the benchmark trains one, a small LW-DETR with random
weights at the start, on generated shapes of ten classes and on BCCD together. `--checkpoint` names a published one
instead, such as `Roboflow/rf-detr-nano`. The set to fine-tune on is raccoon, photographs of one animal (160 / 40).

The contestants follow the recipe of the family with equal epochs and batch size, except that its learning rate is for
large models and millions of images: a base that is trained here is fine-tuned at 5e-4. They differ in the backbone:

- full: all weights are trained.
- lora: adapters of `--rank` are trained, at the rate of the head, and as further contestants at each of `--rates`.
- frozen: nothing of the backbone is trained.

AP is that of the best epoch on the validation images. Intervals are 95 % t intervals of the differences from `full`,
paired by seed. With `--out` an interrupted benchmark resumes. `--quick` is a smoke test. The last line is one JSON
object, with the curve of every run.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydet import TrainConfig, train
from raydet.training.train import TrainResult

if TYPE_CHECKING:
    from benchmarks.fine_tune import Curve, best_ap, curve_of, interval, working_folder
else:  # a script imports its neighbours without the package name
    from fine_tune import Curve, best_ap, curve_of, interval, working_folder

CONTESTANTS = ("full", "lora", "frozen")
BATCH_SIZE = 8
BASE_EPOCHS = 60
BASE_RATE = 5e-4
"""Learning rate of the base, and of what is fine-tuned from it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        curve: AP by epoch.
        num_trained: Trained parameters.
        seconds: Wall-clock time of training and validation.
    """

    curve: Curve
    num_trained: int
    seconds: float


def main() -> None:
    """Train the base, fine-tune it, and print the comparison."""
    options = _parse()
    with working_folder(options) as folder:
        base = options.checkpoint or _train_base(folder, options)
        own = _contestants(options)
        runs: dict[str, list[Run]] = {name: [] for name in own}
        for seed in range(options.seeds):
            for name, changes in own.items():
                result = train(_config(f"{name}-{seed}", "raccoon", folder, options, model=base, seed=seed, **changes))
                runs[name].append(_run(result))
                print(f"seed {seed}, {name}: AP {best_ap(runs[name][-1].curve):.4f}", flush=True)
    summary = _summary(runs)
    _print(summary)
    print(
        json.dumps({"summary": summary, "curves": {name: [run.curve for run in each] for name, each in runs.items()}})
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each contestant")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="further learning rates of the adapters")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument(
        "--learning-rate", type=float, help="of all contestants; by default 5e-4, or with --checkpoint the recipe's"
    )
    parser.add_argument("--checkpoint", help="model to fine-tune, instead of training one")
    parser.add_argument("--out", help="folder of all tables and runs, which is kept; a temporary one by default")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--threads", type=int, help="torch threads of a run; by default those of the machine")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, 128 pixels, few images")
    options = parser.parse_args()
    if options.learning_rate is None and options.checkpoint is None:
        options.learning_rate = BASE_RATE
    if options.quick:
        options.seeds, options.epochs, options.image_size = 1, 1, 128
    return options


def _contestants(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the options of each contestant."""
    own: dict[str, dict[str, Any]] = {
        "full": {},
        "lora": {"lora": {"r": options.rank}},
        "frozen": {"freeze_backbone": "all"},
    }
    found = {name: own[name] for name in options.contestants}
    if "lora" in found:
        found |= {f"lora {rate:g}": {**own["lora"], "backbone_learning_rate": rate} for rate in options.rates}
    return found


def _config(
    run: str, task: str, folder: Path, options: argparse.Namespace, *, epochs: int | None = None, **changes: Any
) -> TrainConfig:
    data = folder / task
    values: dict[str, Any] = {
        "train_data": str(data / "train"),
        "val_data": str(data / "val"),
        "out": str(data / run),
        "epochs": epochs or options.epochs,
        "batch_size": BATCH_SIZE,
        "early_stopping_patience": 0,
        "image_size": options.image_size,
        "multi_scale": [],  # the smaller sizes would have fewer cells than queries
        "validate_batch_size": 16,
        "log_images": 0,
    }
    if options.threads:
        values["threads_per_worker"] = options.threads
    if options.learning_rate:
        values["learning_rate"] = options.learning_rate
    return TrainConfig(**{**values, **changes})


def _train_base(folder: Path, options: argparse.Namespace) -> str:
    """Train the model that the contestants start from, and return its folder."""
    config = _config(
        "run",
        "pretraining",
        folder,
        options,
        model=random_model(folder / "random", options.image_size),
        epochs=1 if options.quick else BASE_EPOCHS,
        validate_every=1 if options.quick else 6,
        learning_rate=BASE_RATE,
        backbone_learning_rate=BASE_RATE,
        layer_decay=1.0,
        schedule="one_cycle",
        warmup_steps=0,
        augmentation="flip",
        seed=0,
    )
    result = train(config)
    print(f"base: AP {result.best.value('AP') or 0.0:.4f}", flush=True)
    return result.checkpoint


def random_model(folder: Path, side: int) -> str:
    """Save a small LW-DETR with random weights, at most two million parameters, and return its folder."""
    if (folder / "preprocessor_config.json").exists():
        return str(folder)
    import torch
    from transformers import AutoModelForObjectDetection, LwDetrConfig, LwDetrViTConfig

    from raydet.models.families import FAMILIES
    from raydet.models.processors import default_processor, resized_processor

    backbone: dict[str, Any] = {"out_features": ["stage2", "stage4", "stage6"]}
    config = LwDetrConfig(
        backbone_config=LwDetrViTConfig(
            hidden_size=96,
            num_hidden_layers=6,
            num_attention_heads=3,
            mlp_ratio=4,
            patch_size=16,
            pretrain_image_size=side,
            num_windows=4,
            window_block_indices=[0, 2, 4],
            **backbone,
        ),
        projector_scale_factors=[1.0],
        d_model=96,
        c2f_num_blocks=1,
        decoder_layers=3,
        decoder_ffn_dim=256,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        decoder_n_points=2,
        num_queries=50,
        group_detr=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForObjectDetection.from_config(config).save_pretrained(folder)
    family = FAMILIES["lw_detr"]
    resized_processor(default_processor(family), family, side).save_pretrained(folder)
    return str(folder)


def _run(result: TrainResult) -> Run:
    records = result.history
    return Run(
        curve=curve_of(records),
        num_trained=records[-1].num_trained_parameters or 0,
        seconds=sum(record.total_s for record in records),
    )


def _summary(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return AP, trained parameters and time of each contestant, and its differences from `full`, paired by seed."""
    summary: dict[str, Any] = {}
    for name, each in runs.items():
        aps = [best_ap(run.curve) for run in each]
        summary[name] = {
            "ap": aps,
            "mean": statistics.mean(aps),
            "trained_parameters": each[0].num_trained,
            "seconds": round(statistics.mean(run.seconds for run in each), 1),
        }
    if "full" in summary:
        for own in summary.values():
            pairs = zip(own["ap"], summary["full"]["ap"], strict=True)
            own["minus_full"] = interval([mine - theirs for mine, theirs in pairs])
    return summary


def _print(summary: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"{'contestant':14}{'trained':>12}{'seconds':>9}{'AP':>8}   minus full (95 %)")
    for name, own in summary.items():
        text, difference = "", own.get("minus_full")
        if difference is not None and name != "full":
            text = f"{difference['mean']:+.4f}"
            if difference["low"] is not None:
                text += f" ({difference['low']:+.4f} to {difference['high']:+.4f})"
        print(f"{name:14}{own['trained_parameters']:12,}{own['seconds']:9.1f}{own['mean']:8.4f}   {text}")


if __name__ == "__main__":
    main()
