"""Training speed and memory of raydet, the Hugging Face Trainer and the limit, on the same model and images.

    python benchmarks/train_vs_peers.py [--quick] [--augmentation light] [--contestants raydet,limit]

Every contestant trains `rt_detr_v2_small` from scratch at 256 pixels in batches of 8 on blood cells (BCCD), each in a
separate process, in turn, round after round, so that noise on the machine affects all of them equally. Only complete
epochs after the first are timed, without the time between epochs, in which raydet writes a checkpoint.

- raydet, raydet_bf16: `raydet.train()` through Ray on this machine, with workers that share the threads.
- hf_trainer, hf_trainer_bf16: the Trainer as the object-detection guide sets it up (albumentations in a `datasets`
  transform, image processor, collate function), with the fastest number of loader processes (0, 1, 2).
- limit, limit_bf16: only the same model, loss, optimizer and clipping, over tensors in memory.

`images_per_s` is the median over the rounds. `seconds` is the time of the complete process. `peak_mb` is the largest
sum of the proportional set sizes (PSS) of all its processes.
"""

import argparse
import functools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.coco_folder import prepare_first
    from benchmarks.contest import Pair, print_results, run_one, run_rounds
    from benchmarks.guide_trainer import collate as collate_rows
    from benchmarks.guide_trainer import pipeline, transform
else:  # a script imports its neighbours without the package name
    from coco_folder import prepare_first
    from contest import Pair, print_results, run_one, run_rounds
    from guide_trainer import collate as collate_rows
    from guide_trainer import pipeline, transform

