"""AP after fine-tuning a trained checkpoint on new classes, at equal steps.

    python benchmarks/fine_tune.py [--seeds 3] [--tasks raccoon bccd shapes] [--contestants ...] [--out FOLDER]
        [--scale 1.0] [--image-size 256] [--own-length] [--quick]

First the benchmark trains `rt_detr_v2_small` on generated shapes of ten classes and on BCCD together. It then
fine-tunes this checkpoint on three small sets:

- raccoon: photographs of one animal (160 / 40), a class that the checkpoint does not have.
- bccd: 40 images of BCCD that the checkpoint has not seen; two of the three classes keep their names.
- shapes: 80 generated images, whose ten classes have other names than before.

The contestants differ in the start and in the recipe:

- scratch: from random weights, with the options of `jobs/configs/small.yaml`.
- first_version: from the checkpoint with all class heads drawn anew, and the defaults of the first version.
- rows: from the checkpoint, whose class rows are kept or averaged; otherwise as first_version.
- recipe: the checkpoint and nothing else, so that raydet chooses all options; epochs and batch size are those of the
  others, unless `--own-length` leaves them to the recipe too.

AP is that of the best epoch on the validation images, which is the one that a run keeps. Intervals are 95 % t intervals
of the differences, paired by seed. With `--out` an interrupted benchmark resumes. `--scale` shortens all runs, and
`--quick` is a smoke test. The last line is one JSON object, with the curve of every run.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydet import PrepareCocoConfig, TrainConfig, prepare_coco, train
from raydet.cluster.session import session
from raydet.config import field_names
from raydet.config.options import load_file
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, is_table, open_table
from raydet.training.history import EpochRecord

if TYPE_CHECKING:
    from benchmarks import ten_shapes
else:  # a script imports its neighbours without the package name
    import ten_shapes

PROJECT = Path(__file__).parents[1]
CONTESTANTS = ("scratch", "first_version", "rows", "recipe")
BATCH_SIZE = 8
NUM_CELLS = 40
"""Images of BCCD to fine-tune on; the checkpoint is trained on the others."""
FIRST_VERSION: Mapping[str, Any] = {
    "learning_rate": 1e-4,
    "backbone_learning_rate": 1e-5,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 0,
    "max_grad_norm": 0.1,
    "ema_decay": 0.0,
    "augmentation": "light",
    "close_mosaic": 0,
    "batch_norm": "as_is",
    "freeze_backbone": "none",
    "precision": "fp32",
}
"""Defaults of raydet's first version."""
# Until recipes decide options, there is nothing to switch off.
NO_RECIPE: Mapping[str, Any] = {"recipe": "none"} if "recipe" in field_names(TrainConfig) else {}

