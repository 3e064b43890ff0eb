"""AP of published checkpoints on COCO val2017, beside the AP that was published.

    python benchmarks/published_checkpoints.py --annotations instances_val2017.json --images val2017
        [--models rt_detr_v2_r18 ...] [--published FILE] [--out FOLDER] [--batch-size 16] [--precision fp32]

The benchmark goes the way of a user: `prepare coco`, `predict` with a checkpoint from the Hub, `evaluate`. It needs a
network for the checkpoints, and the 5,000 images of val2017. The exit code is 1 if an AP differs from the published one
by more than 0.2 points. `--published` takes the checkpoints and their figures from a JSON file instead of the table
below, as {name: {"model": folder or Hub name, "ap": in percent, "source": text}}. With `--out` the tables are kept, and
an interrupted run resumes. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydet import EvaluateConfig, PredictConfig, PrepareCocoConfig, evaluate, predict, prepare_coco
from raydet.common.class_names import folded
from raydet.models.checkpoints import read_checkpoint
from raydet.tables.table import open_table

TOLERANCE = 0.2
"""Largest difference in points of AP."""
OTHER_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Names of classes of COCO in some checkpoints, which follow another list, and those in COCO's own files."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A checkpoint and its published AP.

    Attributes:
        model: Name on the Hub, or a local model folder.
        ap: AP on COCO val2017 in percent.
        source: Publication of the AP.
    """

    model: str
    ap: float
    source: str


CHECKPOINTS: Mapping[str, Published] = {
    # The repository names this checkpoint `rerun_48.1`; its first table has 47.9 for an earlier one.
    "rt_detr_v2_r18": Published(
        model="PekingU/rtdetr_v2_r18vd", ap=48.1, source="github.com/lyuwenyu/RT-DETR, README, 2024-08-22"
    ),
    "d_fine_s": Published(
        model="ustc-community/dfine-small-coco", ap=48.5, source="github.com/Peterande/D-FINE, README, model zoo"
    ),
    "detr_r50": Published(model="facebook/detr-resnet-50", ap=42.0, source="github.com/facebookresearch/detr, README"),
    "conditional_detr_r50": Published(
        model="microsoft/conditional-detr-resnet-50", ap=41.0, source="github.com/Atten4Vis/ConditionalDETR, README"
    ),
    "rf_detr_nano": Published(
        model="Roboflow/rf-detr-nano", ap=48.4, source="rfdetr.roboflow.com, benchmarks of the pretrained models"
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Prepare the images, score them with each checkpoint, compare, and return the exit code."""
    options = _parse(words)
    published = _read(options.published) if options.published else CHECKPOINTS
    unknown = sorted(set(options.models or ()) - published.keys())
    if unknown:
        sys.exit(f"--models: no published figures of {', '.join(unknown)}; known: {', '.join(published)}")
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        folder = options.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="raydet-benchmark-"))
        truth = str(Path(folder) / "val")
        prepare_coco(
            PrepareCocoConfig(
                annotations=options.annotations, images=options.images, out=truth, image_storage="reference"
            )
        )
        print(f"{'checkpoint':24}{'AP':>8}{'published':>11}{'difference':>12}  left out  source")
        for name in options.models or published:
            results[name] = _measure(options, published[name], truth, Path(folder) / name)
            _print(name, published[name], results[name])
    met = all(result["is_met"] for result in results.values())
    print(f"within {TOLERANCE} of what was published: {'all' if met else 'NOT ALL'}")
    print(json.dumps({"met": met, "tolerance": TOLERANCE, "checkpoints": results}))
    return 0 if met else 1


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True, help="instances_val2017.json")
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"by default all: {', '.join(CHECKPOINTS)}")
    parser.add_argument("--published", metavar="FILE", help="JSON file with other checkpoints and their figures")
    parser.add_argument("--out", help="folder for the tables, which is kept; a temporary one by default")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    return parser.parse_args(words)


def _read(file: str) -> dict[str, Published]:
    return {name: Published(**values) for name, values in json.loads(Path(file).read_text("utf-8")).items()}


def _measure(options: argparse.Namespace, published: Published, truth: str, folder: Path) -> dict[str, Any]:
    """Score the images with a checkpoint and measure its AP, in percent."""
    detections = str(folder)
    predict(
        PredictConfig(
            data=truth,
            checkpoint=published.model,
            out=detections,
            batch_size=options.batch_size,
            precision=options.precision,
        )
    )
    evaluation = evaluate(
        EvaluateConfig(truth=truth, detections=detections, class_mapping=_mapping(published.model, truth))
    )
    ap = 100 * (evaluation.result.AP or 0.0)
    return {
        "ap": round(ap, 3),
        "published": published.ap,
        "difference": round(ap - published.ap, 3),
        "is_met": abs(ap - published.ap) <= TOLERANCE,
        "images": evaluation.result.num_images,
        "detections": evaluation.result.num_detections,
        "detections_of_other_classes": evaluation.num_other_class,
    }


def _mapping(model: str, truth: str) -> dict[str, str]:
    """Return the classes of a checkpoint that have another name in the truth."""
    own = {folded(category.name) for category in read_checkpoint(model).categories}
    labelled = {folded(category.name) for category in open_table(truth, "images").categories}
    return {old: new for old, new in OTHER_NAMES.items() if old in own and {old, new} & labelled == {new}}


def _print(name: str, published: Published, result: Mapping[str, Any]) -> None:
    mark = "" if result["is_met"] else " MISSED"
    print(
        f"{name:24}{result['ap']:8.2f}{published.ap:11.1f}{result['difference']:+12.2f}"
        f"{result['detections_of_other_classes']:10,}  {published.source}{mark}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
