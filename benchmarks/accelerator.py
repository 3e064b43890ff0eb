"""Utilization of a simulated accelerator in `train` and `predict`: a model that waits without using the CPU.

    python benchmarks/accelerator.py [--quick] [--jobs train predict predict_ceiling]

JPEGs of 640 × 480 are resized to 320; batches have 16 images. First two plain processes measure the limit: images per
second that they decode and resize. The simulated model takes as long for one batch as those processes take for two, so
that feeding it needs half of the cores.

- train: utilization from the first step of each epoch to its last, without validation and checkpoints.
- train_nodes: the same for four workers on four local nodes, together at `--nodes-rate` of the rate of one, because the
  processes of four Ray nodes share the two cores; the lowest of the four.
- predict: utilization from 10 s after the first batch to the last.
- predict_ceiling: images per second of a model that takes no time, as a fraction of the limit.

Utilization is the time inside simulated computations, divided by the wall time. The last line is one JSON object.
"""

import argparse
import functools
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT))  # for tests.nodes

if TYPE_CHECKING:
    from benchmarks.ingest import limit_of, write_table
    from benchmarks.simulated import load_simulated, train_simulated
else:  # a script imports its neighbours without the package name
    from ingest import limit_of, write_table
    from simulated import load_simulated, train_simulated

from tests.nodes import nodes  # noqa: E402

JOBS = ("train", "train_nodes", "predict", "predict_ceiling")
SIDE, BATCH_SIZE = 320, 16
NUM_FILES = 400
NUM_NODES = 4
WARM_UP_S = 10.0

Span = tuple[int, float, float, int]
"""Label, start, end and number of images of a simulated computation."""


def main() -> None:
    """Run the jobs and print their utilization."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--rounds", type=int, default=None, help="number of rounds; default: 3, or 1 with --quick")
    parser.add_argument("--nodes-rate", type=float, default=0.75)
    parser.add_argument("--quick", action="store_true", help="finishes within three minutes on two cores")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _run_training(**json.loads(options.child))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: dict[str, list[dict[str, float]]] = {job: [] for job in options.jobs}
    for _ in range(options.rounds or (1 if options.quick else 3)):
        with tempfile.TemporaryDirectory(prefix="rdb", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            write_table(folder / "train", num_images=NUM_FILES, size_hw=(480, 640))
            limit = limit_of(str(folder / "train"), "accelerator", 2_000)
            seconds = 2 * BATCH_SIZE / limit
            print(f"limit {limit:.0f} images/s, {1000 * seconds:.1f} ms per batch", flush=True)
            for job in options.jobs:
                if job.startswith("train"):
                    rate = options.nodes_rate if job == "train_nodes" else 1.0
                    result = _train(folder, job, seconds / rate, epochs=4 if options.quick else 10)
                else:
                    is_ceiling = job == "predict_ceiling"
                    num_images = round(limit * (20 if options.quick else 40) * (1 if is_ceiling else 0.5))
                    around = [_limit(folder)] if is_ceiling else []
                    result = _predict(folder, job, 0.0 if is_ceiling else seconds, num_images)
                    if is_ceiling:  # the machine's speed changes within seconds
                        result["of_limit"] = result["images_per_s"] / statistics.mean([*around, _limit(folder)])
                results[job].append(result)
                print(job, json.dumps(result), flush=True)
    print(json.dumps({job: _medians(rounds) for job, rounds in results.items()}))


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}


def _limit(folder: Path) -> float:
    return limit_of(str(folder / "train"), "accelerator", 8_000)


def _train(folder: Path, job: str, seconds: float, *, epochs: int) -> dict[str, float]:
    log = folder / f"{job}-log"
    log.mkdir()
    if not (folder / "val").is_dir():
        write_table(folder / "val", num_images=BATCH_SIZE, size_hw=(480, 640))
    setting: dict[str, Any] = {"folder": str(folder), "job": job, "seconds": seconds, "epochs": epochs}
    setting["num_workers"] = 1
    if job == "train":
        _run_training(**setting)
    else:
        setting |= {"seconds": NUM_NODES * seconds, "epochs": NUM_NODES * epochs, "num_workers": NUM_NODES}
        # Each worker reserves the CPU of its node, so that no node gets two.
        (folder / "c").mkdir()
        with nodes(NUM_NODES, cpus=1, folder=folder / "c") as cluster:
            done = cluster.run([sys.executable, __file__, "--child", json.dumps(setting)], timeout_s=600)
        if done.returncode:
            sys.exit(f"{job} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    # The first epoch starts before its images are there.
    utilizations = [
        [_utilization([span for span in spans if span[0] == epoch]) for epoch in range(1, setting["epochs"])]
        for spans in spans_of(log).values()
    ]
    assert len(utilizations) == setting["num_workers"], f"{len(utilizations)} workers trained"
    return {"utilization": min(statistics.median(one) for one in utilizations)}


def _run_training(folder: str, job: str, seconds: float, epochs: int, num_workers: int) -> None:
    train_simulated(
        Path(folder),
        Path(folder, f"{job}-log"),
        seconds=seconds,
        model="rt_detr_v2_tiny",
        out=f"{folder}/run-{job}",
        image_size=SIDE,
        batch_size=BATCH_SIZE * num_workers,
        num_workers=num_workers,
        cpus_per_worker=None if num_workers == 1 else 1,
        epochs=epochs,
    )


def _predict(folder: Path, job: str, seconds: float, num_images: int) -> dict[str, float]:
    from raydet import PredictConfig
    from raydet.models.loading import build_detector
    from raydet.scoring.predict import predict_with
    from raydet.tables.schema import Category

    model, log = folder / "model", folder / f"{job}-log"
    log.mkdir()
    if not model.is_dir():
        build_detector("rt_detr_v2_tiny", (Category(0, "thing"),), image_size=SIDE, seed=0).save(str(model))
    data = folder / f"{job}-images"
    write_table(data, num_images=num_images, size_hw=(480, 640), files=folder / "files")
    config = PredictConfig(checkpoint=str(model), data=str(data), out=str(folder / job), batch_size=BATCH_SIZE)
    load = functools.partial(load_simulated, seconds=seconds, folder=str(log))
    predict_with(config, in_process=False, load=load)
    (spans,) = spans_of(log).values()
    started = spans[0][1] + WARM_UP_S
    own = [span for span in spans if span[1] >= started]
    if seconds:
        return {"utilization": _utilization(own)}
    speed = sum(span[3] for span in own[1:]) / (own[-1][2] - own[0][2])
    return {"images_per_s": speed}


def spans_of(folder: Path) -> dict[str, list[Span]]:
    """Return the computations of each simulated device, in order."""
    return {
        path.name: sorted((tuple(json.loads(line)) for line in path.read_text().splitlines()), key=lambda span: span[1])
        for path in folder.iterdir()
        if path.stat().st_size
    }


def _utilization(spans: list[Span]) -> float:
    return sum(end - start for _, start, end, _ in spans) / (spans[-1][2] - spans[0][1])


if __name__ == "__main__":
    main()
