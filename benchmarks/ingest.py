"""Images per second that reach a training worker that does nothing, from raydet's stream, its peers and the limit.

    python benchmarks/ingest.py [--quick] [--settings 128,vga] [--contestants raydet,limit]

Settings: `128` has generated images of 128 px with flips; `vga` has JPEGs of 640×480 resized to 640 px with `light`.
Every contestant runs in a separate process, in turn, round after round, and delivers micro-batches of 8. Time counts
from the end of the first quarter of the images, so that batches made while the consumer started do not count.

- raydet, raydet_2: the stream of a training run with one and with two workers.
- raydet_default_ray: the same with one worker, on a Ray that was started with its default settings.
- dataloader: torch's `DataLoader` with two processes, over the same view and the same table.
- ray_data: `read_parquet`, `map_batches` with the same view, `iter_torch_batches`.
- limit: two processes that call the view and deliver nothing.
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.contest import Pair, print_ratios, run_rounds
else:  # a script imports its neighbours without the package name
    from contest import Pair, print_ratios, run_rounds

CONTESTANTS = ("limit", "raydet", "dataloader", "raydet_2", "raydet_default_ray", "ray_data")
TARGETS = {
    "128": (("raydet", "limit", 0.8), ("raydet", "dataloader", 0.95)),
    "vga": (("raydet", "limit", 0.9), ("raydet", "dataloader", 0.95)),
}
SAME: "tuple[Pair, ...]" = (("raydet_2", "raydet", 0.9), ("raydet_default_ray", "raydet", 0.9))
SIDES = {"128": (128, 128), "vga": (480, 640)}
IMAGES = {"128": 800, "vga": 200}
TIMED = {"128": 60_000, "vga": 8_000}
"""Images that a contestant delivers: enough that Ray has started all its processes in the first quarter."""
BATCH_SIZE, NUM_PROCESSES = 8, 2
_NUM_FILES = 400


def main() -> None:
    """Run the contestants in rounds and print the results."""
    options = _parse()
    if options.child:
        print(json.dumps(_compete(options.contestants[0], **json.loads(options.child))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: dict[str, Any] = {}
    for name in options.settings:
        with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as folder:
            write_table(Path(folder) / "table", num_images=IMAGES[name], size_hw=SIDES[name])
            timed = TIMED[name] // (4 if options.quick else 1)
            setting = {"folder": folder, "name": name, "num_images": timed}
            runs = run_rounds(__file__, options.contestants, setting, rounds=options.rounds)
        print(f"\n{name}:")
        print_ratios(runs, [*TARGETS[name], *SAME], "images_per_s", "target")
        for contestant, rounds in runs.items():
            speed = statistics.median(run["images_per_s"] for run in rounds)
            peak_mb = statistics.median(run["peak_mb"] for run in rounds)
            print(f"{contestant:<20} {speed:>8.1f} images/s {peak_mb:>7.0f} MB")
            results[f"{name}_{contestant}"] = {"images_per_s": round(speed, 2), "peak_mb": round(peak_mb)}
    print(json.dumps(results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", type=lambda text: text.split(","), default=list(SIDES), help="settings to measure: 128,vga"
    )
    parser.add_argument(
        "--contestants",
        type=lambda text: text.split(","),
        default=list(CONTESTANTS),
        help="contestants to run: " + ", ".join(CONTESTANTS),
    )
    parser.add_argument("--rounds", type=int, default=None, help="number of rounds; default: 3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="a quarter of the images, in one round")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def write_table(folder: Path, *, num_images: int, size_hw: tuple[int, int], files: Path | None = None) -> None:
    """Write an images table of generated JPEGs with a few boxes each.

    Args:
        folder: Folder of the table.
        num_images: Rows of the table.
        size_hw: Height and width of the images in pixels.
        files: If given, a folder for a few image files, to which all rows refer; by default rows hold their own bytes.
    """
    from raydet.tables.schema import Category, build_schema
    from raydet.tables.table import TableWriter

    rng = np.random.default_rng(0)
    height, width = size_hw
    if files is not None and not files.is_dir():
        files.mkdir()
        for number in range(_NUM_FILES):
            (files / f"{number}.jpg").write_bytes(_jpeg(rng, size_hw))
    categories = (Category(0, "thing"),)
    with TableWriter(str(folder), build_schema("images", categories), config_hash="benchmark") as writer:
        for number in range(num_images):
            image: dict[str, Any] = {"bytes": None, "path": f"{files}/{number % _NUM_FILES}.jpg"}
            if files is None:
                image = {"bytes": _jpeg(rng, size_hw), "path": f"{number}.jpg"}
            boxes = np.column_stack([rng.uniform(0, side / 2, (5, 1)) for side in (width, height)] * 2) + 4
            row = {
                "image_id": number,
                "image": image,
                "width": width,
                "height": height,
                "objects": {
                    "id": list(range(number * 5, number * 5 + 5)),
                    "bbox": boxes.tolist(),
                    "category": [0] * 5,
                    "area": (boxes[:, 2] * boxes[:, 3]).tolist(),
                    "iscrowd": [False] * 5,
                },
            }
            writer.write_rows([row])


def _jpeg(rng: np.random.Generator, size_hw: tuple[int, int]) -> bytes:
    from PIL import Image, ImageFilter

    height, width = size_hw
    noise = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    stream = io.BytesIO()
    image = Image.fromarray(noise).resize((width, height)).filter(ImageFilter.GaussianBlur(1))
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def view_of(name: str) -> Any:
    """Return the view of a setting."""
    from raydet.augmentation.view import View
    from raydet.models.geometry import ResizeRule

    side = {"128": 128, "vga": 640, "accelerator": 320}[name]
    rule = ResizeRule(mode="fixed", size_hw=(side, side))
    return View(resize_rule=rule, augmentation="light" if name == "vga" else "flip")


def _compete(contestant: str, *, folder: str, name: str, num_images: int) -> dict[str, Any]:
    table = str(Path(folder) / "table")
    if contestant == "limit":
        return {"images_per_s": limit_of(table, name, num_images)}
    if contestant == "dataloader":
        return {"images_per_s": _speed_of(_dataloader(table, name, num_images), num_images)}
    with _cluster(is_default=contestant == "raydet_default_ray"):
        if contestant == "ray_data":
            return {"images_per_s": _speed_of(_ray_data(table, name, num_images), num_images)}
        return {"images_per_s": _raydet(table, name, num_images, world_size=2 if contestant == "raydet_2" else 1)}


def _speed_of(batch_sizes: Iterable[int], num_images: int) -> float:
    """Return the images per second after the first quarter."""
    batches, num_first = iter(batch_sizes), 0
    while num_first < num_images / 4:
        num_first += next(batches)
    started = time.perf_counter()
    return sum(batches) / (time.perf_counter() - started)


@contextlib.contextmanager
def _cluster(*, is_default: bool) -> Iterator[None]:
    import ray

    from raydet.cluster.session import session

    with tempfile.TemporaryDirectory() as log:
        if is_default:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        with session(log):
            yield
        ray.shutdown()


def _raydet(table_uri: str, name: str, num_images: int, *, world_size: int) -> float:
    """Run the stream as training with micro-batches of 8 does, with an actor as each worker."""
    import ray

    from raydet.cluster.ray_internals import alive_nodes
    from raydet.tables.table import open_table
    from raydet.training.feeding.ordering import RunPlan
    from raydet.training.feeding.stream import read_stream, run_stream
    from raydet.training.feeding.views import Views

    table = open_table(table_uri, "images")
    plan = RunPlan(
        train_groups=tuple((group.num_rows, group.num_bytes) for group in table.row_groups()),
        num_val=1,
        batch_size=BATCH_SIZE * world_size,
        accumulate=1,
        epochs=-(-num_images // table.num_rows),
        seed=0,
        window_bytes=2**29,
        validate_every=10**6,
        validate_batch_size=BATCH_SIZE,
    )
    iterators = run_stream(
        plan,
        train=table,
        val=table,
        views=Views(view_of(name)),
        world_size=world_size,
        ranks=range(world_size),
        start_epoch=0,
        start_step=0,
        decoders=[alive_nodes()[0]["NodeID"]] * NUM_PROCESSES,
    )

    @ray.remote(num_cpus=0.5)
    def consume(iterator: Any) -> float:
        import raydet.models.collate  # noqa: F401  # a worker has imported torch before it reads

        return _speed_of((batch.num_images for batch in read_stream(iterator)), num_images // world_size)

    return float(sum(ray.get([consume.remote(iterator) for iterator in iterators])))


class _Dataset:
    """The table as a torch dataset, decoded by the same view."""

    def __init__(self, table_uri: str, name: str, num_images: int) -> None:
        from raydet.tables.table import open_table

        self._rows = open_table(table_uri, "images").read().to_pylist()
        self._view, self._num_images = view_of(name), num_images
        self._is_plain = name == "accelerator"  # as predict sees images

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self._rows[number % len(self._rows)]
        epoch = number // len(self._rows)
        if self._is_plain:
            seen = self._view.plain(row)
        else:
            seen = self._view.augmented(row, epoch=epoch, resize_rule=self._view.step_resize_rule(epoch, 0))
        return {"pixels": np.ascontiguousarray(seen.planes), "boxes": seen.boxes_cxcywh}


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    pixels = torch.stack([torch.from_numpy(item["pixels"]) for item in items])
    return {"pixels": pixels, "boxes": [torch.from_numpy(item["boxes"]) for item in items]}


def _dataloader(table_uri: str, name: str, num_images: int) -> Iterator[int]:
    from torch.utils.data import DataLoader

    dataset: Any = _Dataset(table_uri, name, num_images)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=NUM_PROCESSES, collate_fn=_collate)
    for batch in loader:
        yield len(batch["pixels"])


def _ray_data(table_uri: str, name: str, num_images: int) -> Iterator[int]:
    """Stream with plain Ray Data, as its guides show; read the table again for every epoch."""
    import ray.data

    from raydet.tables.schema import Category  # noqa: F401  # the package is importable in the workers

    view = view_of(name)

    def see(batch: dict[str, Any]) -> dict[str, Any]:
        planes = []
        for number, image in enumerate(batch["image"]):
            row = {"image_id": int(batch["image_id"][number]), "image": image, "objects": batch["objects"][number]}
            row["objects"] = {key: list(values) for key, values in row["objects"].items()}
            planes.append(view.augmented(row, epoch=0, resize_rule=view.resize_rule).planes)
        return {"pixels": np.stack(planes)}

    dataset = ray.data.read_parquet(table_uri, file_extensions=["parquet"]).repartition(
        target_num_rows_per_block=4 * BATCH_SIZE
    )
    dataset = dataset.map_batches(see, batch_size=4 * BATCH_SIZE)
    left = num_images
    while left > 0:
        for batch in dataset.iter_torch_batches(batch_size=BATCH_SIZE):
            yield len(batch["pixels"])
            left -= len(batch["pixels"])


def limit_of(table_uri: str, name: str, num_images: int) -> float:
    """Return the images per second of processes that call the view concurrently."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(NUM_PROCESSES), context.Queue()
    share = num_images // NUM_PROCESSES
    arguments = (table_uri, name, share, barrier, seconds)
    processes = [context.Process(target=_call_view, args=arguments) for _ in range(NUM_PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit(f"a process of the limit failed with exit code {process.exitcode}")
    answers: list[float] = [seconds.get() for _ in processes]
    return share * NUM_PROCESSES / max(answers)


def _call_view(table_uri: str, name: str, num_images: int, barrier: threading.Barrier, seconds: Any) -> None:
    import torch

    torch.set_num_threads(1)
    dataset = _Dataset(table_uri, name, num_images)
    for number in range(20):
        dataset[number]
    barrier.wait(timeout=120)
    started = time.perf_counter()
    for number in range(num_images):
        dataset[number]
    seconds.put(time.perf_counter() - started)


if __name__ == "__main__":
    main()
