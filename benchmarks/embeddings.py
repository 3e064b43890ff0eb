"""Objects that `select --similar-to` finds by their embeddings, and the time that `predict --keep embedding` takes.

    python benchmarks/embeddings.py [--steps 1200] [--images 400] [--rounds 5] [--threads N] [--quick]

An `rt_detr_v2_small` is trained to tell shapes of ten kinds, which have one of six colours. It scores other images,
and every detection of at least 0.3 that lies on a shape (IoU of at least 0.5) is compared with all others:

- recall@10: share of the detections for which one of the ten most similar ones shows the same.
- precision@10: share of the ten most similar ones that show the same.

Both are given for the kind, the colour, and both at once, beside what ten detections drawn at random would give.

`plain` and `embedding` score the same images in separate processes, in turn, with and without `--keep embedding`.
`--quick` is a smoke test. The last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask

from raydet import PredictConfig, predict, train
from raydet.cluster.session import session
from raydet.selection.similar import Probe, find_similar
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table

if TYPE_CHECKING:
    from benchmarks import ten_shapes
    from benchmarks.contest import print_ratios, run_rounds
    from benchmarks.partial_labels import BATCH_SIZE, SIDE, shapes_training
else:  # a script imports its neighbours without the package name
    import ten_shapes
    from contest import print_ratios, run_rounds
    from partial_labels import BATCH_SIZE, SIDE, shapes_training

CONTESTANTS = ("embedding", "plain")
TRAIN_IMAGES, TIMED_IMAGES = 600, 2000
NUM, LEAST_SCORE, LEAST_IOU = 10, 0.3, 0.5
Shown = dict[tuple[int, int], tuple[int, int]]
"""Kind and colour of a detection by the id of its image and its place by score."""


def main() -> None:
    """Train, score, search and time, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="steps of the training")
    parser.add_argument("--images", type=int, default=400, help="images that are searched")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads of the training; by default those of the machine")
    parser.add_argument("--quick", action="store_true", help="few steps and images, one round")
    parser.add_argument("--contestants", nargs=1, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_timed(options.contestants[0], json.loads(options.child))))
        return
    if options.quick:
        options.steps, options.images, options.rounds = 75, 40, 1
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as folder:
        summary = _retrieval(Path(folder), options)
        print(json.dumps(summary), flush=True)
        setting = {"folder": folder, "quick": options.quick}
        runs = run_rounds(sys.argv[0], CONTESTANTS, setting, rounds=options.rounds)
    print_ratios(runs, [("plain", "embedding", 1.1)], "images_per_s", "at most")
    speeds = {name: [round(run["images_per_s"], 1) for run in own] for name, own in runs.items()}
    print(json.dumps({"retrieval": summary, "images_per_s": speeds}))


def _retrieval(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train a detector, and compare the detections of other images by their embeddings."""
    _write(folder / "train", TRAIN_IMAGES, seed=0, first_id=0)
    _write(folder / "val", 16, seed=1, first_id=10**6)
    colours = _write(folder / "pool", options.images, seed=2, first_id=0)
    with session(str(folder / "log")):
        config = shapes_training(
            model="rt_detr_v2_small",
            train_data=str(folder / "train"),
            val_data=str(folder / "val"),
            out=str(folder / "run"),
            epochs=max(1, round(options.steps / (TRAIN_IMAGES / BATCH_SIZE))),
            threads_per_worker=options.threads,
        )
        train(config)
        predict(_scoring(folder, "pool", keep=True, out="found"))
    table = open_table(str(folder / "found"), "detections")
    shown = _shown(folder, colours)
    frequencies = np.array(list(shown.values()))
    hits: dict[str, list[list[bool]]] = {name: [] for name in ("kind", "colour", "both")}
    for (image_id, number), own in shown.items():
        rows = find_similar(table, Probe(image_id, number), num=NUM, least=-1.0)
        others = [shown.get((row["image_id"], row["detection"])) for row in rows]
        hits["kind"].append([other is not None and other[0] == own[0] for other in others])
        hits["colour"].append([other is not None and other[1] == own[1] for other in others])
        hits["both"].append([other == own for other in others])
    codes = {"kind": frequencies[:, 0], "colour": frequencies[:, 1]}
    codes["both"] = codes["kind"] * len(ten_shapes.PALETTE) + codes["colour"]
    return {
        "detections": len(shown),
        "searched": sum(len(row["score"]) for row in table.read(["detections"])["detections"].to_pylist()),
        **{name: _numbers(hits[name], codes[name]) for name in hits},
    }


def _write(uri: Path, num_images: int, *, seed: int, first_id: int) -> list[list[int]]:
    """Write a table of images, and return the colours of the shapes in each."""
    categories = tuple(Category(number, name) for number, name in enumerate(ten_shapes.CLASSES))
    drawn = list(ten_shapes.coloured_rows(num_images, ten_shapes.PALETTE, side=SIDE, seed=seed, first_id=first_id))
    with TableWriter(str(uri), build_schema("images", categories), config_hash="0" * 12) as writer:
        writer.write_rows([row for row, _ in drawn])
    return [colours for _, colours in drawn]


def _scoring(folder: Path, data: str, *, keep: bool, out: str) -> PredictConfig:
    return PredictConfig(
        checkpoint=str(folder / "run" / "last"),
        data=str(folder / data),
        out=str(folder / out),
        score_threshold=LEAST_SCORE,
        keep=["embedding"] if keep else [],
    )


def _shown(folder: Path, colours: Sequence[Sequence[int]]) -> Shown:
    """Return the kind and colour that each detection lies on, by its image and place; others are left out."""
    truth = open_table(str(folder / "pool"), "images").read(["image_id", "objects"]).to_pylist()
    objects = {row["image_id"]: row["objects"] for row in truth}
    shown: Shown = {}
    for row in open_table(str(folder / "found"), "detections").read(["image_id", "detections"]).to_pylist():
        own, found = objects[row["image_id"]], row["detections"]
        if not own["bbox"] or not found["bbox"]:
            continue
        iou = mask.iou(np.array(found["bbox"]), np.array(own["bbox"]), [False] * len(own["bbox"]))
        for number, best in enumerate(iou.argmax(1).tolist()):
            if iou[number, best] >= LEAST_IOU:
                shown[row["image_id"], number] = own["category"][best], colours[row["image_id"]][best]
    return shown


def _numbers(hits: Sequence[Sequence[bool]], codes: Any) -> dict[str, float]:
    """Return recall@10 and precision@10, and what as many detections drawn at random would give."""
    _, code, counts = np.unique(codes, return_inverse=True, return_counts=True)
    frequency = counts[code] / len(codes)
    return {
        "recall": round(float(np.mean([any(own) for own in hits])), 4),
        "precision": round(float(np.mean([np.mean(own) for own in hits])), 4),
        "random_recall": round(float(np.mean(1 - (1 - frequency) ** NUM)), 4),
        "random_precision": round(float(np.mean(frequency)), 4),
    }


def _timed(name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Score images with or without `--keep embedding`, and return the speed after start-up."""
    folder = Path(setting["folder"])
    if not (folder / "timed").exists():
        _write(folder / "timed", 200 if setting["quick"] else TIMED_IMAGES, seed=3, first_id=0)
    out = f"timed-{name}-{len(list(folder.glob('timed-*')))}"
    predict(_scoring(folder, "timed", keep=name == "embedding", out=out))
    report = json.loads((folder / out / ".job.json").read_text())
    return {"images_per_s": report["images_per_s_after_startup"]}


if __name__ == "__main__":
    main()
