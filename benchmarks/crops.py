"""Speed and memory of `crops` beside a plain script that does the same: decode, cut, batches of a classifier.

    python benchmarks/crops.py [--images 400] [--detections 5] [--rounds 3] [--memory-images 4000] [--quick]

JPEGs of 640 × 480 with some detections each; a ViT with random weights at 96 pixels, batches of 16. Each contestant
runs in a process by itself, in turn, and loads the model before its time starts:

- raydet: `raydet.crops` in this process, into a table.
- script: one loop with transformers' image processor and model, and PIL; it decodes each image once and keeps the
  answers.

Then raydet runs once over `--memory-images` images, and its memory is read four times, after each quarter: with 5
detections an image the default is 20,000 detections. The last line is one JSON object.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.contest import child_environment, print_ratios, run_in_turn
    from benchmarks.generated_jpegs import jpegs
else:  # a script imports its neighbours without the package name
    from contest import child_environment, print_ratios, run_in_turn
    from generated_jpegs import jpegs

CONTESTANTS = ("raydet", "script")
SIDE, BATCH_SIZE = 96, 16
NUM_FILES = 200


def main() -> None:
    """Run all contestants and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--detections", type=int, default=5, help="detections in each image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-images", type=int, default=4000)
    parser.add_argument("--quick", action="store_true", help="one round, few images")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, folder, num_images = options.child
        print(json.dumps(_raydet(folder, int(num_images)) if name == "raydet" else _script(folder)))
        return
    if options.quick:
        options.images, options.rounds, options.memory_images = 40, 1, 200
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        _write(folder, "few", options.images, options.detections)
        _write(folder, "many", options.memory_images, options.detections)
        runs = run_in_turn(
            CONTESTANTS,
            lambda name: _child(name, folder / "few", options.images),
            lambda result: f"{result['crops_per_s']:.1f} crops/s",
            rounds=options.rounds,
        )
        print_ratios(runs, [("raydet", "script", 0.9)], "crops_per_s", "target at least")
        memory = _child("raydet", folder / "many", options.memory_images)
    summary = {name: sorted(one["crops_per_s"] for one in own) for name, own in runs.items()}
    print(json.dumps({"crops_per_s": summary, "memory": memory}))


def _write(folder: Path, name: str, num_images: int, num_detections: int) -> None:
    """Write an images table, which refers to files, a detections table, and the model."""
    from raydet.tables.schema import Category, build_schema
    from raydet.tables.table import TableWriter

    categories = (Category(0, "thing"),)
    files = folder / "files"
    if not files.exists():
        files.mkdir()
        for number, data in enumerate(jpegs(NUM_FILES)):
            (files / f"{number}.jpg").write_bytes(data)
        _write_model(folder / "model")
    rng = np.random.default_rng(0)
    images, found = (
        TableWriter(str(folder / name / kind), build_schema(kind, categories), config_hash="0" * 12)
        for kind in ("images", "detections")
    )
    nothing: dict[str, list[Any]] = {key: [] for key in ("id", "bbox", "category", "area", "iscrowd")}
    with images, found:
        for number in range(num_images):
            path = str(files / f"{number % NUM_FILES}.jpg")
            sizes = {"image_id": number, "width": 640, "height": 480}
            images.write_rows([{**sizes, "image": {"bytes": None, "path": path}, "objects": nothing}])
            corners, sides = rng.uniform(0, 300, (num_detections, 2)), rng.uniform(40, 170, (num_detections, 2))
            detections = {"bbox": np.concatenate([corners, sides], axis=1).tolist(), "score": [0.9] * num_detections}
            detections["category"] = [0] * num_detections
            found.write_rows([{**sizes, "path": path, "detections": detections, "error": None}])


def _write_model(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    layers = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    config = ViTConfig(**layers, image_size=SIDE, patch_size=16, id2label={index: str(index) for index in range(10)})  # type: ignore[arg-type]
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def _child(name: str, folder: Path, num_images: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, str(folder), str(num_images)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _raydet(folder: str, num_images: int) -> dict[str, Any]:
    import psutil

    from raydet.config import CropsConfig
    from raydet.second_looks import crops
    from raydet.second_looks.in_process import CropsHere

    marks: list[float] = []
    started: list[float] = []
    real = CropsHere.run

    def run(self: CropsHere, work: Any, chunks: Any) -> Any:
        started.append(time.perf_counter())
        for number, chunk in enumerate(real(self, work, chunks), start=1):
            if number * 4 // len(chunks) > len(marks):
                marks.append(psutil.Process().memory_full_info().pss / 1e6)
            yield chunk
        started.append(time.perf_counter())

    CropsHere.run = run  # type: ignore[method-assign]
    crops.MOST_IMAGES_IN_PROCESS = num_images
    config = CropsConfig(
        detections=f"{folder}/detections",
        data=f"{folder}/images",
        model=f"{Path(folder).parent}/model",
        task="image-classification",
        batch_size=BATCH_SIZE,
        out=f"{folder}/out-{os.getpid()}",
    )
    result = crops.crops(config)
    return {
        "crops_per_s": result.num_crops / (started[1] - started[0]),
        "num_crops": result.num_crops,
        "pss_mb": [round(mark) for mark in marks],
    }


def _script(folder: str) -> dict[str, Any]:
    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model: Any = AutoModelForImageClassification.from_pretrained(f"{Path(folder).parent}/model").eval()
    processor = AutoImageProcessor.from_pretrained(f"{Path(folder).parent}/model")
    rows = pq.read_table(f"{folder}/detections", columns=["path", "detections"]).to_pylist()

    def cut() -> Any:
        for row in rows:
            picture = Image.open(row["path"]).convert("RGB")
            for x, y, width, height in row["detections"]["bbox"]:
                yield picture.crop((int(x), int(y), int(np.ceil(x + width)), int(np.ceil(y + height))))

    answers = []
    started = time.perf_counter()
    crops = cut()
    with torch.inference_mode():
        while batch := list(itertools.islice(crops, BATCH_SIZE)):
            scores = model(**processor(images=batch, return_tensors="pt")).logits.softmax(-1)
            answers += scores.topk(5).indices.tolist()
    return {"crops_per_s": len(answers) / (time.perf_counter() - started)}


if __name__ == "__main__":
    main()
