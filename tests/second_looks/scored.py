"""Images with detections, and their crops cut by hand."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raydet import CropsConfig
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter
from tests.small_sets import rows_of, write_drawn

CATEGORIES = (Category(3, "cat"), Category(7, "dog"))
NUM_IMAGES = 7
SIZE_HW = (48, 64)
UNREADABLE = 4


def boxes_of(number: int) -> list[list[float]]:
    """Boxes in an image: none in the third, one that is too small in the sixth, and the same in every seventh."""
    number %= NUM_IMAGES
    boxes = [[4.0 + number, 3.5, 20.25, 17.0], [30.0, 10.0, 25.5, 30.0], [50.0, 30.0, 30.0, 40.0], [1.0, 1.0, 9.0, 9.0]]
    if number == 5:
        boxes[1] = [20.0, 20.0, 1.0, 30.0]
    return [] if number == 2 else boxes


def write_scored(folder: Path, num_images: int = NUM_IMAGES) -> Path:
    """Write the images table `images` and the detections table `found`, whose fourth detections have low scores."""
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8) for _ in range(num_images)]
    write_drawn(folder / "images", [(pixels, [], []) for pixels in pictures])
    with TableWriter(str(folder / "found"), build_schema("detections", CATEGORIES), config_hash="0" * 12) as writer:
        for number in range(num_images):
            boxes = boxes_of(number)
            scores = [0.9, 0.8, 0.5, 0.1][: len(boxes)]
            detections = {"bbox": boxes, "score": scores, "category": [0, 1, 1, 0][: len(boxes)]}
            row = {"image_id": number, "path": f"{number:05d}.jpg", "width": SIZE_HW[1], "height": SIZE_HW[0]}
            writer.write_rows([{**row, "detections": detections, "error": None}])
    return folder


def config_of(data: Path, out: Path, model: str, task: Any, **options: Any) -> CropsConfig:
    return CropsConfig(
        detections=str(data / "found"), data=str(data / "images"), model=model, task=task, out=str(out), **options
    )


def crops_by_hand(data: Path, margin: float = 0.0) -> list[tuple[int, int, Image.Image | None]]:
    """Image, detection and pixels of all crops with a score of at least 0.3; None for those that are too small."""
    result = []
    for row in rows_of(data / "images"):
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        for place, (x, y, width, height) in enumerate(boxes_of(row["image_id"])[:3]):
            left, top = int(np.floor(max(0, x - margin * width))), int(np.floor(max(0, y - margin * height)))
            right = int(np.ceil(min(SIZE_HW[1], x + width + margin * width)))
            bottom = int(np.ceil(min(SIZE_HW[0], y + height + margin * height)))
            crop = picture.crop((left, top, right, bottom)) if min(right - left, bottom - top) >= 4 else None
            result.append((row["image_id"], place, crop))
    return result


def assert_rows(rows: Sequence[dict[str, Any]], expected: Sequence[tuple[int, int, Image.Image | None]]) -> None:
    assert [(row["image_id"], row["detection"]) for row in rows] == [(image, place) for image, place, _ in expected]
    for row, (image, place, crop) in zip(rows, expected, strict=True):
        assert row["bbox"] == boxes_of(image)[place] and row["category"] == ("cat", "dog", "dog")[place]
        assert row["score"] == (0.9, 0.8, 0.5)[place] and row["path"] == f"{image:05d}.jpg"
        assert (row["error"] is None) == (crop is not None)
