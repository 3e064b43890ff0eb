"""Small sets to look through: images with labels and cameras, detections of two runs, and their metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raydet.config import EvaluateConfig
from raydet.measuring.evaluate import evaluate
from raydet.preparation.sources.shapes import encode
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table

EVIL = "</script><img src=x onerror=alert(1)>"
NAMES = ("cat", EVIL, "R&D <b>bold</b>", "'; DROP TABLE boxes; --")
EVIL_PATHS = (
    '"><svg onload=alert(1)>.png',
    "../../etc/passwd",
    "a'b\"c`${alert(1)}.png",
    "line\nbreak.png",
)
CAMERAS = ("front", "<i>rear</i>")
SIZE_WH = (96, 72)


def write_images(folder: Path, num_images: int, *, names: Sequence[str] = NAMES, seed: int = 0) -> str:
    """Write an images table with 0 to 4 boxes an image and a column `camera`; the first paths are hostile."""
    random = np.random.default_rng(seed)
    categories = [Category(number + 1, name) for number, name in enumerate(names)]
    schema = build_schema("images", categories, extra_fields=[pa.field("camera", pa.string())])
    with TableWriter(str(folder), schema, config_hash="x") as writer:
        for number in range(num_images):
            boxes, kinds = _some_boxes(random, int(random.integers(0, 5)), len(names))
            pixels = np.full((SIZE_WH[1], SIZE_WH[0], 3), 40 + number % 150, np.uint8)
            for (x, y, width, height), kind in zip(boxes, kinds, strict=True):
                colour = [(200, 80, 60), (70, 160, 90), (80, 110, 210), (210, 190, 80)][kind % 4]
                pixels[int(y) : int(y + height), int(x) : int(x + width)] = colour
            objects = {
                "id": list(range(1, len(boxes) + 1)),
                "bbox": boxes,
                "category": kinds,
                "area": [width * height for _, _, width, height in boxes],
                "iscrowd": [random.random() < 0.05 for _ in boxes],
            }
            path = EVIL_PATHS[number] if number < len(EVIL_PATHS) else f"folder/picture {number:04d}.png"
            data = b"no picture" if number == 5 else encode(pixels)
            row: dict[str, Any] = {"image_id": 10 * number, "image": {"bytes": data, "path": path}, "objects": objects}
            row |= {"width": SIZE_WH[0], "height": SIZE_WH[1], "camera": CAMERAS[number % 2]}
            writer.write_rows([row])
    return str(folder)


def _some_boxes(random: np.random.Generator, number: int, num_classes: int) -> tuple[list[list[float]], list[int]]:
    places = [[float(random.integers(0, 60)), float(random.integers(0, 40))] for _ in range(number)]
    sizes = [[float(random.integers(8, 36)), float(random.integers(8, 32))] for _ in range(number)]
    return [place + size for place, size in zip(places, sizes, strict=True)], random.integers(
        0, num_classes, number
    ).tolist()


def write_detections(folder: Path, images: str, *, seed: int = 1) -> str:
    """Write detections of most labels, with shifts, wrong classes and false positives; image 50 was not readable."""
    random = np.random.default_rng(seed)
    table = open_table(images, "images")
    num_classes = len(table.categories)
    with TableWriter(str(folder), build_schema("detections", table.categories), config_hash="x") as writer:
        for row in table.read(["image_id", "image", "width", "height", "objects"]).to_pylist():
            found = []
            for box, kind in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True):
                if random.random() < 0.85:
                    shift = random.normal(0, 2, 4).tolist()
                    own = [side + move for side, move in zip(box, shift, strict=True)]
                    is_right = random.random() < 0.85
                    found.append((own, 0.3 + 0.7 * random.random(), kind if is_right else (kind + 1) % num_classes))
            boxes, kinds = _some_boxes(random, int(random.integers(0, 3)), num_classes)
            found += [(box, 0.6 * random.random(), kind) for box, kind in zip(boxes, kinds, strict=True)]
            found = [] if row["image_id"] == 50 else sorted(found, key=lambda one: -one[1])
            place = {name: row[name] for name in ("image_id", "width", "height")}
            lists = {
                "bbox": [box for box, _, _ in found],
                "score": [score for _, score, _ in found],
                "category": [kind for _, _, kind in found],
            }
            error = "no image" if row["image_id"] == 50 else None
            writer.write_rows([{**place, "path": row["image"]["path"], "detections": lists, "error": error}])
    return str(folder)


def write_metrics(folder: Path, images: str, detections: Sequence[str]) -> str:
    """Evaluate detections, and return the metrics folder; each run has the name of its detections' folder."""
    for uri in detections:
        config = EvaluateConfig(truth=images, detections=uri, out=str(folder), bootstrap=0, model=Path(uri).name)
        evaluate(config)
    return str(folder)


def write_two_runs(folder: Path, num_images: int) -> Path:
    """Write the tables `images`, `a` and `b`, the detections of two runs, and their `metrics`; return the folder."""
    images = write_images(folder / "images", num_images)
    found = [write_detections(folder / name, images, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    write_metrics(folder / "metrics", images, found)
    return folder
