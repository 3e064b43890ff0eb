"""Scoring speed of raydet, the transformers pipeline, a plain loop and the limit: same weights, same images.

    python benchmarks/predict_vs_peers.py [--quick] [--small-checkpoint DIR] [--large-checkpoint DIR]
        [--contestants raydet,limit]

Two models: RT-DETRv2 with a ResNet-18 at 320 pixels (random weights unless given: speed does not depend on them) and,
with `small_` before a contestant's name, `rt_detr_v2_small` (1.8 M parameters) at 256. The images are BCCD's test
split, repeated several times. Each contestant runs in a separate process, in turn, round after round.

- raydet, raydet_bf16, raydet_openvino (also bf16): `raydet.predict()` through Ray, from an images table to Parquet.
- pipeline: `pipeline("object-detection")` one image at a time, from files; larger batches fail for RT-DETRv2.
- loop: a `DataLoader` with one process that decodes and preprocesses, the model in batches, post-processing.
- limit, limit_bf16: only the model, in batches, over tensors in memory, in raydet's default memory format (channels
  last), which is faster than the model's own.
- limit_from_files: as many plain processes as raydet has workers, with one model each, which decode and resize files
  and run the model in batches, but neither post-process nor write anything.

`images_per_s` is measured after warm-up, for raydet from the first batch onwards. `ap` is that of the detections
against BCCD's truth; null if weights are random or nothing is post-processed.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.contest import Pair, print_results, run_rounds
    from benchmarks.published_models import published_detector
else:  # a script imports its neighbours without the package name
    from contest import Pair, print_results, run_rounds
    from published_models import published_detector

KINDS = ("raydet", "raydet_bf16", "raydet_openvino", "pipeline", "loop", "limit", "limit_bf16", "limit_from_files")
CONTESTANTS = (*KINDS, *(f"small_{kind}" for kind in KINDS))
PAIRS: "tuple[Pair, ...]" = (
    ("raydet", "limit", 0.0),
    ("raydet", "limit_from_files", 0.9),
    ("raydet_bf16", "pipeline", 2.3),
    ("raydet_openvino", "pipeline", 3.0),
    ("raydet_bf16", "limit_bf16", 0.0),
    ("raydet", "loop", 0.0),
    ("small_raydet", "small_limit", 0.0),
    ("small_raydet", "small_limit_from_files", 0.9),
    ("small_raydet", "small_pipeline", 0.0),
    ("small_raydet_openvino", "small_pipeline", 0.0),
    ("small_raydet", "small_loop", 0.0),
)
BATCH_SIZE = 16
NUM_SPLIT_IMAGES = 72


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Setting of all contestants.

    Attributes:
        folder: Folder with BCCD's test split as tables and `files/`, and the checkpoints `large/` and `small/`.
        repeats: Repetitions of the split, by model.
        workers: raydet's copies of the model.
        threads: Total number of compute threads.
        has_weights: True for trained checkpoints, by model.
    """

    folder: Path
    repeats: dict[str, int]
    workers: int
    threads: int
    has_weights: dict[str, bool]

    def checkpoint(self, model: str) -> str:
        """Return the model folder."""
        return str(self.folder / model)


