"""AP of a small model that a larger one teaches, at equal steps.

    python benchmarks/distil.py [--seeds 5] [--labelled 100] [--unlabelled 500] [--steps 600] [--teacher-steps 1500]
        [--student NAME] [--teacher NAME] [--train TABLE --val TABLE --config FILE] [--image-size PIXELS]
        [--out FOLDER] [--threads N] [--quick]

The images are generated shapes of three classes. The teacher is trained on the labelled images and on as many further
ones as there are unlabelled ones; it scores the unlabelled images once. With `--train` the images are those of a table:
each seed draws the labelled ones and the teacher's further ones, and the rest are the unlabelled ones; `--config` is
the job file of all trainings, such as `jobs/configs/bccd.yaml`. The student then trains for the same number of steps
on:

- labels: the labelled images alone.
- pseudo: these, and the unlabelled ones with the teacher's detections of at least 0.5 as labels.
- soft: these, and the unlabelled ones with the teacher's stored boxes and class scores (`train --teacher`).
- both: the labels of `pseudo`, and the stored boxes and scores too.

AP is that of the last epoch on other images. Intervals are 95 % t intervals of the differences from `labels`, paired by
seed: each seed draws other images and other weights of teacher and students. With `--out` an interrupted benchmark
resumes. `--quick` is a smoke test. The last line is one JSON object.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raydet import (
    PredictConfig,
    PrepareDetectionsConfig,
    PrepareShapesConfig,
    TrainConfig,
    predict,
    prepare_detections,
    prepare_shapes,
    train,
)
from raydet.cluster.session import session
from raydet.config.options import load_file
from raydet.tables.schema import build_schema
from raydet.tables.table import TableWriter, is_table, open_table

if TYPE_CHECKING:
    from benchmarks.fine_tune import interval
    from benchmarks.partial_labels import BATCH_SIZE, SIDE, shapes_training
else:  # a script imports its neighbours without the package name
    from fine_tune import interval
    from partial_labels import BATCH_SIZE, SIDE, shapes_training

CONTESTANTS = ("labels", "pseudo", "soft", "both")
PSEUDO_THRESHOLD = 0.5


def main() -> None:
    """Train a teacher and every student with every seed, and print the comparison."""
    options = _parse()
    runs: dict[str, list[float]] = {name: [] for name in ("teacher", *CONTESTANTS)}
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as temporary:
        folder = Path(options.out or temporary).absolute()
        # One cluster for all runs; each run starts one worker process.
        with session(str(folder / "log")):
            for seed in range(options.seeds):
                data = folder / f"seed-{seed}"
                runs["teacher"].append(_teach(data, seed, options))
                for name in CONTESTANTS:
                    runs[name].append(_student(name, data, seed, options))
                print(f"seed {seed}: { {name: round(own[-1], 4) for name, own in runs.items()} }", flush=True)
    summary: dict[str, Any] = {
        name: {
            "values": own,
            "mean": statistics.mean(own),
            "minus_labels": interval([value - its for value, its in zip(own, runs["labels"], strict=True)]),
        }
        for name, own in runs.items()
    }
    for name in ("soft", "both"):
        summary[name]["minus_pseudo"] = interval(
            [ours - its for ours, its in zip(runs[name], runs["pseudo"], strict=True)]
        )
    for name, values in summary.items():
        print(f"{name:10}{values['mean']:8.4f}   minus labels: {values['minus_labels']}")
    print(json.dumps(summary))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of teachers, and of students of each kind")
    parser.add_argument("--labelled", type=int, default=100, help="labelled images")
    parser.add_argument("--unlabelled", type=int, default=500, help="unlabelled images")
    parser.add_argument("--steps", type=int, default=600, help="steps of each student")
    parser.add_argument("--teacher-steps", type=int, default=1500, help="steps of the teacher")
    parser.add_argument("--student", default="rt_detr_v2_tiny", help="one of raydet's small models")
    parser.add_argument("--teacher", default="rt_detr_v2_small", help="one of raydet's small models, of any family")
    parser.add_argument("--train", help="images table to draw from, instead of shapes")
    parser.add_argument("--val", help="images table to measure AP on; goes with --train")
    parser.add_argument("--config", help="job file of the trainings; goes with --train")
    parser.add_argument("--image-size", type=int, help="side of the images of --train; by default that of --config")
    parser.add_argument("--out", help="folder of all tables and runs, which is kept; a temporary one by default")
    parser.add_argument("--threads", type=int, help="torch threads of a run; by default those of the machine")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps and images")
    options = parser.parse_args()
    if len({bool(value) for value in (options.train, options.val, options.config)}) > 1:
        parser.error("--train, --val and --config go together")
    if options.quick:
        options.seeds, options.steps, options.teacher_steps = 1, 10, 20
        options.labelled, options.unlabelled = 16, 32
    return options


def _teach(data: Path, seed: int, options: argparse.Namespace) -> float:
    """Train the teacher, let it score the unlabelled images, and return its AP."""
    if options.train:
        _draw(data, seed, options)
    else:
        _generate(data, seed, options)
    _write_without_labels(str(data / "pool" / "train"), str(data / "unlabelled"))
    tables = [str(data / name / "train") for name in ("few", "many")]
    record = train(_config("teacher", data, seed, options, tables, options.teacher, options.teacher_steps)).history[-1]
    found = str(data / "detections")
    predict(
        PredictConfig(
            checkpoint=str(data / "run-teacher" / "last"),
            data=str(data / "unlabelled"),
            out=found,
            score_threshold=0.01,
            keep=["class_scores"],
        )
    )
    prepare_detections(
        PrepareDetectionsConfig(
            detections=found, data=str(data / "unlabelled"), threshold=PSEUDO_THRESHOLD, out=str(data / "pseudo")
        )
    )
    return record.value("AP") or 0.0


def _generate(data: Path, seed: int, options: argparse.Namespace) -> None:
    """Write tables of shapes: DATA/NAME/train of `few`, `many` and `pool`, and DATA/many/val."""
    numbers = {"few": options.labelled, "many": options.unlabelled, "pool": options.unlabelled}
    for part, (name, number) in enumerate(numbers.items()):
        num_val = 8 if name == "pool" else max(8, number // 2)
        config = PrepareShapesConfig(
            out=str(data / name), num_train=number, num_val=num_val, image_size=SIDE, seed=3 * seed + part
        )
        prepare_shapes(config)


def _draw(data: Path, seed: int, options: argparse.Namespace) -> None:
    """Write the same tables from the rows of `--train` and `--val`."""
    table = open_table(options.train, "images")
    rows = table.read().to_pylist()
    random.Random(seed).shuffle(rows)
    middle = options.labelled + (len(rows) - options.labelled) // 2
    parts = {"few": rows[: options.labelled], "many": rows[options.labelled : middle], "pool": rows[middle:]}
    for name, own in parts.items():
        _write(str(data / name / "train"), table.schema, own)
    validation = open_table(options.val, "images")
    _write(str(data / "many" / "val"), validation.schema, validation.read().to_pylist())


def _write_without_labels(source: str, uri: str) -> None:
    nothing: dict[str, list[Any]] = {name: [] for name in ("id", "bbox", "category", "area", "iscrowd")}
    columns = ["image_id", "image", "width", "height"]
    rows = open_table(source, "images").read(columns).to_pylist()
    _write(uri, build_schema("images"), [{**row, "objects": nothing} for row in rows])


def _write(uri: str, schema: pa.Schema, rows: Sequence[dict[str, Any]]) -> None:
    if not is_table(uri):
        with TableWriter(uri, schema, config_hash="0" * 12) as writer:
            writer.write_rows(rows)


def _student(name: str, data: Path, seed: int, options: argparse.Namespace) -> float:
    further = {"labels": [], "soft": ["unlabelled"]}.get(name, ["pseudo"])
    tables = [str(data / "few" / "train"), *(str(data / table) for table in further)]
    config = _config(name, data, seed, options, tables, options.student, options.steps)
    return train(config).history[-1].value("AP") or 0.0


def _config(
    name: str, data: Path, seed: int, options: argparse.Namespace, tables: list[str], model: str, steps: int
) -> TrainConfig:
    num_images = sum(open_table(uri, "images").num_rows for uri in tables)
    epochs = max(1, round(steps / math.ceil(num_images / BATCH_SIZE)))
    values: dict[str, Any] = {
        "model": model,
        "train_data": tables if len(tables) > 1 else tables[0],
        "val_data": str(data / "many" / "val"),
        "out": str(data / f"run-{name}"),
        "seed": seed,
        "epochs": epochs,
        "threads_per_worker": options.threads,
        "teacher": str(data / "detections") if name in ("soft", "both") else None,
    }
    if not options.config:
        return shapes_training(**values)
    values |= {"batch_size": BATCH_SIZE, "validate_every": epochs, "early_stopping_patience": 0, "log_images": 0}
    if options.image_size:
        values["image_size"] = options.image_size
    return load_file(TrainConfig, options.config, **values)


if __name__ == "__main__":
    main()
