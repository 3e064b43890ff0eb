"""Time of each augmentation: decoding, augmenting and resizing one JPEG to 640 px, in one thread.

    python benchmarks/augmentation.py [--quick] [--rounds 3] [--before CHECKOUT]

The images of `strong` are mixed with others as often as in training; the time of an image includes its partners.
`decode` decodes an image at full size and does nothing else. With `--before`, the code of another checkout is timed in
turn. Each round runs in a new process; the table has the median over the rounds.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

if TYPE_CHECKING:
    from benchmarks.contest import child_environment
    from benchmarks.generated_jpegs import jpegs
else:  # a script imports its neighbours without the package name
    from contest import child_environment
    from generated_jpegs import jpegs

SIZES = {"640x480": (640, 480), "1920x1080": (1920, 1080), "4000x3000": (4000, 3000)}
NUM_IMAGES = 4
MODEL_SIDE_PX = 640
TARGET = 1.5
"""Upper limit of the time of `strong` at the largest size, as a multiple of decoding one image."""

Times = dict[str, dict[str, float]]
"""Milliseconds an image by size of the source and augmentation."""


def main() -> None:
    """Measure all sizes and presets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="8 images instead of 40 for each number, in one round")
    parser.add_argument("--before", type=Path, help="another checkout of raydet to compare with")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    num_images = 8 if options.quick else 40
    if options.child:
        print(json.dumps(_times(options.child, num_images)))
        return
    checkouts = {"now": Path(__file__).resolve().parents[1]} | ({"before": options.before} if options.before else {})
    runs: dict[str, list[Times]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as name:
        for size, size_wh in SIZES.items():
            for number, data in enumerate(jpegs(NUM_IMAGES, size_wh)):
                Path(name, f"{size}-{number}.jpg").write_bytes(data)
        for _ in range(1 if options.quick else options.rounds):
            for checkout, path in checkouts.items():
                runs[checkout].append(_run(path, Path(name), quick=options.quick))
    summary: dict[str, Any] = {
        checkout: {size: {key: round(median(run[size][key] for run in of), 2) for key in of[0][size]} for size in SIZES}
        for checkout, of in runs.items()
    }
    names = list(summary["now"]["640x480"])
    print(f"{'ms an image':>12} {'':>9}" + "".join(f"{one:>9}" for one in names))
    for size in SIZES:
        for checkout in checkouts:
            times = summary[checkout][size]
            print(f"{size:>12} {checkout:>9}" + "".join(f"{times.get(one, np.nan):>9.1f}" for one in names))
    summary["ratio"] = round(summary["now"]["4000x3000"]["strong"] / summary["now"]["4000x3000"]["decode"], 3)
    print(f"strong at 4000x3000: {summary['ratio']:.2f} times its full decode (target {TARGET})")
    print(json.dumps(summary))


def _run(checkout: Path, folder: Path, *, quick: bool) -> Times:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(folder), *(["--quick"] if quick else [])]
    environment = child_environment() | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    times: Times = json.loads(output.splitlines()[-1])
    return times


def _times(folder: Path, num_images: int) -> Times:
    """Measure in this process."""
    import torch

    from raydet.augmentation.view import View
    from raydet.config import DEFAULT_MAX_PIXELS, Augmentation
    from raydet.images.decode import decode
    from raydet.models.geometry import ResizeRule

    torch.set_num_threads(1)
    rule = ResizeRule(mode="fixed", size_hw=(MODEL_SIDE_PX, MODEL_SIDE_PX))
    views = {preset: View(resize_rule=rule, augmentation=preset) for preset in get_args(Augmentation)}
    results: Times = {}
    for size in SIZES:
        rows = [_row(path, number) for number, path in enumerate(sorted(folder.glob(f"{size}-*.jpg")))]
        seconds: dict[str, float] = dict.fromkeys(("decode", *views), 0.0)
        for number in range(-1, num_images):  # the first imports what it needs
            row = rows[number % NUM_IMAGES] | {"image_id": number + 1}
            started = time.perf_counter()
            decode(row["image"]["bytes"], max_pixels=DEFAULT_MAX_PIXELS)
            seconds["decode"] += (time.perf_counter() - started) * (number >= 0)
            for preset, view in views.items():
                mixed = row | _partners(rows, number) if view.mixes(0) else row
                started = time.perf_counter()
                view.augmented(mixed, epoch=0, resize_rule=rule)
                seconds[preset] += (time.perf_counter() - started) * (number >= 0)
        results[size] = {name: 1000 * value / num_images for name, value in seconds.items()}
    return results


def _partners(rows: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """Return the partners of an image, as often as the plan of a training gives it any."""
    from raydet.training.feeding.ordering import MIXUP_P, MOSAIC_P

    # Evenly spread instead of drawn, so that few images already have the right shares.
    mosaic, mixup = ((number + 1) * p % 1 < p for p in (MOSAIC_P, MIXUP_P))
    return {"mosaic": rows[1:4] if mosaic else [], "mixup": rows[:1] if mixup else []}


def _row(path: Path, number: int) -> dict[str, Any]:
    from PIL import Image

    data, rng = path.read_bytes(), np.random.default_rng(number)
    width, height = Image.open(io.BytesIO(data)).size
    sides = rng.uniform(0.05, 0.4, (10, 2)) * (width, height)
    corners = rng.random((10, 2)) * ((width, height) - sides)
    objects = {
        "id": list(range(10)),
        "bbox": np.concatenate([corners, sides], axis=1).tolist(),
        "category": rng.integers(0, 80, 10).tolist(),
        "area": sides.prod(axis=1).tolist(),
        "iscrowd": [False] * 10,
    }
    image = {"bytes": data, "path": path.name}
    return {"image_id": number, "image": image, "width": width, "height": height, "objects": objects}


if __name__ == "__main__":
    main()
