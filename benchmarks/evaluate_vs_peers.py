"""Time from files to COCO numbers: raydet, hotcoco, faster-coco-eval, torchmetrics and pycocotools.

Each contestant runs in a separate process, including imports, in rounds one after another. `raydet_parquet` reads the
same boxes from tables. `difference` is the largest difference of the twelve numbers from those of pycocotools.
torchmetrics, which is slow, runs in the first round only.

    python benchmarks/evaluate_vs_peers.py [--quick] [--rounds 5] [--contestants raydet hotcoco]
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# No large imports here: a child process inherits the peak memory of this process as its own.
if TYPE_CHECKING:
    from benchmarks.contest import print_ratios
else:  # a script imports its neighbours without the package name
    from contest import print_ratios

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def _as_coco(values: dict[str, float | None]) -> list[float]:
    """Return numbers as the peers do, with -1 for undefined ones."""
    return [-1.0 if value is None else value for value in values.values()]


def raydet(folder: Path) -> list[float]:
    import raydet

    config = raydet.EvaluateConfig(truth=str(folder / "truth.json"), detections=str(folder / "results.json"))
    return _as_coco(raydet.evaluate(config).result.values)


def raydet_parquet(folder: Path) -> list[float]:
    import raydet

    config = raydet.EvaluateConfig(truth=str(folder / "truth"), detections=str(folder / "detections"))
    return _as_coco(raydet.evaluate(config).result.values)


def pycocotools(folder: Path) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(folder / "truth.json"))
    evaluator = COCOeval(truth, truth.loadRes(str(folder / "results.json")), "bbox")
    return _summary(evaluator)


def hotcoco(folder: Path) -> list[float]:
    from hotcoco import COCO, COCOeval

    truth = COCO(str(folder / "truth.json"))
    return _summary(COCOeval(truth, truth.load_res(str(folder / "results.json")), "bbox"))


def faster_coco_eval(folder: Path) -> list[float]:
    from faster_coco_eval import COCO, COCOeval_faster  # type: ignore[import-untyped]

    truth = COCO(str(folder / "truth.json"))
    return _summary(COCOeval_faster(truth, truth.loadRes(str(folder / "results.json")), "bbox"))


def _summary(evaluator: Any) -> list[float]:
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return [float(value) for value in list(evaluator.stats)[: len(METRICS)]]


def torchmetrics(folder: Path) -> list[float]:
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(box_format="xywh", backend="pycocotools")
    truth = json.loads((folder / "truth.json").read_bytes())
    results: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    boxes: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for item in json.loads((folder / "results.json").read_bytes()):
        results[item["image_id"]].append(item)
    for item in truth["annotations"]:
        boxes[item["image_id"]].append(item)

    def tensors(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "boxes": torch.tensor([item["bbox"] for item in items]).reshape(-1, 4),
            "labels": torch.tensor([item["category_id"] for item in items], dtype=torch.int64),
        }

    for image_id, found in results.items():
        own = boxes[image_id]
        target = tensors(own) | {
            "iscrowd": torch.tensor([item["iscrowd"] for item in own], dtype=torch.int64),
            "area": torch.tensor([item["area"] for item in own]),
        }
        scores = torch.tensor([item["score"] for item in found])
        metric.update([tensors(found) | {"scores": scores}], [target])
    names = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
    names += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]
    computed = metric.compute()
    return [float(computed[name]) for name in names]


CONTESTANTS: dict[str, Callable[[Path], list[float]]] = {
    function.__name__: function
    for function in (raydet, raydet_parquet, hotcoco, faster_coco_eval, torchmetrics, pycocotools)
}
ONCE = ("torchmetrics",)
PAIRS = (("raydet", "pycocotools", 20.0), ("raydet", "hotcoco", 1 / 1.5), ("raydet_parquet", "hotcoco", 0.0))


def run_one(name: str, folder: Path) -> dict[str, Any]:
    """Run one contestant in a separate process; return its numbers, its wall-clock seconds and its peak memory."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    output, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{name} failed:\n{errors[-4000:]}")
    return {"numbers": json.loads(output.splitlines()[-1]), "seconds": seconds, "peak_mb": usage.ru_maxrss / 1024}


def _write_inputs(folder: Path, num_images: int, num_boxes: int, num_detections: int) -> None:
    if TYPE_CHECKING:
        from benchmarks.generated_boxes import generate, write_json, write_tables
    else:  # a script imports its neighbours without the package name
        from generated_boxes import generate, write_json, write_tables

    boxes = generate(num_images, num_boxes, num_detections, seed=0)
    write_json(boxes, folder)
    write_tables([boxes], folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--boxes", type=int, default=36_000)
    parser.add_argument("--detections", type=int, default=250_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--quick", action="store_true", help="a fifth of the size, one round")
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        with contextlib.redirect_stdout(io.StringIO()):
            numbers = CONTESTANTS[options.child](options.folder)
        print(json.dumps(numbers))
        return
    scale, rounds = (5, 1) if options.quick else (1, options.rounds)
    sizes = tuple(size // scale for size in (options.images, options.boxes, options.detections))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = multiprocessing.get_context("spawn").Process(target=_write_inputs, args=(folder, *sizes))
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit("the inputs could not be written")
        runs: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in options.contestants}
        for number in range(rounds):
            for contestant in options.contestants:
                if number and contestant in ONCE:
                    continue
                run = run_one(contestant, folder)
                runs[contestant].append({**run, "images_per_s": sizes[0] / run["seconds"]})
                print(f"round {number + 1}: {contestant} {run['seconds']:.2f} s", flush=True)
        _print(runs)


def _print(runs: dict[str, list[dict[str, Any]]]) -> None:
    reference = runs["pycocotools"][0]["numbers"] if "pycocotools" in runs else None
    print(
        f"\n{'contestant':<18} {'seconds':>8} {'lowest':>7} {'highest':>8} {'peak MB':>8} {'AP':>7} {'difference':>11}"
    )
    summary = {}
    for name, results in runs.items():
        seconds = [run["seconds"] for run in results]
        middle = statistics.median(seconds)
        peak_mb = statistics.median(run["peak_mb"] for run in results)
        values = results[0]["numbers"]
        difference = None
        if reference is not None:
            difference = max(abs(own - its) for own, its in zip(values, reference, strict=True))
        shown = "–" if difference is None else f"{difference:.1e}"
        print(
            f"{name:<18} {middle:>8.2f} {min(seconds):>7.2f} {max(seconds):>8.2f} {peak_mb:>8.0f} {values[0]:>7.4f} "
            f"{shown:>11}"
        )
        summary[name] = {
            "images_per_s": round(statistics.median(run["images_per_s"] for run in results), 1),
            "seconds": round(middle, 2),
            "peak_mb": round(peak_mb),
            "ap": values[0],
            "difference": difference,
        }
    print_ratios(runs, PAIRS, "images_per_s", "target")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
