"""Measured truth and detections → the same numbers computed by pycocotools, compared bit by bit."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from raydet.common.console import aligned
from raydet.measuring.detections import Scored
from raydet.measuring.numbers.matches import Matches, take_images
from raydet.measuring.numbers.metrics import METRICS, CocoResult, accumulate
from raydet.tables.columns import (
    DetectionColumns,
    TruthColumns,
    image_places,
    in_unlabelled_class,
    take_detections,
    take_truth,
)
from raydet.tables.schema import Category

_FAR = 1e6
"""Pixels; all boxes lie nearer to the corner of their image."""
_MAX_IMAGES = 5_000
_MAX_BOXES = 600_000
"""Labelled boxes and detections together; pycocotools takes about a minute and 3 GB for that many."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Numbers of raydet and of pycocotools over the same images.

    Attributes:
        num_images: Number of images compared.
        num_measured: Number of images of the evaluation; if it is larger, the compared ones are a random sample.
        numbers: raydet's and pycocotools' value by metric, in COCO's order; None if undefined.
    """

    num_images: int
    num_measured: int
    numbers: dict[str, tuple[float | None, float | None]]
    version: str

    @property
    def differing(self) -> tuple[str, ...]:
        """Metrics that differ in any bit."""
        return tuple(name for name, (ours, theirs) in self.numbers.items() if ours != theirs)

    @property
    def outcome(self) -> str:
        """The result in one line."""
        over = f"all {self.num_images:,} images"
        if self.num_images < self.num_measured:
            over = f"a random sample of {self.num_images:,} of {self.num_measured:,} images"
        if self.differing:
            return f"NOT VERIFIED: pycocotools {self.version} differs in {', '.join(self.differing)}, over {over}"
        return f"verified: equal to pycocotools {self.version} to the last bit, over {over}"

    def lines(self) -> list[str]:
        """Return the numbers side by side with all digits, and the outcome."""
        rows = [("", "raydet", "pycocotools", "")]
        for name, pair in self.numbers.items():
            ours, theirs = ("–" if value is None else repr(value) for value in pair)
            rows.append((name, ours, theirs, "differs" if name in self.differing else "equal"))
        return [*aligned(rows), self.outcome]


def verify(
    scored: Scored, matches: Matches, result: CocoResult, categories: Sequence[Category], *, seed: int
) -> Verification:
    """Run pycocotools on the measured boxes and compare its twelve numbers; large data are sampled by image.

    `matches` are those of `scored` by COCO's own rules, and `result` their numbers.
    """
    num_measured = len(scored.truth_rows)
    num_boxes = len(scored.truth_columns.category) + len(scored.columns.category)
    num_images = min(num_measured, _MAX_IMAGES, max(1, _MAX_BOXES * num_measured // max(num_boxes, 1)))
    chosen = np.arange(num_measured)
    if num_images < num_measured:
        chosen = np.sort(np.random.default_rng(seed).choice(num_measured, num_images, replace=False))
        result = accumulate(take_images(matches, np.isin(np.arange(num_measured), chosen)), categories)
    truth, found = take_truth(scored.truth_columns, chosen), take_detections(scored.columns, chosen)
    theirs = numbers_of_pycocotools(truth, found, categories)
    return Verification(
        num_images=num_images,
        num_measured=num_measured,
        numbers={
            metric.name: (result.values[metric.name], None if value == -1 else value)
            for metric, value in zip(METRICS, theirs, strict=True)
        },
        version=version("pycocotools"),
    )


def numbers_of_pycocotools(truth: TruthColumns, found: DetectionColumns, categories: Sequence[Category]) -> list[float]:
    """Return pycocotools' twelve numbers in COCO's order, -1 for undefined ones.

    pycocotools knows no classes that an image is not labelled for. A crowd that covers the image and all around it has
    the same effect: detections of its class that no box matches do not count.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # Only the order of the ids matters; those of a table need not be unique.
    by_id = sorted(range(len(categories)), key=lambda index: categories[index].id)
    ids = np.argsort(by_id) + 1
    image_ids = truth.image_ids
    labelled = {
        "image_id": np.repeat(image_ids, np.diff(truth.starts)),
        "category_id": ids[truth.category],
        "bbox": truth.boxes_xywh,
        "area": truth.area,
        "iscrowd": truth.iscrowd.astype(np.int64),
    }
    unlabelled = in_unlabelled_class(truth, found)
    if unlabelled is not None:
        keys = np.stack([image_places(found), found.category], axis=1)
        crowds = np.unique(keys[unlabelled], axis=0)
        num = len(crowds)
        everywhere = {
            "image_id": image_ids[crowds[:, 0]],
            "category_id": ids[crowds[:, 1]],
            "bbox": np.tile([-_FAR, -_FAR, 2 * _FAR, 2 * _FAR], (num, 1)),
            "area": np.full(num, 4 * _FAR**2),
            "iscrowd": np.ones(num, np.int64),
        }
        labelled = {name: np.concatenate([values, everywhere[name]]) for name, values in labelled.items()}
    detected = {
        "image_id": np.repeat(image_ids, np.diff(found.starts)),
        "category_id": ids[found.category],
        "bbox": found.boxes_xywh,
        "area": found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3],
        "score": found.scores,
    }
    sides = []
    with contextlib.redirect_stdout(io.StringIO()):
        for columns in (labelled, detected):
            side = COCO()
            side.dataset = {
                "images": [{"id": image_id} for image_id in image_ids.tolist()],
                "categories": [{"id": number} for number in sorted(ids.tolist())],
                "annotations": _rows(columns),
            }
            side.createIndex()
            sides.append(side)
        evaluator = COCOeval(*sides, iouType="bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats: list[float] = evaluator.stats.tolist()
    return stats


def _rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return columns as annotations, numbered from 1: pycocotools takes 0 for "not matched"."""
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{"id": number, **dict(zip(columns, row, strict=True))} for number, row in enumerate(values, 1)]
