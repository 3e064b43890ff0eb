"""Share of altered copies of real images that `select --near-duplicates` finds, and other images that it takes for one.

    python benchmarks/near_duplicates.py [--limits 0.9 0.95 0.98] [--quick]

Each image of three sets in `RAYDET_TEST_DATA` (COCO, blood cells, raccoons) gets one altered copy per alteration.
`predict --keep thumbnail` scores them with random weights, and `select --near-duplicates` compares all of them. For
each limit of similarity the benchmark prints the share of copies that are found to be those of their original, the
number of images that are taken for a copy of another one, and the originals that are alike: some sets contain a picture
twice. The last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from raydet import PredictConfig, SelectConfig, predict, select
from raydet.models.loading import build_detector
from raydet.tables.schema import Category
from raydet.tables.table import open_table

SETS = {"coco": "coco_mini/val", "bccd": "bccd/images", "raccoon": "raccoon/images"}
JPEG_QUALITY = 60
ALTERATIONS: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "saved again": lambda image: image,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brightness × 0.7": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "contrast × 1.4": lambda image: ImageEnhance.Contrast(image).enhance(1.4),
    "colour × 0.5": lambda image: ImageEnhance.Color(image).enhance(0.5),
    "cropped by 2 %": lambda image: _cropped(image, 0.02),
    "cropped by 5 %": lambda image: _cropped(image, 0.05),
}
"""By name; every copy is saved as a JPEG of quality 60."""


def main() -> None:
    """Write the copies of each set, look for near-duplicates with every limit, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", type=float, nargs="+", default=[0.9, 0.95, 0.98], help="least similarities")
    parser.add_argument("--quick", action="store_true", help="ten images of each set")
    options = parser.parse_args()
    data = Path(os.environ.get("RAYDET_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    summary: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-") as name:
        checkpoint = str(Path(name, "checkpoint"))
        build_detector("rt_detr_v2_small", (Category(0, "thing"),), image_size=96, seed=0).save(checkpoint)
        for own, place in SETS.items():
            folder = Path(name, own)
            originals = sorted((data / place).glob("*.jpg"))[: 10 if options.quick else None]
            _write_copies(originals, folder / "images")
            scored = str(folder / "scored")
            predict(
                PredictConfig(
                    checkpoint=checkpoint,
                    data=str(folder / "images"),
                    out=scored,
                    keep=["thumbnail"],
                    score_threshold=0.5,
                )
            )
            for limit in options.limits:
                shares = _found(scored, limit, str(folder / f"duplicates-{limit}"), [path.stem for path in originals])
                summary.setdefault(own, {})[str(limit)] = shares
                print(f"{own}, {len(originals)} images, {limit}: {shares}", flush=True)
    print(json.dumps(summary))


def _write_copies(originals: list[Path], folder: Path) -> None:
    """Write the originals, whose names begin with 0 so that they come first, and their copies."""
    folder.mkdir(parents=True)
    for path in originals:
        (folder / f"0 {path.stem}.jpg").write_bytes(path.read_bytes())
        with Image.open(path) as image:
            picture = image.convert("RGB")
        for number, alter in enumerate(ALTERATIONS.values()):
            alter(picture).save(folder / f"{number + 1} {path.stem}.jpg", quality=JPEG_QUALITY)


def _cropped(image: Image.Image, share: float) -> Image.Image:
    """Cut a share of the sides off each edge."""
    width, height = round(share * image.width), round(share * image.height)
    return image.crop((width, height, image.width - width, image.height - height))


def _found(scored: str, limit: float, out: str, names: list[str]) -> dict[str, float]:
    """Return the share of copies found by alteration, and the numbers of alike originals and of wrong copies."""
    result = select(SelectConfig(detections=scored, near_duplicates=True, min_similarity=limit, out=out))
    paths = open_table(scored, "detections").read(["image_id", "path"])
    stems = {row["image_id"]: Path(row["path"]).stem for row in paths.to_pylist()}
    duplicates = open_table(result.table, "near_duplicates").read(["image_id", "duplicate_of"]).to_pylist()
    of = {stems[row["image_id"]]: stems[row["duplicate_of"]] for row in duplicates}
    same = {name: of.get(f"0 {name}", f"0 {name}") for name in names}
    shares = {}
    for number, alteration in enumerate(ALTERATIONS):
        hits = [of.get(f"{number + 1} {name}") == same[name] for name in names]
        shares[alteration] = round(float(np.mean(hits)), 4)
    wrong = [copy for copy, found in of.items() if same[copy[2:]] != same[found[2:]]]
    pairs = [f"{name} = {original[2:]}" for name, original in same.items() if original[2:] != name]
    if pairs:
        print(f"originals that are alike: {', '.join(pairs)}")
    return {**shares, "originals alike": len(pairs), "copies of another": len(wrong)}


if __name__ == "__main__":
    main()