Curve = list[dict[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set to fine-tune on.

    Attributes:
        epochs: Epochs of a full run.
        validate_every: Epochs between validations.
    """

    epochs: int
    validate_every: int


TASKS: Mapping[str, Task] = {
    "raccoon": Task(epochs=12, validate_every=1),
    "bccd": Task(epochs=36, validate_every=3),
    "shapes": Task(epochs=20, validate_every=2),
}
PRETRAINING = Task(epochs=36, validate_every=6)


def main() -> None:
    """Train the checkpoint, fine-tune it, and print the comparison."""
    options = _parse()
    with working_folder(options) as folder:
        checkpoint = _pretrain(folder, options)
        runs: dict[str, dict[str, list[Curve]]] = {
            task: {name: [] for name in options.contestants} for task in options.tasks
        }
        for seed in range(options.seeds):
            for task in options.tasks:
                for name in options.contestants:
                    curve = curve_of(train(_config(name, task, seed, folder, checkpoint, options)).history)
                    runs[task][name].append(curve)
                    print(f"{task}, seed {seed}, {name}: AP {best_ap(curve):.4f}", flush=True)
    summary = {task: _summary(own) for task, own in runs.items()}
    _print(summary)
    print(json.dumps({"summary": summary, "curves": runs}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each contestant on each set")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--checkpoint", help="checkpoint to fine-tune, instead of training one")
    parser.add_argument("--out", help="folder of all tables and runs, which is kept; a temporary one by default")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all numbers of epochs")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--own-length", action="store_true", help="let the recipe choose epochs and batch size")
    parser.add_argument("--threads", type=int, help="torch threads of a run; by default those of the machine")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, 96 pixels, few images")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.scale, options.image_size = 1, 0.0, 96
    return options


# Data.


@contextlib.contextmanager
def working_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Context manager: the folder of the tables and runs, with the tables, and one cluster for all runs."""
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as temporary:
        folder = Path(options.out or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        _write_tables(folder, options)
        # Each run starts one worker process.
        with session(str(folder / "log")):
            yield folder


def _write_tables(folder: Path, options: argparse.Namespace) -> None:
    """Write the images tables that are not there yet: FOLDER/NAME/train and FOLDER/NAME/val."""
    source = Path(os.environ.get("RAYDET_TEST_DATA", PROJECT.parent / "shared" / "data"))
    for name in ("raccoon", "bccd"):
        for split in ("train", "val"):
            out = folder / "sources" / name / split
            if not is_table(str(out)):
                annotations = source / name / f"instances_{split}.json"
                prepare_coco(
                    PrepareCocoConfig(images=str(source / name / "images"), annotations=str(annotations), out=str(out))
                )
    few = 12 if options.quick else None
    side = options.image_size
    cells = {split: _rows(folder / "sources" / "bccd" / split) for split in ("train", "val")}
    cell_classes = _classes(folder / "sources" / "bccd" / "train")
    both = [*ten_shapes.CLASSES, *cell_classes]
    shifted = [_shifted(row, len(ten_shapes.CLASSES)) for row in cells["train"][NUM_CELLS:][:few]]
    drawn = ten_shapes.rows(few or 400, side=side, seed=0, first_id=10**6)
    _write(folder / "pretraining" / "train", both, [*shifted, *drawn])
    shifted = [_shifted(row, len(ten_shapes.CLASSES)) for row in cells["val"][:few][:40]]
    _write(
        folder / "pretraining" / "val",
        both,
        [*shifted, *ten_shapes.rows(few or 40, side=side, seed=1, first_id=10**6)],
    )
    renamed = [f"{name} of the patient" if index == 0 else name for index, name in enumerate(cell_classes)]
    _write(folder / "bccd" / "train", renamed, cells["train"][:NUM_CELLS][:few])
    _write(folder / "bccd" / "val", renamed, cells["val"][40:][:few])
    for split in ("train", "val"):
        _write(folder / "raccoon" / split, ["raccoon"], _rows(folder / "sources" / "raccoon" / split)[:few])
        others = [f"form {number}" for number in range(len(ten_shapes.CLASSES))]
        number = few or {"train": 80, "val": 40}[split]
        seed = {"train": 2, "val": 3}[split]
        _write(folder / "shapes" / split, others, ten_shapes.rows(number, side=side, seed=seed, first_id=1))


def _rows(uri: Path) -> list[dict[str, Any]]:
    return list(open_table(str(uri), "images").read().to_pylist())


def _classes(uri: Path) -> list[str]:
    return [category.name for category in open_table(str(uri), "images").categories]


def _shifted(row: Mapping[str, Any], by: int) -> dict[str, Any]:
    """Return a row whose categories are further up in a longer list of classes."""
    objects = {**row["objects"], "category": [index + by for index in row["objects"]["category"]]}
    return {**row, "objects": objects}


def _write(uri: Path, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    if is_table(str(uri)):
        return
    categories = [Category(index, name) for index, name in enumerate(names)]
    with TableWriter(str(uri), build_schema("images", categories), config_hash="0" * 12) as writer:
        for row in rows:
            writer.write_rows([dict(row)])


# Runs.


def _pretrain(folder: Path, options: argparse.Namespace) -> str:
    """Train the checkpoint that the contestants start from, and return its folder."""
    if options.checkpoint:
        return str(Path(options.checkpoint).absolute())
    config = _from_scratch(
        train_data=str(folder / "pretraining" / "train"),
        val_data=str(folder / "pretraining" / "val"),
        out=str(folder / "pretraining" / "run"),
        seed=0,
        **_length(PRETRAINING, options),
        **_common(options),
    )
    result = train(config)
    print(f"pretraining: AP {result.best.value('AP') or 0.0:.4f}", flush=True)
    return result.checkpoint


def _config(name: str, task: str, seed: int, folder: Path, checkpoint: str, options: argparse.Namespace) -> TrainConfig:
    """Return the config of a run of a contestant."""
    data = folder / task
    common: dict[str, Any] = {
        "train_data": str(data / "train"),
        "val_data": str(data / "val"),
        "out": str(data / f"{name}-{seed}"),
        "seed": seed,
        **_length(TASKS[task], options),
        **_common(options),
    }
    if name == "scratch":
        return _from_scratch(**common)
    if name == "recipe":
        del common["image_size"]  # that of the checkpoint
        if options.own_length:
            del common["epochs"], common["batch_size"]
        return TrainConfig(model=checkpoint, **common)
    model = checkpoint
    if name == "first_version":
        model = str(data / f"heads-{seed}")
        if not Path(model, "config.json").exists():
            _draw_heads_anew(checkpoint, open_table(str(data / "train"), "images").categories, model, seed)
    return TrainConfig(model=model, **FIRST_VERSION, **NO_RECIPE, **common)


def _from_scratch(**options: Any) -> TrainConfig:
    file = str(PROJECT / "jobs" / "configs" / "small.yaml")
    return load_file(TrainConfig, file, **options, **NO_RECIPE)


def _length(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    epochs = max(1, round(task.epochs * options.scale))
    return {"epochs": epochs, "validate_every": min(task.validate_every, epochs), "batch_size": BATCH_SIZE}


def _common(options: argparse.Namespace) -> dict[str, Any]:
    common = {"image_size": options.image_size, "validate_batch_size": 16, "log_images": 0}
    return common | ({"threads_per_worker": options.threads} if options.threads else {})


def _draw_heads_anew(checkpoint: str, categories: Sequence[Category], target: str, seed: int) -> None:
    """Save a checkpoint for other classes all of whose class tensors are drawn as transformers draws them."""
    import torch
    from transformers import AutoModelForObjectDetection

    from raydet.models.class_heads import class_tensor_names
    from raydet.models.loading import build_detector

    detector = build_detector(checkpoint, categories, image_size=None, seed=seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        fresh = AutoModelForObjectDetection.from_config(detector.model.config).state_dict()
        own = detector.model.state_dict()
        for name in class_tensor_names(detector.model.config, AutoModelForObjectDetection.from_config):
            own[name].copy_(fresh[name])
    detector.save(target)


# Results.


def curve_of(history: Iterable[EpochRecord]) -> Curve:
    """Return AP and time by epoch."""
    return [
        {"epoch": record.epoch, "AP": record.value("AP"), "seconds": round(record.total_s, 1)} for record in history
    ]


def best_ap(curve: Curve) -> float:
    """Return the AP of the best epoch, which a run keeps."""
    return max((float(entry["AP"]) for entry in curve if entry["AP"] is not None), default=0.0)


def _summary(runs: Mapping[str, Sequence[Curve]]) -> dict[str, Any]:
    """Return the APs of each contestant, and its differences from the first version, paired by seed."""
    summary: dict[str, Any] = {}
    for name, curves in runs.items():
        aps = [best_ap(curve) for curve in curves]
        last = [float(curve[-1]["AP"] or 0.0) for curve in curves]
        summary[name] = {"ap": aps, "mean": statistics.mean(aps), "mean_of_last_epoch": statistics.mean(last)}
    if "first_version" in runs:
        for name in runs:
            pairs = zip(summary[name]["ap"], summary["first_version"]["ap"], strict=True)
            summary[name]["minus_first_version"] = interval([ours - theirs for ours, theirs in pairs])
    return summary


def interval(differences: Sequence[float]) -> dict[str, float | None]:
    """Return the mean of paired differences and its 95 % t interval, which needs at least two."""
    mean, number = statistics.mean(differences), len(differences)
    if number < 2:
        return {"mean": mean, "low": None, "high": None}
    from scipy.stats import t

    half = float(t.ppf(0.975, number - 1)) * statistics.stdev(differences) / number**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _print(summary: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"{'set':10}{'contestant':16}{'AP':>8}{'last':>8}   minus first_version (95 %)")
    for task, own in summary.items():
        for name, numbers in own.items():
            difference = numbers.get("minus_first_version")
            text = ""
            if difference is not None and name != "first_version":
                text = f"{difference['mean']:+.4f}"
                if difference["low"] is not None:
                    text += f" ({difference['low']:+.4f} to {difference['high']:+.4f})"
            print(f"{task:10}{name:16}{numbers['mean']:8.4f}{numbers['mean_of_last_epoch']:8.4f}   {text}")
    for name in ("rows", "recipe"):
        found = [
            own[name]["minus_first_version"] for own in summary.values() if "minus_first_version" in own.get(name, {})
        ]
        above = sum(item["low"] is not None and item["low"] > 0 for item in found)
        below = sum(item["high"] is not None and item["high"] < 0 for item in found)
        if found:
            print(f"{name}: above first_version on {above} of {len(found)} sets, below on {below} (wanted: 2 of 3, 0)")


if __name__ == "__main__":
    main()
