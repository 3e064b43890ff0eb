"""Speed and memory of converting a folder of images to a table: raydet and `datasets`.

Each contestant runs in a separate process, including imports, in rounds one after another. All read the same generated
JPEGs of 640 × 480. `raydet` checks that each image can be decoded completely, and hashes it. `datasets` (imagefolder,
then `to_parquet`) copies bytes without checks. `read_and_open` reads each file, opens its header with Pillow and writes
nothing, which is a lower bound. Memory is that of all processes. With --growth, raydet also runs on a quarter of the
images, which shows the growth of memory with their number.

    python benchmarks/prepare.py [--quick] [--images 20000] [--rounds 3] [--contestants raydet datasets]
"""

import argparse
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.contest import Pair, print_results, run_one, run_rounds
    from benchmarks.generated_jpegs import SIZE, jpegs
else:  # a script imports its neighbours without the package name
    from contest import Pair, print_results, run_one, run_rounds
    from generated_jpegs import SIZE, jpegs

NUM_DISTINCT = 500
PAIRS: tuple[Pair, ...] = (
    ("raydet", "datasets", 1.0),
    ("raydet", "read_and_open", 0.0),
    ("raydet_ray", "raydet", 0.0),
    ("raydet_ray", "ray_data", 0.0),
)


def raydet(images: Path, out: Path) -> int:
    from raydet import PrepareImagesConfig, prepare_images

    return prepare_images(PrepareImagesConfig(images=str(images), out=str(out), use_ray=False)).accepted


def raydet_ray(images: Path, out: Path) -> int:
    from raydet import PrepareImagesConfig, prepare_images

    return prepare_images(PrepareImagesConfig(images=str(images), out=str(out), use_ray=True)).accepted


def ray_data(images: Path, out: Path) -> int:
    """Process each image as `raydet_ray` does, in a Ray Data pipeline, with output files in the order of its blocks."""
    import pyarrow as pa
    import ray

    from raydet import PrepareImagesConfig
    from raydet.cluster import session
    from raydet.images.files import ImageFolder
    from raydet.preparation.examining import Row, read_row
    from raydet.preparation.sources.images import read_images
    from raydet.preparation.sources.source import SourceImage
    from raydet.tables.schema import build_schema

    folder = ImageFolder(str(images))
    max_pixels = PrepareImagesConfig(images=str(images), out=str(out)).max_pixels
    schema = build_schema("images")

    def examine(batch: pa.Table) -> pa.Table:
        records = [SourceImage(row["image_id"], row["path"]) for row in batch.to_pylist()]
        results = [
            read_row(
                record,
                reader=folder,
                inline=True,
                max_pixels=max_pixels,
                drop_duplicate_boxes=False,
                keep_truncated=False,
            )
            for record in records
        ]
        return pa.Table.from_pylist([result.values for result in results if isinstance(result, Row)], schema=schema)

    rows = [{"image_id": record.image_id, "path": record.path} for record in read_images(folder).images]
    with tempfile.TemporaryDirectory() as log, session.session(log):
        paths = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // 500))
        table = paths.map_batches(examine, batch_size=64, batch_format="pyarrow", num_cpus=0.5, zero_copy_batch=True)
        table.write_parquet(str(out), min_rows_per_file=3_000, ray_remote_args={"num_cpus": 0.25})
    return len(rows)


def raydet_split(images: Path, out: Path) -> int:
    from raydet import PrepareImagesConfig, prepare_images

    config = PrepareImagesConfig(images=str(images), out=str(out), use_ray=False, val_fraction=0.15)
    return prepare_images(config).accepted


def datasets(images: Path, out: Path) -> int:
    from datasets import load_dataset

    rows = load_dataset("imagefolder", data_dir=str(images), split="train", cache_dir=str(out / "cache"))
    rows.to_parquet(str(out / "rows.parquet"))
    return int(rows.num_rows)


def read_and_open(images: Path, out: Path) -> int:
    from PIL import Image

    paths = sorted(images.rglob("*.jpg"))
    for path in paths:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert image.size == SIZE
    return len(paths)


CONTESTANTS: dict[str, Callable[[Path, Path], int]] = {
    function.__name__: function for function in (raydet, datasets, read_and_open, raydet_ray, ray_data, raydet_split)
}
STANDARD = ("raydet", "datasets", "read_and_open")


def main() -> None:
    """Make the images and run the contestants; in a child process, run one contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=STANDARD)
    parser.add_argument("--growth", action="store_true", help="also run raydet on a quarter of the images")
    parser.add_argument("--quick", action="store_true", help="2,000 images, one round")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(_run(options.contestants[0], Path(options.child["images"]), Path(options.child["folder"]))))
        return
    num_images, rounds = (2_000, 1) if options.quick else (options.images, options.rounds)
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as folder:
        setting = {"folder": folder, "images": f"{folder}/images"}
        _make_images(Path(folder, "images"), num_images)
        quarter = []
        if options.growth:
            _make_images(Path(folder, "quarter"), num_images // 4)
            quarter = [run_one(__file__, "raydet", {**setting, "images": f"{folder}/quarter"}) for _ in range(rounds)]
        runs = run_rounds(__file__, options.contestants, setting, rounds=rounds)
    if quarter:
        peaks = [statistics.median(run["peak_mb"] for run in each) for each in (quarter, runs["raydet"])]
        print(
            f"raydet's peak: {peaks[0]:.0f} MB with {num_images // 4:,} images, {peaks[1]:.0f} MB with {num_images:,}"
        )
    print_results(runs, PAIRS)


def _run(name: str, images: Path, folder: Path) -> dict[str, Any]:
    """Run one contestant and delete its output, to free the disk for the next one."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    num_images = CONTESTANTS[name](images, out)
    seconds = time.perf_counter() - started
    shutil.rmtree(out, ignore_errors=True)
    print(f"{name}: {num_images} images", file=sys.stderr)
    return {"images_per_s": num_images / seconds}


def _make_images(folder: Path, num_images: int) -> None:
    """Write generated images; a comment makes each file unique."""
    encoded = jpegs(min(NUM_DISTINCT, num_images))
    for number in range(num_images):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encoded[number % NUM_DISTINCT]
        path.write_bytes(data[:2] + b"\xff\xfe\x00\x0a" + f"{number:08d}".encode() + data[2:])


if __name__ == "__main__":
    main()