def main() -> None:
    """Run the contestants in rounds and print the results."""
    options = _parse()
    if options.child:
        content = json.loads(options.child)
        print(json.dumps(_compete(options.contestants[0], Setting(**{**content, "folder": Path(content["folder"])}))))
        return
    # So that `timeout` also stops the contestant.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as folder:
        setting = Setting(
            folder=Path(folder),
            repeats={"large": options.repeats, "small": options.repeats * 6},
            workers=options.workers,
            threads=options.threads,
            has_weights={"large": bool(options.large_checkpoint), "small": bool(options.small_checkpoint)},
        )
        _prepare(options, setting)
        runs = run_rounds(__file__, options.contestants, {**vars(setting), "folder": folder}, rounds=options.rounds)
    print(f"\n{options.threads} threads, batches of {BATCH_SIZE}, raydet with {options.workers} workers")
    print_results(runs, PAIRS)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).parents[2] / "shared" / "data"
    data = Path(os.environ.get("RAYDET_TEST_DATA", shared)) / "bccd"
    parser.add_argument("--data", type=Path, default=data, help="folder with BCCD's images and instances_test.json")
    parser.add_argument("--large-checkpoint", help="model folder; an RT-DETRv2-R18 with random weights by default")
    parser.add_argument("--small-checkpoint", help="model folder; rt_detr_v2_small with random weights by default")
    parser.add_argument(
        "--contestants", type=lambda text: text.split(","), help="contestants to run: " + ", ".join(CONTESTANTS)
    )
    parser.add_argument("--rounds", type=int, help="number of rounds; default: 3, or 1 with --quick")
    parser.add_argument(
        "--repeats",
        type=int,
        help="repetitions of the 72 images, six times as many for small; default: 4, or 1 with --quick",
    )
    parser.add_argument("--workers", type=int, default=2, help="raydet's copies of the model")
    parser.add_argument("--threads", type=int, default=2, help="compute threads of every contestant")
    parser.add_argument("--quick", action="store_true", help="finishes within three minutes on two cores")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quick = bool(options.quick)
    few = ("raydet", "pipeline", "limit_from_files", "small_raydet", "small_pipeline", "small_limit_from_files")
    options.contestants = options.contestants or list(few if quick else CONTESTANTS)
    unknown = set(options.contestants) - set(CONTESTANTS)
    if unknown:
        parser.error(f"--contestants does not have {', '.join(sorted(unknown))}; use {', '.join(CONTESTANTS)}")
    if not options.child and not (options.data / "instances_test.json").is_file():
        parser.error(f"no BCCD in {options.data}; set --data or RAYDET_TEST_DATA to its folder")
    options.rounds = options.rounds or (1 if quick else 3)
    options.repeats = options.repeats or (1 if quick else 4)
    return options


def _prepare(options: argparse.Namespace, setting: Setting) -> None:
    """Write the repeated images as tables and as files, and the checkpoints."""
    from raydet import PrepareCocoConfig, prepare_coco

    content = json.loads((options.data / "instances_test.json").read_bytes())
    # In the order of file names, in which other contestants read the files.
    originals = sorted(content["images"], key=lambda image: str(image["file_name"]))
    files = setting.folder / "files"
    files.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for repeat in range(max(setting.repeats.values())):
        for image in originals:
            link = files / f"{repeat:03d}-{image['file_name']}"
            link.symlink_to(options.data / "images" / image["file_name"])
            images.append({**image, "id": repeat * 10**6 + image["id"]})
        for item in content["annotations"]:
            number = len(annotations) + 1
            annotations.append({**item, "id": number, "image_id": repeat * 10**6 + item["image_id"]})
    for model, repeats in setting.repeats.items():
        kept = images[: repeats * len(originals)]
        ids = {image["id"] for image in kept}
        boxes = [item for item in annotations if item["image_id"] in ids]
        path = setting.folder / f"{model}.json"
        path.write_text(json.dumps({**content, "images": kept, "annotations": boxes}))
        table = str(setting.folder / f"{model}_table")
        prepare_coco(PrepareCocoConfig(images=str(options.data / "images"), annotations=str(path), out=table))
    for model, given in (("large", options.large_checkpoint), ("small", options.small_checkpoint)):
        if given:
            (setting.folder / model).symlink_to(Path(given).resolve())
        else:
            _random_checkpoint(model, content["categories"]).save(str(setting.folder / model))


def _random_checkpoint(model: str, categories: Sequence[dict[str, Any]]) -> Any:
    from raydet.models.loading import build_detector
    from raydet.tables.schema import Category

    classes = [Category(id=item["id"], name=item["name"]) for item in categories]
    if model == "small":
        return build_detector("rt_detr_v2_small", classes, image_size=256, seed=0)
    return published_detector("rt_detr_v2_r18", classes, image_size=320)


