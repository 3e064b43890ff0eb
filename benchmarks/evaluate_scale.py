"""Time and memory of `evaluate` on tables with ten detections per image, for a growing number of detections.

    python benchmarks/evaluate_scale.py [--quick] [--detections 100000 1000000] [--address local]

Each size runs in a separate process. `peak_mb` covers all its processes. `cpu_s` is the CPU time of all threads of
`evaluate`, which is more reliable than `seconds` on a busy machine. `--address local` matches on a local Ray cluster
instead of in threads.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.contest import run_one
    from benchmarks.generated_boxes import Generated, generate, write_tables
else:  # a script imports its neighbours without the package name
    from contest import run_one
    from generated_boxes import Generated, generate, write_tables

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
_IMAGES_AT_ONCE = 100_000


def main() -> None:
    """Run one size after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detections", type=int, nargs="+", default=SIZES)
    parser.add_argument("--address", help="Ray cluster; `local` starts one on this machine")
    parser.add_argument("--quick", action="store_true", help="up to 1,000,000 detections")
    parser.add_argument("--contestants", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(json.loads(options.child))
        return
    sizes = [size for size in options.detections if size <= 1_000_000] if options.quick else options.detections
    summary: dict[str, dict[str, float]] = {}
    print(
        f"{'detections':>12} {'images':>10} {'seconds':>8} {'imports':>8} {'CPU s':>7} {'us/detection':>13} "
        f"{'peak MB':>8} {'AP':>7}"
    )
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            write_tables(_parts(size), Path(name))
            run = run_one(__file__, "raydet", {"folder": name, "address": options.address})
        print(
            f"{size:>12,} {size // 10:>10,} {run['seconds']:>8.1f} {run['imports_s']:>8.1f} "
            f"{run['cpu_s']:>7.1f} {run['seconds'] / size * 1e6:>13.2f} {run['peak_mb']:>8.0f} {run['ap']:>7.4f}",
            flush=True,
        )
        summary[f"raydet_{size}"] = {
            "images_per_s": round(size // 10 / run["seconds"], 1),
            "seconds": round(run["seconds"], 2),
            "imports_s": round(run["imports_s"], 2),
            "cpu_s": round(run["cpu_s"], 2),
            "peak_mb": round(run["peak_mb"]),
            "ap": run["ap"],
        }
    for kind in ("seconds", "cpu_s"):
        _print_fit(kind, sizes, [run[kind] for run in summary.values()])
    print(json.dumps(summary))


def _parts(num_detections: int) -> Iterator[Generated]:
    num_images = num_detections // 10
    for first in range(0, num_images, _IMAGES_AT_ONCE):
        count = min(_IMAGES_AT_ONCE, num_images - first)
        yield generate(count, count * 7 // 5, count * 10, seed=first, first_id=first + 1)


def _print_fit(kind: str, sizes: Sequence[int], seconds: Sequence[float]) -> None:
    """Fit seconds = start + slope * detections, by least squares of relative errors; print the growth between sizes."""
    if len(sizes) < 2:
        return
    sides, weights = np.array([sizes, np.ones(len(sizes))]).T, 1 / np.array(seconds)
    (slope, start), *_ = np.linalg.lstsq(sides * weights[:, None], np.ones(len(sizes)), rcond=None)
    print(f"fit of {kind}: {start:.2f} s + {slope * 1e6:.3f} us per detection")
    for number in range(1, len(sizes)):
        own = (seconds[number] - seconds[number - 1]) / (sizes[number] - sizes[number - 1])
        measured = seconds[number] / (start + slope * sizes[number])
        print(
            f"{sizes[number]:>12,}: {own * 1e6:.3f} us per detection above {sizes[number - 1]:,}; "
            f"{measured:.2f} of the fit"
        )


def _child(setting: dict[str, Any]) -> None:
    started = time.perf_counter()
    import raydet
    import raydet.measuring.shards

    imports_s = time.perf_counter() - started
    folder = Path(setting["folder"])
    config = raydet.EvaluateConfig(
        truth=str(folder / "truth"), detections=str(folder / "detections"), ray_address=setting["address"]
    )
    result = raydet.evaluate(config).result
    seconds = time.perf_counter() - started
    cpu_s = time.process_time()
    print(
        json.dumps(
            {"images_per_s": result.num_images / seconds, "imports_s": imports_s, "cpu_s": cpu_s, "ap": result.AP}
        )
    )


if __name__ == "__main__":
    main()
