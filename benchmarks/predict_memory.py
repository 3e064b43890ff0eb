"""Memory and time per image of scoring over a growing number of images.

    python benchmarks/predict_memory.py [--images 20000]

The benchmark scores generated images with `rt_detr_v2_small` at 128 pixels (random weights) and monitors all
processes. Targets: after the first ninth of the images, memory stays flat and below 4 GB, and the last third takes as
long as the second, within 5 %. Single ninths reflect the noise of the machine. The last line is one JSON object.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydet import PredictConfig, PrepareShapesConfig, predict, prepare_shapes
from raydet.models.loading import build_detector
from raydet.tables.table import open_table

if TYPE_CHECKING:
    from benchmarks.contest import memory_mb
else:  # a script imports its neighbours without the package name
    from contest import memory_mb

IMAGE_SIZE, BATCH_SIZE = 128, 16
NUM_PARTS = 9


def main() -> None:
    """Score once and print memory and time by ninths of the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="2,000 images")
    options = parser.parse_args()
    num_images = 2_000 if options.quick else options.images
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as folder:
        prepare_shapes(PrepareShapesConfig(out=folder, num_train=num_images, num_val=1, image_size=IMAGE_SIZE))
        categories = open_table(f"{folder}/train", "images").categories
        checkpoint = build_detector("rt_detr_v2_small", categories, image_size=IMAGE_SIZE, seed=0)
        checkpoint.save(f"{folder}/checkpoint")
        samples = _score(folder, num_images)
    _print_results(samples, num_images)


def _score(folder: str, num_images: int) -> list[tuple[float, int, float]]:
    """Return seconds since the start, scored images, and megabytes of all processes, sampled twice a second."""
    out = Path(folder, "detections")
    rows_per_file = BATCH_SIZE * max(1, round(num_images / 200 / BATCH_SIZE))
    samples: list[tuple[float, int, float]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            done = len(list(out.glob("part-*.parquet"))) * rows_per_file
            samples.append((time.perf_counter() - started, min(done, num_images), memory_mb()))

    thread = threading.Thread(target=watch)
    started = time.perf_counter()
    thread.start()
    try:
        predict(
            PredictConfig(
                checkpoint=f"{folder}/checkpoint",
                data=f"{folder}/train",
                out=str(out),
                num_workers=2,
                threads_per_worker=1,
                batch_size=BATCH_SIZE,
                rows_per_file=rows_per_file,
                score_threshold=0.3,
                use_gpu=False,
            )
        )
    finally:
        stop.set()
        thread.join()
    return samples


def _print_results(samples: list[tuple[float, int, float]], num_images: int) -> None:
    print(f"{'images':>8} {'s':>7} {'images/s':>9} {'MB':>6} {'most':>6}")
    rates, sizes_mb = [], []
    edges = [num_images * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
    for low, high in itertools.pairwise(edges[1:]):
        inside = [sample for sample in samples if low <= sample[1] < high]
        seconds, done = inside[-1][0] - inside[0][0], inside[-1][1] - inside[0][1]
        rates.append(done / seconds)
        sizes_mb.append(statistics.median(size for *_, size in inside))
        most = max(size for *_, size in inside)
        print(f"{high:>8} {inside[-1][0]:>7.1f} {rates[-1]:>9.1f} {sizes_mb[-1]:>6.0f} {most:>6.0f}")
    peak_mb = max(size for *_, size in samples)
    growth = sizes_mb[-1] / sizes_mb[0]
    middle = statistics.median(rates)
    spread = max(abs(rate / middle - 1) for rate in rates)
    earlier_s, later_s = (sum(1 / rate for rate in half) for half in (rates[-6:-3], rates[-3:]))
    print(f"memory of the last ninth / the second: {growth:.3f}; peak {peak_mb:.0f} MB, target below 4096")
    print(f"time of the last third / the second: {later_s / earlier_s:.3f}, target within 5 % of 1")
    print(f"images/s by ninths: within {spread:.1%} of their median")
    result: dict[str, Any] = {"images_per_s": round(middle, 1), "seconds": round(samples[-1][0], 1)}
    result |= {"peak_mb": round(peak_mb), "last_third": round(later_s / earlier_s, 3), "growth": round(growth, 3)}
    print(json.dumps({"raydet": result}))


if __name__ == "__main__":
    main()