def _compete(name: str, setting: Setting) -> dict[str, Any]:
    """Run a contestant in its own process; return images per second and AP."""
    contestants: dict[str, Callable[[Setting, str, str], dict[str, Any]]] = {
        "raydet": _raydet,
        "pipeline": _pipeline,
        "loop": _loop,
        "limit": _limit,
        "limit_from_files": _limit_from_files,
    }
    model = "small" if name.startswith("small_") else "large"
    kind = name.removeprefix("small_")
    variant = next((variant for variant in ("bf16", "openvino") if kind.endswith(f"_{variant}")), "")
    return contestants[kind.removesuffix(f"_{variant}")](setting, model, variant)


def _raydet(setting: Setting, model: str, variant: str) -> dict[str, Any]:
    from raydet import PredictConfig, predict

    with tempfile.TemporaryDirectory(dir=setting.folder) as out:
        result = predict(
            PredictConfig(
                checkpoint=setting.checkpoint(model),
                data=str(setting.folder / f"{model}_table"),
                out=f"{out}/detections",
                batch_size=BATCH_SIZE,
                num_workers=setting.workers,
                threads_per_worker=max(1, setting.threads // setting.workers),
                engine="openvino" if variant == "openvino" else "torch",
                precision="bf16" if variant else "fp32",
                use_gpu=False,
            )
        )
        report = json.loads(Path(result.out, ".job.json").read_text())
        ap = _ap(setting, model, result.out)
    return {"images_per_s": report["images_per_s_after_startup"], "ap": ap}


def _ap(setting: Setting, model: str, detections: str) -> float | None:
    from raydet import EvaluateConfig, evaluate

    if not setting.has_weights[model]:
        return None
    truth = str(setting.folder / f"{model}_table")
    return evaluate(EvaluateConfig(truth=truth, detections=detections)).result.AP


def _ap_of(setting: Setting, model: str, found: Iterator[dict[str, Any]]) -> float | None:
    """Return the AP of results from the post-processing of transformers, in the order of the table."""
    if not setting.has_weights[model]:
        return None
    from raydet.tables.table import open_table

    table = open_table(str(setting.folder / f"{model}_table"), "images")
    ids = table.read(["image_id"])["image_id"].to_pylist()
    results = []
    for image_id, item in zip(ids, found, strict=False):
        for score, label, (left, top, right, bottom) in zip(item["scores"], item["labels"], item["boxes"], strict=True):
            box = [float(left), float(top), float(right - left), float(bottom - top)]
            category = table.categories[int(label)].id
            results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": float(score)})
    path = setting.folder / f"{model}_results.json"
    path.write_text(json.dumps(results))
    return _ap(setting, model, str(path))


def _files(setting: Setting, model: str) -> list[Path]:
    number = setting.repeats[model] * NUM_SPLIT_IMAGES
    return sorted((setting.folder / "files").iterdir())[:number]


def _pipeline(setting: Setting, model: str, _: str) -> dict[str, Any]:
    import torch
    from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

    torch.set_num_threads(setting.threads)
    folder = setting.checkpoint(model)
    detector = pipeline(
        "object-detection",
        model=AutoModelForObjectDetection.from_pretrained(folder),
        image_processor=AutoImageProcessor.from_pretrained(folder),
    )
    files = _files(setting, model)
    for path in files[:4]:
        detector(str(path), threshold=0.0)
    started = time.perf_counter()
    answers = [detector(str(path), threshold=0.0) for path in files]
    rate = len(files) / (time.perf_counter() - started)
    label_of = dict(detector.model.config.label2id or {})
    found = (
        {
            "scores": [item["score"] for item in answer],
            "labels": [label_of[item["label"]] for item in answer],
            "boxes": [[item["box"][key] for key in ("xmin", "ymin", "xmax", "ymax")] for item in answer],
        }
        for answer in answers
    )
    return {"images_per_s": rate, "ap": _ap_of(setting, model, found)}


def _loop(setting: Setting, model: str, _: str) -> dict[str, Any]:
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    torch.set_num_threads(setting.threads)
    folder = setting.checkpoint(model)
    detector = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    files = _files(setting, model)
    warm_up = files[:BATCH_SIZE]
    loader: Any = DataLoader(
        warm_up + files,  # type: ignore[arg-type]
        batch_size=BATCH_SIZE,
        num_workers=1,
        collate_fn=functools.partial(_open_and_process, processor),
    )
    found: list[dict[str, Any]] = []
    started = 0.0
    with torch.inference_mode():
        for number, (inputs, sizes_hw) in enumerate(loader):
            if number == 1:
                started = time.perf_counter()
            outputs = detector(**inputs)
            found += processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes_hw)
    rate = len(files) / (time.perf_counter() - started)
    return {"images_per_s": rate, "ap": _ap_of(setting, model, iter(found[len(warm_up) :]))}


