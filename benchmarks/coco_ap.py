"""Time of an evaluation loop's metric: `raydet.CocoAP` and torchmetrics' `MeanAveragePrecision` with both its backends.

All contestants get the same float32 tensors in batches of 16 images, in one process, in rounds one after another. The
time is that of all `update` calls and of `compute`; imports are not part of it. `difference` is the largest difference
of the twelve numbers from those of pycocotools on the same boxes.

    python benchmarks/coco_ap.py [--quick] [--rounds 3] [--contestants raydet torchmetrics]
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.contest import Pair, print_ratios
    from benchmarks.generated_boxes import CATEGORIES, Generated, generate
else:  # a script imports its neighbours without the package name
    from contest import Pair, print_ratios
    from generated_boxes import CATEGORIES, Generated, generate

Item = dict[str, torch.Tensor]
BATCH_SIZE = 16
NAMES = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
NAMES += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]


def raydet() -> Any:
    from raydet import CocoAP

    return CocoAP("xywh")


def torchmetrics(backend: str = "pycocotools") -> Any:
    from torchmetrics.detection import MeanAveragePrecision

    return MeanAveragePrecision("xywh", backend=backend)  # type: ignore[arg-type]


def torchmetrics_faster() -> Any:
    return torchmetrics("faster_coco_eval")


CONTESTANTS: dict[str, Callable[[], Any]] = {
    function.__name__: function for function in (raydet, torchmetrics, torchmetrics_faster)
}
PAIRS: "tuple[Pair, ...]" = (("raydet", "torchmetrics", 50.0), ("raydet", "torchmetrics_faster", 0.0))


def as_items(boxes: Generated) -> tuple[list[Item], list[Item]]:
    """Return predictions and targets by image, with numbers in float32."""
    truth, found = boxes.truth, boxes.detections

    def by_image(starts: Any, **columns: Any) -> list[Item]:
        tensors = {key: torch.from_numpy(column) for key, column in columns.items()}
        tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
        bounds = itertools.pairwise(starts)
        return [{key: tensor[first:last].clone() for key, tensor in tensors.items()} for first, last in bounds]

    iscrowd = truth.iscrowd.astype("int64")
    return (
        by_image(found.starts, boxes=found.boxes_xywh, scores=found.scores, labels=found.category),
        by_image(truth.starts, boxes=truth.boxes_xywh, labels=truth.category, area=truth.area, iscrowd=iscrowd),
    )


def of_pycocotools(boxes: Generated) -> list[float]:
    """Return pycocotools' numbers for the values of the tensors."""
    from raydet.measuring.verification import numbers_of_pycocotools

    def rounded(side: Any, *names: str) -> Any:
        return replace(side, **{name: getattr(side, name).astype("float32").astype("float64") for name in names})

    truth, found = rounded(boxes.truth, "boxes_xywh", "area"), rounded(boxes.detections, "boxes_xywh", "scores")
    return numbers_of_pycocotools(truth, found, CATEGORIES)


def run(make: Callable[[], Any], preds: list[Item], targets: list[Item]) -> dict[str, Any]:
    metric = make()
    metric.warn_on_many_detections = False
    started = time.perf_counter()
    for start in range(0, len(preds), BATCH_SIZE):
        metric.update(preds[start : start + BATCH_SIZE], targets[start : start + BATCH_SIZE])
    updated = time.perf_counter()
    numbers = metric.compute()
    ended = time.perf_counter()
    values = [float(numbers[name]) for name in NAMES]
    seconds = ended - started
    return {"numbers": values, "update_s": updated - started, "seconds": seconds, "images_per_s": len(preds) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--boxes", type=int, default=36_000)
    parser.add_argument("--detections", type=int, default=250_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--quick", action="store_true", help="a fifth of the size, two rounds")
    options = parser.parse_args()
    scale, rounds = (5, 2) if options.quick else (1, options.rounds)
    boxes = generate(options.images // scale, options.boxes // scale, options.detections // scale, seed=0)
    preds, targets = as_items(boxes)
    reference = of_pycocotools(boxes)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contestants}
    run(CONTESTANTS["raydet"], preds[:BATCH_SIZE], targets[:BATCH_SIZE])  # imports
    for number in range(rounds):
        for name in options.contestants:
            runs[name].append(run(CONTESTANTS[name], preds, targets))
            print(f"round {number + 1}: {name} {runs[name][-1]['seconds']:.2f} s", flush=True)
    print_table(runs, reference)


def print_table(runs: dict[str, list[dict[str, Any]]], reference: list[float]) -> None:
    print(f"\n{'contestant':<20} {'seconds':>8} {'lowest':>7} {'highest':>8} {'update s':>9} {'difference':>11}")
    summary: dict[str, dict[str, Any]] = {}
    for name, results in runs.items():
        seconds = [result["seconds"] for result in results]
        middle, update = statistics.median(seconds), statistics.median(result["update_s"] for result in results)
        pairs = zip(results[0]["numbers"], reference, strict=True)
        difference = max(abs(own - its) for own, its in pairs)
        print(f"{name:<20} {middle:>8.2f} {min(seconds):>7.2f} {max(seconds):>8.2f} {update:>9.2f} {difference:>11.1e}")
        summary[name] = {
            "images_per_s": round(statistics.median(result["images_per_s"] for result in results), 1),
            "seconds": round(middle, 3),
            "update_s": round(update, 3),
            "ap": results[0]["numbers"][0],
            "difference": difference,
        }
    print_ratios(runs, PAIRS, "images_per_s", "target")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
