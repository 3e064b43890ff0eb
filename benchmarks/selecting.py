"""AP after labelling what `select --by` chooses, compared with images chosen at random.

    python benchmarks/selecting.py [--seeds 5] [--pool 200] [--start 20] [--rounds 3] [--per-round 20] [--steps 200]
        [--base-steps 1500] [--by uncertainty,rare,diversity] [--out FOLDER] [--threads N] [--quick]

The pool is generated shapes of ten classes, of which three are in few images, and a quarter are near-duplicates: copies
of other images, brighter or darker and saved again. A model that was trained on images with the other seven classes is
fine-tuned on the first labelled images. In each round it scores the pool, more images are chosen and labelled, and the
same model is fine-tuned on all of them from the beginning, for the same number of steps. AP is that of the last epoch
on other images, in which all classes are equally frequent.

- random: images drawn at random, the same first ones.
- select: `raydet select --by …` with the scored pool and the labelled images. It leaves out the copies of what it chose
  or is labelled, by their thumbnails.

Intervals are 95 % t intervals of the differences, paired by seed: each seed draws another pool and other first images.
`copies` counts those that `select --near-duplicates` finds in the pool, and the other images that it takes for one.
With `--out` an interrupted benchmark resumes. `--quick` is a smoke test. The last line is one JSON object.
"""

import argparse
import io
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageEnhance

from raydet import PredictConfig, SelectConfig, predict, select, train
from raydet.cluster.session import session
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, is_table, open_table

if TYPE_CHECKING:
    from benchmarks import ten_shapes
    from benchmarks.fine_tune import interval
    from benchmarks.partial_labels import BATCH_SIZE, SIDE, shapes_training
else:  # a script imports its neighbours without the package name
    import ten_shapes
    from fine_tune import interval
    from partial_labels import BATCH_SIZE, SIDE, shapes_training

CONTESTANTS = ("random", "select")
RARE, RARE_SHARE = 3, 0.1
"""Classes, the last ones, that are rare; share of the images with them that the pool keeps."""
COPY_SHARE = 0.25
MODEL = "rt_detr_v2_small"
_BASE_DRAWN = 1500
"""Images that are drawn for the first model; those with rare classes are left out."""
_CATEGORIES = tuple(Category(number, name) for number, name in enumerate(ten_shapes.CLASSES))


