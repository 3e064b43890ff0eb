"""Boxes of a checkpoint whose classes have all been renamed, before any training.

    python benchmarks/new_classes.py --run runs/demo [--images 24] [--seeds 10]

A pretrained decoder refines the proposals that the encoder's score head picks. If that head starts anew, the decoder
gets random cells of the image, and what it has learnt about boxes is out of reach. The benchmark takes the checkpoint
and the validation images of a finished `raydet demo` (or any folder with `checkpoint` and `data/val` of an RT-DETR),
gives the model classes of other names, and measures how many labelled boxes it still covers: `proposals` is the recall
of the encoder's proposals at IoU 0.5, `boxes` that of the final boxes at IoU 0.75, whatever their class. `anew` draws
the score head of the encoder at random, as the heads of the decoder are. The last line is one JSON object.
"""

import argparse
import io
import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from raydet.models.collate import Example, collate
from raydet.models.detector import Detector
from raydet.models.geometry import resize
from raydet.models.loading import build_detector, load_detector
from raydet.tables import storage
from raydet.tables.schema import Category
from raydet.tables.table import open_table

TARGETS = {"proposals": 0.98, "boxes": 0.95}


def main() -> None:
    """Measure the checkpoint and its renamed versions, and print their recalls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder with `checkpoint` and `data/val`")
    parser.add_argument("--images", type=int, default=24, help="validation images")
    parser.add_argument("--seeds", type=int, default=10, help="seeds of the weights that start anew")
    options = parser.parse_args()
    checkpoint = storage.join(options.run, "checkpoint")
    detector = load_detector(checkpoint)
    examples = _examples(storage.join(options.run, "data", "val"), detector, options.images)
    renamed = [Category(index, f"renamed {index}") for index in range(len(detector.categories))]
    results: dict[str, list[dict[str, float]]] = {"checkpoint": [_recalls(detector, examples)], "kept": [], "anew": []}
    for seed in range(options.seeds):
        kept = build_detector(checkpoint, renamed, image_size=None, seed=seed)
        results["kept"].append(_recalls(kept, examples))
        results["anew"].append(_recalls(_with_random_score_head(kept, seed), examples))
    medians = {
        name: {kind: statistics.median(one[kind] for one in each) for kind in TARGETS} for name, each in results.items()
    }
    print(f"{'':12}{'proposals@.5':>14}{'boxes@.75':>12}")
    for name, values in medians.items():
        print(f"{name:12}{values['proposals']:14.3f}{values['boxes']:12.3f}")
    is_met = all(medians["kept"][kind] >= target for kind, target in TARGETS.items())
    print(f"targets {TARGETS}: {'met' if is_met else 'MISSED'}")
    print(json.dumps({"medians": medians, "targets": TARGETS, "met": is_met}))


def _examples(uri: str, detector: Detector, num_images: int) -> list[Example]:
    """Read the first images of a table that have boxes, resized for the model."""
    rule = detector.resize_rule
    found: list[Example] = []
    for row in open_table(uri, "images").read().to_pylist():
        image = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
        boxes = np.array(row["objects"]["bbox"], np.float32).reshape(-1, 4)
        if not len(boxes) or len(found) == num_images:
            continue
        height, width = image.shape[:2]
        boxes[:, :2] += boxes[:, 2:] / 2
        boxes /= np.array([width, height] * 2, np.float32)
        resized = resize(image, rule.target_size_hw((height, width)), rule.resample)
        found.append(Example(row["image_id"], resized, (height, width), boxes, np.array(row["objects"]["category"])))
    return found


@torch.inference_mode()
def _recalls(detector: Detector, examples: Sequence[Example]) -> dict[str, float]:
    detector.model.eval()
    batch = collate(examples)
    outputs: Any = detector.model(**detector.model_inputs(batch))
    truths = [label["boxes"] for label in batch.labels]
    return {
        "proposals": _recall(outputs.enc_topk_bboxes, truths, 0.5),
        "boxes": _recall(outputs.pred_boxes, truths, 0.75),
    }


def _recall(boxes_cxcywh: Tensor, truths: Sequence[Tensor], iou: float) -> float:
    """Return the fraction of the true boxes that any box of their image overlaps at least this much."""
    covered = [
        box_iou(box_convert(truth, "cxcywh", "xyxy"), box_convert(boxes, "cxcywh", "xyxy")).amax(1) >= iou
        for boxes, truth in zip(boxes_cxcywh, truths, strict=True)
    ]
    return float(torch.cat(covered).double().mean())


def _with_random_score_head(detector: Detector, seed: int) -> Detector:
    head: Any = detector.model.get_submodule("model.enc_score_head")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        torch.nn.init.xavier_uniform_(head.weight)
    return detector


if __name__ == "__main__":
    main()