CONTESTANTS = ("raydet", "hf_trainer", "limit", "raydet_bf16", "limit_bf16", "hf_trainer_bf16")
PAIRS: "tuple[Pair, ...]" = (
    ("raydet", "hf_trainer", 1.0),
    ("raydet", "limit", 0.85),
    ("raydet_bf16", "limit_bf16", 0.85),
    ("raydet_bf16", "hf_trainer_bf16", 1.0),
)
IMAGE_SIZE, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 256, 8, 1e-3, 1e-4, 0.1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Setting of all contestants.

    Attributes:
        folder: Folder of the images tables and of the runs.
        augmentation: `flip`, or `light`, that of the guide.
        timed_epochs: Number of timed epochs after the first one.
        threads: torch threads over all workers.
        workers: raydet's training workers.
        loaders: The Trainer's loader processes.
    """

    folder: Path
    augmentation: str
    timed_epochs: int
    threads: int
    workers: int
    loaders: int

    def to_json(self) -> dict[str, Any]:
        """Return the setting as JSON values."""
        return {**vars(self), "folder": str(self.folder)}


def main() -> None:
    """Run the contestants in rounds and print the results."""
    options = _parse()
    if options.child:
        content = json.loads(options.child)
        print(json.dumps(_compete(options.contestants[0], Setting(**{**content, "folder": Path(content["folder"])}))))
        return
    # So that `timeout` also stops the contestant.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as folder:
        # The validation split is small, but the last epoch requires one.
        prepare_first(options.data, Path(folder), {"train": options.images, "val": BATCH_SIZE})
        setting = Setting(
            folder=Path(folder),
            augmentation=options.augmentation,
            timed_epochs=options.timed_epochs,
            threads=options.threads,
            workers=options.workers,
            loaders=options.loaders[0],
        )
        if len(options.loaders) > 1 and any(name.startswith("hf_trainer") for name in options.contestants):
            setting = _with_best_loaders(setting, options.loaders)
        runs = run_rounds(__file__, options.contestants, setting.to_json(), rounds=options.rounds)
    print(
        f"\naugmentation {setting.augmentation}, {setting.threads} threads, {setting.workers} raydet workers, "
        f"Trainer with {setting.loaders} loaders"
    )
    print_results(runs, PAIRS)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).parents[2] / "shared" / "data"
    data = Path(os.environ.get("RAYDET_TEST_DATA", shared)) / "bccd"
    parser.add_argument("--data", type=Path, default=data, help="folder with BCCD's images and instances_*.json")
    parser.add_argument(
        "--contestants",
        type=lambda text: text.split(","),
        default=None,
        help="contestants to run: " + ", ".join(CONTESTANTS),
    )
    parser.add_argument("--augmentation", choices=("flip", "light"), default="flip")
    parser.add_argument("--rounds", type=int, default=None, help="number of rounds; default: 3, or 1 with --quick")
    parser.add_argument(
        "--timed-epochs", type=int, default=None, help="epochs to time after the first; default: 2, or 1 with --quick"
    )
    parser.add_argument("--images", type=int, default=None, help="training images; default: 200, or 64 with --quick")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of every contestant")
    parser.add_argument("--workers", type=int, default=2, help="raydet's workers, which share the threads")
    parser.add_argument(
        "--loaders",
        type=lambda text: [int(number) for number in text.split(",")],
        default=None,
        help="loader processes to try, of which the Trainer uses the fastest; default: 0,1,2, or 1 with --quick",
    )
    parser.add_argument("--quick", action="store_true", help="finishes within three minutes on two cores")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quick = bool(options.quick)
    options.contestants = options.contestants or list(CONTESTANTS[: 5 if quick else 6])
    unknown = set(options.contestants) - set(CONTESTANTS)
    if unknown:
        parser.error(f"--contestants does not have {', '.join(sorted(unknown))}; use {', '.join(CONTESTANTS)}")
    if not options.child and not (options.data / "instances_train.json").is_file():
        parser.error(f"no BCCD in {options.data}; set --data or RAYDET_TEST_DATA to its folder")
    for name, short, full in (
        ("rounds", 1, 3),
        ("timed_epochs", 1, 2),
        ("images", 64, 200),
        ("loaders", [1], [0, 1, 2]),
    ):
        if getattr(options, name) is None:
            setattr(options, name, short if quick else full)
    return options


def _with_best_loaders(setting: Setting, choices: Iterable[int]) -> Setting:
    speeds = {}
    for loaders in choices:
        trial = Setting(**{**vars(setting), "timed_epochs": 1, "loaders": loaders})
        speeds[loaders] = run_one(__file__, "hf_trainer", trial.to_json())["images_per_s"]
    print("Trainer by loader processes: " + ", ".join(f"{k}: {v:.2f} images/s" for k, v in speeds.items()), flush=True)
    return Setting(**{**vars(setting), "loaders": max(speeds, key=lambda loaders: speeds[loaders])})


def _compete(name: str, setting: Setting) -> dict[str, float]:
    """Train a contestant in its own process and return its images per second."""
    contestants: dict[str, Callable[[Setting, bool], float]] = {
        "raydet": _train_with_raydet,
        "hf_trainer": _train_with_trainer,
        "limit": _train_at_the_limit,
    }
    is_bf16 = name.endswith("_bf16")
    return {"images_per_s": contestants[name.removesuffix("_bf16")](setting, is_bf16)}


def _train_with_raydet(setting: Setting, is_bf16: bool) -> float:
    from raydet import TrainConfig, train
    from raydet.tables.table import open_table

    # The first epoch is a warm-up, and the last one ends with a validation.
    epochs = setting.timed_epochs + 2
    with tempfile.TemporaryDirectory(dir=setting.folder) as out:
        result = train(
            TrainConfig(
                recipe="none",
                train_data=str(setting.folder / "train"),
                val_data=str(setting.folder / "val"),
                out=str(Path(out) / "run"),
                image_size=IMAGE_SIZE,
                batch_size=BATCH_SIZE,
                epochs=epochs,
                validate_every=epochs,
                learning_rate=LEARNING_RATE,
                backbone_learning_rate=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                max_grad_norm=MAX_GRAD_NORM,
                augmentation="light" if setting.augmentation == "light" else "flip",
                precision="bf16" if is_bf16 else "fp32",
                num_workers=setting.workers,
                threads_per_worker=max(1, setting.threads // setting.workers),
                use_gpu=False,
            )
        )
    timed = result.history[1:-1]
    num_images = open_table(str(setting.folder / "train"), "images").num_rows
    timed_s: float = sum(record.seconds for record in timed)
    return num_images * len(timed) / timed_s


def _model(setting: Setting) -> Any:
    """Build the detector with which all contestants start, on the CPU."""
    import torch

    from raydet.models.loading import build_detector
    from raydet.tables.table import open_table

    torch.set_num_threads(setting.threads)
    categories = open_table(str(setting.folder / "train"), "images").categories
    return build_detector("rt_detr_v2_small", categories, image_size=IMAGE_SIZE, seed=0)


def _train_with_trainer(setting: Setting, is_bf16: bool) -> float:
    import datasets
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    datasets.disable_progress_bars()
    detector = _model(setting)
    dataset = datasets.load_dataset("parquet", data_files=str(setting.folder / "train" / "*.parquet"), split="train")
    dataset = dataset.with_transform(functools.partial(transform, pipeline(setting.augmentation), detector.processor))
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            seconds[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory(dir=setting.folder) as out:
        arguments = TrainingArguments(
            output_dir=out,
            num_train_epochs=setting.timed_epochs + 1,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            bf16=is_bf16,
            dataloader_num_workers=setting.loaders,
            # Not in the guide, but in the Trainer's favour: loader processes persist over epochs.
            dataloader_persistent_workers=setting.loaders > 0,
            remove_unused_columns=False,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = Trainer(
            model=detector.model,
            args=arguments,
            train_dataset=dataset,
            processing_class=detector.processor,
            data_collator=collate_rows,
            callbacks=[Clock()],
        )
        torch.set_num_threads(setting.threads)
        trainer.train()
    return len(dataset) * setting.timed_epochs / sum(seconds[1:])


def _train_at_the_limit(setting: Setting, is_bf16: bool) -> float:
    import torch

    detector = _model(setting)
    model = detector.model.train()
    batches = _batches_in_memory(setting, detector)
    num_images = sum(len(labels) for _, labels in batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches) * (setting.timed_epochs + 1))
    seconds = []
    for _ in range(setting.timed_epochs + 1):
        started = time.perf_counter()
        for pixels, labels in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                loss = model(pixel_values=pixels, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return num_images * setting.timed_epochs / sum(seconds[1:])


def _batches_in_memory(setting: Setting, detector: Any) -> list[tuple[Any, Any]]:
    """Make pixel values and labels of each step as raydet does, without augmentation."""
    from raydet.augmentation.view import View
    from raydet.models.collate import Example, collate
    from raydet.tables.table import open_table

    examples = []
    view = View(resize_rule=detector.resize_rule)
    for row in open_table(str(setting.folder / "train"), "images").read().to_pylist():
        seen = view.augmented(row, epoch=0, resize_rule=detector.resize_rule)
        examples.append(Example(row["image_id"], seen.image, seen.original_size_hw, seen.boxes_cxcywh, seen.categories))
    starts = range(0, len(examples), BATCH_SIZE)
    batches = [collate(examples[start : start + BATCH_SIZE]) for start in starts]
    return [(detector.model_inputs(batch)["pixel_values"], batch.labels) for batch in batches]


if __name__ == "__main__":
    main()
