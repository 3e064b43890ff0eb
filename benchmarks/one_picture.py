"""Seconds from a command to the boxes of one and of eight pictures, and per picture once a model is loaded.

    python benchmarks/one_picture.py [--rounds 5] [--warm-pictures 60] [--quick]

- raydet_1, raydet_8: `raydet predict --checkpoint MODEL --data PICTURE …`, which also draws the boxes.
- script_1, script_8: `plain_predict.py`, transformers' model and image processor, for the same pictures.
- raydet_warm, script_warm: milliseconds per picture, from its path to its boxes, of `raydet.load` and of the same calls
  of transformers, alternately in one process.

The model is `rt_detr_v2_small` at 256 pixels with random weights, the pictures are generated JPEGs of 640 × 480. The
contestants run one after the other in each round; values are medians, ratios those of pairs. The last line is one JSON
object.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.coco_folder import generate
    from benchmarks.contest import Pair, child_environment, print_ratios, run_command, run_in_turn
else:  # a script imports its neighbours without the package name
    from coco_folder import generate
    from contest import Pair, child_environment, print_ratios, run_command, run_in_turn

HERE = Path(__file__).parent
CONTESTANTS = ("raydet_1", "script_1", "raydet_8", "script_8")
PAIRS: "tuple[Pair, ...]" = (("raydet_1", "script_1", 1.2), ("raydet_8", "script_8", 1.2))
WARM_TARGET = 1.05
IMAGE_SIZE = 256


def main() -> None:
    """Run the commands in rounds, then both models in this process, and print the results."""
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="rdb", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # In another process, whose memory and imports the contestants do not share.
        preparation = multiprocessing.get_context("spawn").Process(target=_prepare, args=(folder,))
        preparation.start()
        preparation.join()
        if preparation.exitcode:
            sys.exit("the preparation failed")
        runs = run_in_turn(
            CONTESTANTS,
            lambda contestant: _run(contestant, folder),
            lambda run: f"{run['seconds']:.2f} s, {run['peak_mb']:.0f} MB",
            rounds=options.rounds,
        )
        warm_ms = _warm(folder, options.warm_pictures)
    print(f"\n{'contestant':<12} {'seconds':>8} {'peak MB':>8}")
    medians = {name: {key: statistics.median(run[key] for run in own) for key in own[0]} for name, own in runs.items()}
    for contestant, middle in medians.items():
        print(f"{contestant:<12} {middle['seconds']:>8.2f} {middle['peak_mb']:>8.0f}")
    print_ratios(runs, PAIRS, "seconds", "at most")
    ratios = [mine / its for mine, its in zip(warm_ms["raydet"], warm_ms["script"], strict=True)]
    warm = {f"{name}_warm": statistics.median(values) for name, values in warm_ms.items()}
    ratio = statistics.median(ratios)
    print(f"per picture, loaded: {warm['raydet_warm']:.1f} and {warm['script_warm']:.1f} ms, ratio {ratio:.2f}")
    print(f"  (target: at most {WARM_TARGET})")
    results: dict[str, Any] = {name: {"seconds": middle["seconds"]} for name, middle in medians.items()}
    print(json.dumps(results | {name: {"ms": value} for name, value in warm.items()} | {"warm_ratio": ratio}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="number of rounds; default: 5, or 1 with --quick")
    parser.add_argument("--warm-pictures", type=int, help="pictures per loaded model; default: 60, or 8 with --quick")
    parser.add_argument("--quick", action="store_true", help="finishes within a minute on two cores")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.warm_pictures = options.warm_pictures or (8 if options.quick else 60)
    return options


def _prepare(folder: Path) -> None:
    """Write the folders `model`, `pictures_1` and `pictures_8`."""
    from raydet.models.loading import build_detector
    from raydet.tables.schema import Category

    generate(folder, {"train": 8, "val": 1})
    categories = [Category(number + 1, f"class {number}") for number in range(3)]
    build_detector("rt_detr_v2_small", categories, image_size=IMAGE_SIZE, seed=0).save(str(folder / "model"))
    pictures = sorted((folder / "images").iterdir())
    for count in (1, 8):
        (folder / f"pictures_{count}").mkdir()
        for picture in pictures[:count]:
            (folder / f"pictures_{count}" / picture.name).write_bytes(picture.read_bytes())


def _run(contestant: str, folder: Path) -> dict[str, Any]:
    kind, _, count = contestant.partition("_")
    pictures, model = folder / f"pictures_{count}", f"{folder}/model"
    if kind == "raydet":
        command = [sys.executable, "-m", "raydet", "predict", "--checkpoint", model, "--data"]
        command += [*map(str, sorted(pictures.iterdir())), "--out", f"{folder}/drawn_{count}{'.jpg' * (count == '1')}"]
    else:
        command = [
            sys.executable,
            str(HERE / "plain_predict.py"),
            f"{folder}/model",
            str(pictures),
            f"{folder}/out.jsonl",
        ]
    _, cost = run_command(contestant, command, child_environment(), folder=folder)
    return cost


def _warm(folder: Path, num_pictures: int) -> dict[str, list[float]]:
    """Return the milliseconds of each picture by contestant."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    import raydet

    mine = raydet.load(f"{folder}/model", use_gpu=False)
    processor = AutoImageProcessor.from_pretrained(f"{folder}/model")
    model: Any = AutoModelForObjectDetection.from_pretrained(f"{folder}/model").eval()

    def script(path: Path) -> Any:
        image = Image.open(path).convert("RGB")
        with torch.inference_mode():
            outputs = model(**processor(image, return_tensors="pt"))
        sizes_hw = [(image.height, image.width)]
        return processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=sizes_hw)

    pictures = sorted((folder / "pictures_8").iterdir())
    contestants: dict[str, Callable[[Path], Any]] = {"raydet": mine, "script": script}
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(num_pictures + 4):
        for name, detect in contestants.items():
            started = time.perf_counter()
            detect(pictures[number % len(pictures)])
            if number >= 4:  # the first ones allocate and choose kernels
                found[name].append(1000 * (time.perf_counter() - started))
    return found


if __name__ == "__main__":
    main()
