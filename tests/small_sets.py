"""Small data sets for tests, and helpers that read tables."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raydet.preparation.sources.shapes import CATEGORIES, encode
from raydet.tables.schema import build_schema
from raydet.tables.table import TableWriter, open_table

QUICK_RECIPE: dict[str, Any] = {
    "recipe": "none",
    "batch_size": 16,
    "learning_rate": 1e-3,
    "backbone_learning_rate": 1e-3,
    "warmup_steps": 50,
    "augmentation": "flip",
    "ema_decay": 0.99,
    "validate_batch_size": 32,
    "log_images": 0,
}
"""Training options with which a small model learns drawn shapes within a few epochs."""


def tiny_training(data: Path | str, **options: Any) -> dict[str, Any]:
    """Return options of a training run that takes seconds and, repeated, gives the same weights.

    Args:
        data: Folder of the images tables `train` and `val`.
        options: Further or other options.
    """
    return {
        "train_data": f"{data}/train",
        "val_data": f"{data}/val",
        "recipe": "none",
        "model": "rt_detr_v2_tiny",
        "image_size": 64,
        "batch_size": 4,
        "augmentation": "flip",
        "threads_per_worker": 1,
        "log_images": 0,
        **options,
    }


def save_image(path: Path, size: tuple[int, int] = (40, 30), orientation: int = 1, seed: int = 0) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)


def save_coco(folder: Path, images: list[Any], annotations: list[Any], categories: tuple[int, ...] = (5,)) -> str:
    named = [{"id": number, "name": "cell" if number == 5 else f"class {number}"} for number in categories]
    content = {"images": images, "annotations": annotations, "categories": named}
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return str(path)


def annotation(annotation_id: int, bbox: list[float], image_id: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": image_id, "category_id": 5, "bbox": bbox, **more}


def write_drawn(uri: Path, pictures: Iterable[tuple[np.ndarray, list[list[float]], Sequence[int]]]) -> str:
    """Write an images table of drawn shapes and return its URI.

    Args:
        uri: Folder of the table.
        pictures: Per image, its pixels, uint8 [H, W, 3], its boxes (x, y, width, height) and its categories.
    """
    with TableWriter(str(uri), build_schema("images", CATEGORIES), config_hash="0" * 12) as writer:
        for number, (pixels, boxes, categories) in enumerate(pictures):
            objects = {
                "id": list(range(1, len(boxes) + 1)),
                "bbox": boxes,
                "category": list(categories),
                "area": [box[2] * box[3] for box in boxes],
                "iscrowd": [False] * len(boxes),
            }
            image = {"bytes": encode(pixels), "path": f"{number:05d}.jpg"}
            height, width = pixels.shape[:2]
            row = {"image_id": number, "image": image, "width": width, "height": height, "objects": objects}
            writer.write_rows([row])
    return str(uri)


def rows_of(out: Path | str, kind: Any = "images") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = open_table(str(out), kind).read().to_pylist()
    return rows


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