def main() -> None:
    """Run all rounds of both contestants with every seed, and print the comparison."""
    options = _parse()
    runs: dict[str, list[list[float]]] = {name: [] for name in CONTESTANTS}
    copies = []
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as temporary:
        folder = Path(options.out or temporary).absolute()
        with session(str(folder / "log")):
            base = _base(folder, options)
            for seed in range(options.seeds):
                data = folder / f"seed-{seed}"
                rows, originals = _pool(seed, options)
                _write(data / "pool", rows)
                first_id = 10**6 * (seed + 1)
                _write(data / "val", ten_shapes.rows(options.val, side=SIDE, seed=2 * seed + 1, first_id=first_id))
                for name in CONTESTANTS:
                    runs[name].append(_run(name, data, base, rows, seed, options))
                found = str(data / f"found-select-{options.rounds - 1}")
                copies.append(_copies(found, originals, str(data / "duplicates")))
                print(f"seed {seed}: { {name: own[-1] for name, own in runs.items()} }, {copies[-1]}", flush=True)
    rounds = range(options.rounds + 1)
    summary: dict[str, Any] = {
        name: [statistics.mean(run[number] for run in own) for number in rounds] for name, own in runs.items()
    }
    pairs = list(zip(runs["select"], runs["random"], strict=True))
    summary["difference"] = [interval([ours[number] - its[number] for ours, its in pairs]) for number in rounds[1:]]
    summary["mean_difference"] = interval([statistics.mean(ours[1:]) - statistics.mean(its[1:]) for ours, its in pairs])
    print(json.dumps({"summary": summary, "runs": runs, "copies": copies}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pool", type=int, default=200, help="images to choose from")
    parser.add_argument("--start", type=int, default=20, help="images that are labelled first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-round", type=int, default=20, help="images labelled in each round")
    parser.add_argument("--steps", type=int, default=200, help="steps of each fine-tuning")
    parser.add_argument("--base-steps", type=int, default=1500, help="steps of the model to fine-tune")
    parser.add_argument("--val", type=int, default=200, help="validation images")
    parser.add_argument("--by", default="uncertainty,rare,diversity", help="criteria of select")
    parser.add_argument("--out", help="folder of all tables and runs, which is kept; a temporary one by default")
    parser.add_argument("--threads", type=int, help="torch threads of a run; by default those of the machine")
    parser.add_argument("--quick", action="store_true", help="one seed, one round, few steps")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.steps, options.base_steps, options.val = 1, 1, 10, 20, 16
    return options


def _base(folder: Path, options: argparse.Namespace) -> str:
    """Train the model to fine-tune on the frequent classes, and return its checkpoint."""
    data = folder / "base"
    known = _CATEGORIES[: len(_CATEGORIES) - RARE]
    rows = [row for row in ten_shapes.rows(_BASE_DRAWN, side=SIDE, seed=10**6, first_id=0) if not _is_rare(row)]
    _write(data / "train", rows[:-BATCH_SIZE], known)
    _write(data / "val", rows[-BATCH_SIZE:], known)
    config = shapes_training(
        model=MODEL,
        train_data=str(data / "train"),
        val_data=str(data / "val"),
        out=str(data / "run"),
        epochs=max(1, round(options.base_steps / (len(rows) / BATCH_SIZE))),
        threads_per_worker=options.threads,
    )
    train(config)
    return str(data / "run" / "last")


def _pool(seed: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Draw the pool, and return its rows, and the id of each copy's original by that of the copy."""
    rng = np.random.default_rng(seed)
    num_copies = round(COPY_SHARE * options.pool)
    rows: list[dict[str, Any]] = []
    for row in ten_shapes.rows(20 * options.pool, side=SIDE, seed=2 * seed, first_id=0):
        if not _is_rare(row) or rng.random() < RARE_SHARE:
            rows.append({**row, "image_id": len(rows)})
        if len(rows) == options.pool - num_copies:
            break
    originals = {}
    for place in rng.choice(len(rows), num_copies, replace=False).tolist():
        originals[len(rows)] = place
        rows.append(_copy(rows[place], len(rows), rng))
    return rows, originals


def _is_rare(row: dict[str, Any]) -> bool:
    return any(category >= len(ten_shapes.CLASSES) - RARE for category in row["objects"]["category"])


def _copy(row: dict[str, Any], image_id: int, rng: np.random.Generator) -> dict[str, Any]:
    with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
        changed = ImageEnhance.Brightness(picture).enhance(float(rng.choice([0.93, 1.07])))
    file = io.BytesIO()
    changed.save(file, "JPEG", quality=80)
    return {**row, "image_id": image_id, "image": {"bytes": file.getvalue(), "path": f"copy-{image_id:05d}.jpg"}}


def _write(
    uri: Path, rows: Sequence[dict[str, Any]] | Iterator[dict[str, Any]], categories: Sequence[Category] = _CATEGORIES
) -> None:
    if is_table(str(uri)):
        return
    with TableWriter(str(uri), build_schema("images", categories), config_hash="0" * 12) as writer:
        writer.write_rows(list(rows))


def _run(
    name: str, data: Path, base: str, rows: Sequence[dict[str, Any]], seed: int, options: argparse.Namespace
) -> list[float]:
    """Label in rounds, and return the AP before the first and after each."""
    order = np.random.default_rng([seed, 1]).permutation(len(rows)).tolist()
    labelled = order[: options.start]
    scores = [_fine_tune("start", data, base, rows, labelled, seed, options)]
    for number in range(options.rounds):
        if name == "random":
            labelled = order[: len(labelled) + options.per_round]
        else:
            trained = "start" if number == 0 else f"select-{number - 1}"
            labelled = [*labelled, *_chosen(data, trained, number, options)]
        scores.append(_fine_tune(f"{name}-{number}", data, base, rows, labelled, seed, options))
    return scores


def _fine_tune(
    name: str,
    data: Path,
    base: str,
    rows: Sequence[dict[str, Any]],
    labelled: Sequence[int],
    seed: int,
    options: argparse.Namespace,
) -> float:
    _write(data / f"labels-{name}", [rows[place] for place in labelled])
    config = shapes_training(
        model=base,
        train_data=str(data / f"labels-{name}"),
        val_data=str(data / "val"),
        out=str(data / f"run-{name}"),
        seed=seed,
        epochs=max(1, round(options.steps / math.ceil(len(labelled) / BATCH_SIZE))),
        threads_per_worker=options.threads,
    )
    return round(train(config).history[-1].value("AP") or 0.0, 4)


def _chosen(data: Path, trained: str, number: int, options: argparse.Namespace) -> list[int]:
    """Score the pool with a trained model, and choose the next images."""
    found = str(data / f"found-select-{number}")
    predict(
        PredictConfig(
            checkpoint=str(data / f"run-{trained}" / "last"),
            data=str(data / "pool"),
            out=found,
            score_threshold=0.01,
            keep=["class_scores", "embedding", "thumbnail"],
        )
    )
    chosen = select(
        SelectConfig(
            detections=found,
            by=options.by.split(","),
            labelled_data=str(data / f"labels-{trained}"),
            num=options.per_round,
            out=str(data / f"chosen-{number}"),
        )
    )
    ids: list[int] = open_table(chosen.table, "to_label").read(["image_id"])["image_id"].to_pylist()
    return ids


def _copies(found: str, originals: dict[int, int], out: str) -> dict[str, int]:
    """Look for near-duplicates among all images, and count the copies whose original is found, and all other pairs."""
    result = select(SelectConfig(detections=found, near_duplicates=True, out=out))
    rows = open_table(result.table, "near_duplicates").read(["image_id", "duplicate_of"])
    pairs = dict(zip(rows["image_id"].to_pylist(), rows["duplicate_of"].to_pylist(), strict=True))
    num_found = len(pairs.items() & originals.items())
    return {"copies": len(originals), "found": num_found, "others": len(pairs) - num_found}


if __name__ == "__main__":
    main()
