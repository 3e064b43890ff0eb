"""AP after training on images that are not all labelled for every class, at equal steps.

    python benchmarks/partial_labels.py [--seeds 3] [--images 400] [--epochs 16] [--share 0.5] [--model NAME]
        [--out FOLDER] [--quick]

The images are generated shapes of three classes. The boxes of one class are removed from a share of the training
images, as if they came from a data set that does not label the class. The validation images are labelled for all.

- stated: `labelled_categories` names the classes that these images are labelled for.
- unstated: the same images without the column, so that objects without a box are background.
- complete: all boxes, the upper bound.

AP is that of the last epoch, over all classes and of the class whose boxes were removed. Intervals are 95 % t intervals
of the differences from `unstated`, paired by seed: each seed draws other images and other weights. With `--out` an
interrupted benchmark resumes. `--quick` is a smoke test. The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raydet import PrepareShapesConfig, TrainConfig, prepare_shapes, train
from raydet.cluster.session import session
from raydet.config.options import load_file
from raydet.tables.schema import LABELLED_COLUMN, OPTIONAL_FIELDS, build_schema
from raydet.tables.table import Table, TableWriter, is_table, open_table

if TYPE_CHECKING:
    from benchmarks.fine_tune import interval
else:  # a script imports its neighbours without the package name
    from fine_tune import interval

PROJECT = Path(__file__).parents[1]
CONTESTANTS = ("unstated", "stated", "complete")
REMOVED = 0
"""Class whose boxes are removed."""
SIDE, BATCH_SIZE = 96, 8
"""Side of the images in pixels, and images per step."""


def main() -> None:
    """Train every contestant with every seed, and print the comparison."""
    options = _parse()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as temporary:
        folder = Path(options.out or temporary).absolute()
        # One cluster for all runs; each run starts one worker process.
        with session(str(folder / "log")):
            for seed in range(options.seeds):
                data = folder / f"seed-{seed}"
                removed_class = _write_tables(data, seed, options)
                for name in CONTESTANTS:
                    record = train(_config(name, data, seed, options)).history[-1]
                    numbers = {
                        "AP": record.value("AP") or 0.0,
                        "AP_removed": (record.validation.ap_by_class[removed_class] if record.validation else 0) or 0.0,
                        "seconds": round(record.total_s, 1),
                    }
                    runs[name].append(numbers)
                    print(f"seed {seed}, {name}: {numbers}", flush=True)
    summary = {metric: _summary(runs, metric) for metric in ("AP", "AP_removed")}
    for metric, own in summary.items():
        for name, values in own.items():
            print(f"{metric:12}{name:10}{values['mean']:8.4f}   minus unstated: {values['minus_unstated']}")
    print(json.dumps({"summary": summary, "runs": runs}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each contestant")
    parser.add_argument("--images", type=int, default=400, help="training images; a quarter as many for validation")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.5, help="share of the images without boxes of the class")
    parser.add_argument("--model", default="rt_detr_v2_small", help="one of raydet's small models")
    parser.add_argument("--out", help="folder of all tables and runs, which is kept; a temporary one by default")
    parser.add_argument("--threads", type=int, help="torch threads of a run; by default those of the machine")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, few images")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs, options.images = 1, 1, 40
    return options


def _write_tables(data: Path, seed: int, options: argparse.Namespace) -> str:
    """Write the tables that are not there yet: DATA/train, DATA/val, DATA/stated and DATA/unstated.

    Returns:
        The name of the class whose boxes are removed.
    """
    prepare_shapes(
        PrepareShapesConfig(
            out=str(data), num_train=options.images, num_val=max(8, options.images // 4), image_size=SIDE, seed=seed
        )
    )
    table = open_table(str(data / "train"), "images")
    rows: list[dict[str, Any]] = table.read().to_pylist()
    others = [index for index in range(len(table.categories)) if index != REMOVED]
    num_partial = round(options.share * len(rows))
    partial = [{**_without_class(row), LABELLED_COLUMN: others} for row in rows[:num_partial]]
    _write(data / "stated", table, [*partial, *({**row, LABELLED_COLUMN: None} for row in rows[num_partial:])])
    _write(data / "unstated", table, [*map(_without_class, rows[:num_partial]), *rows[num_partial:]])
    return table.categories[REMOVED].name


def _without_class(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the boxes of the removed class."""
    kept = [place for place, index in enumerate(row["objects"]["category"]) if index != REMOVED]
    objects = {name: [values[place] for place in kept] for name, values in row["objects"].items()}
    return {**row, "objects": objects}


def _write(uri: Path, like: Table, rows: Iterable[Mapping[str, Any]]) -> None:
    if is_table(str(uri)):
        return
    has_column = uri.name == "stated"
    fields = [pa.field(LABELLED_COLUMN, OPTIONAL_FIELDS["images"][LABELLED_COLUMN])] if has_column else []
    schema = build_schema("images", like.categories, extra_fields=fields)
    with TableWriter(str(uri), schema, config_hash="0" * 12) as writer:
        for row in rows:
            writer.write_rows([dict(row)])


def _config(name: str, data: Path, seed: int, options: argparse.Namespace) -> TrainConfig:
    return shapes_training(
        model=options.model,
        train_data=str(data / ("train" if name == "complete" else name)),
        val_data=str(data / "val"),
        out=str(data / f"run-{name}"),
        seed=seed,
        epochs=options.epochs,
        threads_per_worker=options.threads,
    )


def shapes_training(*, epochs: int, **options: Any) -> TrainConfig:
    """Return the config of a training from scratch on small images of shapes, which is validated once, at its end."""
    return load_file(
        TrainConfig,
        str(PROJECT / "jobs" / "configs" / "small.yaml"),
        epochs=epochs,
        validate_every=epochs,
        image_size=SIDE,
        batch_size=BATCH_SIZE,
        validate_batch_size=16,
        log_images=0,
        recipe="none",
        **options,
    )


def _summary(runs: Mapping[str, Sequence[Mapping[str, float]]], metric: str) -> dict[str, Any]:
    """Return the means of each contestant, and its differences from `unstated`, paired by seed."""
    reference = [run[metric] for run in runs["unstated"]]
    return {
        name: {
            "values": [run[metric] for run in own],
            "mean": statistics.mean(run[metric] for run in own),
            "minus_unstated": interval([run[metric] - its for run, its in zip(own, reference, strict=True)]),
        }
        for name, own in runs.items()
    }


if __name__ == "__main__":
    main()
