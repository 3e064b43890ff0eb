"""Small data sets for the tests of `prepare`, and what they need to look at its tables."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raydet.tables import open_table


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


def rows_of(out: Path | str, kind: Any = "images") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = open_table(str(out), kind).read().to_pylist()
    return rows


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