def _open_and_process(processor: Any, paths: Sequence[Path]) -> tuple[Any, list[tuple[int, int]]]:
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path in paths]
    return processor(images, return_tensors="pt"), [(image.height, image.width) for image in images]


def _limit(setting: Setting, model: str, variant: str) -> dict[str, Any]:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    torch.set_num_threads(setting.threads)
    folder = setting.checkpoint(model)
    detector: Any = AutoModelForObjectDetection.from_pretrained(folder).eval()
    detector.to(memory_format=torch.channels_last)
    processor = AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(path).convert("RGB") for path in _files(setting, model)[:NUM_SPLIT_IMAGES]]
    pixels = processor(images, return_tensors="pt")["pixel_values"].contiguous(memory_format=torch.channels_last)
    batches = [pixels[at : at + BATCH_SIZE] for at in range(0, len(pixels), BATCH_SIZE)]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=variant == "bf16"):
        for batch in batches[:2]:
            detector(pixel_values=batch)
        started = time.perf_counter()
        for batch in itertools.chain.from_iterable([batches] * setting.repeats[model]):
            detector(pixel_values=batch)
    return {"images_per_s": len(pixels) * setting.repeats[model] / (time.perf_counter() - started), "ap": None}


def _limit_from_files(setting: Setting, model: str, _: str) -> dict[str, Any]:
    files = _files(setting, model)
    context = multiprocessing.get_context("spawn")
    barrier, ends = context.Barrier(setting.workers + 1), context.SimpleQueue()
    processes = [
        context.Process(
            target=_score_files, args=(setting, model, files[number :: setting.workers], barrier, ends), daemon=True
        )
        for number in range(setting.workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    started = time.perf_counter()
    seconds = [ends.get() - started for _ in processes][-1]
    return {"images_per_s": len(files) / seconds, "ap": None}


def _score_files(setting: Setting, model: str, paths: Sequence[Path], barrier: Any, ends: Any) -> None:
    import torch
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    torch.set_num_threads(max(1, setting.threads // setting.workers))
    folder = setting.checkpoint(model)
    detector: Any = AutoModelForObjectDetection.from_pretrained(folder).eval()
    detector.to(memory_format=torch.channels_last)
    processor = AutoImageProcessor.from_pretrained(folder)

    def score(part: Sequence[Path]) -> None:
        inputs, _ = _open_and_process(processor, part)
        detector(pixel_values=inputs["pixel_values"].contiguous(memory_format=torch.channels_last))

    with torch.inference_mode():
        score(paths[:BATCH_SIZE])
        barrier.wait()
        for start in range(0, len(paths), BATCH_SIZE):
            score(paths[start : start + BATCH_SIZE])
    ends.put(time.perf_counter())


if __name__ == "__main__":
    main()
