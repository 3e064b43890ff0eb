"""A small data set in COCO format, `images/` and `instances_{train,val}.json`: generated, or a part of a real one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.generated_jpegs import SIZE, jpegs
else:  # a script imports its neighbours without the package name
    from generated_jpegs import SIZE, jpegs

CLASSES = ("Platelets", "RBC", "WBC")
BOXES_PER_IMAGE = 13
"""About the mean of BCCD."""


def generate(folder: Path, num_images: Mapping[str, int]) -> None:
    """Write a data set like BCCD, of 640 × 480 JPEGs, but with random boxes.

    Args:
        folder: Folder to write to, which must exist.
        num_images: Number of images, by split.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    encoded = iter(enumerate(jpegs(sum(num_images.values()))))
    (folder / "images").mkdir()
    for split, number in num_images.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for _ in range(number):
            image_id, data = next(encoded)
            name = f"{image_id:06d}.jpg"
            (folder / "images" / name).write_bytes(data)
            images.append({"id": image_id, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
            for _ in range(BOXES_PER_IMAGE):
                width, height = (float(side) for side in rng.integers(30, 160, 2))
                left, top = float(rng.integers(SIZE[0] - int(width))), float(rng.integers(SIZE[1] - int(height)))
                box = {"bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
                category = int(rng.integers(len(CLASSES))) + 1
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, **box})
        categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))


def prepare_first(data: Path, folder: Path, num_images: Mapping[str, int]) -> None:
    """Write images tables of the first images of each split, named after the split.

    Args:
        data: Folder with `images/` and `instances_SPLIT.json`.
        folder: Folder to write to.
        num_images: Number of images, by split.
    """
    from raydet import PrepareCocoConfig, prepare_coco

    for split, number in num_images.items():
        content = json.loads((data / f"instances_{split}.json").read_bytes())
        content["images"] = content["images"][:number]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [item for item in content["annotations"] if item["image_id"] in kept]
        path = folder / f"{split}.json"
        path.write_text(json.dumps(content))
        prepare_coco(PrepareCocoConfig(images=str(data / "images"), annotations=str(path), out=str(folder / split)))
