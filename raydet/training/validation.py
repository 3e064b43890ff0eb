"""Validation inside training: exact COCO numbers over every validation image once, on any number of workers."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from raydet.common.boxes import Boxes, as_boxes
from raydet.images.drawing import draw_comparison
from raydet.measuring.numbers.accumulator import NO_DETECTIONS, CocoAccumulator, ImageDetections
from raydet.measuring.numbers.metrics import CocoResult
from raydet.models.collate import collate
from raydet.models.detector import Detections
from raydet.models.step import autocast
from raydet.tables.schema import Category
from raydet.training.ordering import RunPlan
from raydet.training.stream import ReadyImage
from raydet.training.worker import Stream, Worker, examples_of, next_images

Picture = npt.NDArray[np.uint8]


def validate(
    worker: Worker, plan: RunPlan, stream: Stream, categories: tuple[Category, ...], epoch: int
) -> dict[str, Any]:
    """Runs the model as it is now over this worker's part and puts all parts together.

    Returns:
        COCO's twelve numbers, AP by class, seconds; the same on every rank.
    """
    started = time.perf_counter()
    accumulator = CocoAccumulator(categories)
    pictures: dict[str, Picture] = {}
    worker.detector.model.eval()
    for number in range(plan.validation_rounds(worker.world_size)):
        images = next_images(stream, "validate", epoch, number, 0, worker.rank)
        found = _detect(worker, images)
        for image in images:
            accumulator.add(
                image.image_id,
                image.truth(),
                _as_found(found.get(image.image_id)),
                unreadable=image.error is not None,
            )
            if worker.rank == 0 and image.image_id in found and len(pictures) < worker.config.log_images:
                picture = _picture(image, found[image.image_id], categories)
                pictures[f"validation/{image.image_id}"] = picture
    if worker.tracker is not None and pictures:
        worker.tracker.images((epoch + 1) * plan.steps_per_epoch, pictures)
    shards = worker.gather(accumulator.to_bytes())
    numbers: dict[str, Any] | None = None
    if shards is not None:
        merged = CocoAccumulator(categories)
        for shard in shards:
            merged.merge(shard)
        numbers = _numbers(merged.result())
    return {**worker.share(numbers), "validation_s": time.perf_counter() - started}


def _detect(worker: Worker, images: list[ReadyImage]) -> dict[int, Detections]:
    examples = examples_of(images)
    if not examples:
        return {}
    batch = collate(examples, pad_to_hw=worker.detector.resize_rule.pad_to_hw).to(worker.setting.device)
    with autocast(worker.setting):
        detections = worker.detector.predict(batch)
    return dict(zip(batch.image_ids, detections, strict=True))


def _as_found(detected: Detections | None) -> ImageDetections:
    if detected is None:
        return NO_DETECTIONS
    return ImageDetections(detected.boxes_xywh, detected.scores, detected.categories)


def _picture(image: ReadyImage, detected: Detections, categories: tuple[Category, ...]) -> Picture:
    """Truth and predictions side by side, at the size that the model sees."""
    assert image.image is not None
    scale_hw = np.array(image.image.shape[:2]) / np.array(image.original_size_hw)
    truth = image.truth()

    def scaled(boxes_xywh: Boxes) -> Boxes:
        return as_boxes(boxes_xywh * np.array([scale_hw[1], scale_hw[0]] * 2))

    return draw_comparison(
        image.image,
        scaled(truth.boxes_xywh),
        truth.category,
        scaled(detected.boxes_xywh),
        detected.categories,
        detected.scores,
        [category.name for category in categories],
    )


def _numbers(result: CocoResult) -> dict[str, Any]:
    """What the history keeps of a validation; null where there is nothing to measure."""
    by_class = {
        category.name: numbers.AP for category, numbers in zip(result.categories, result.per_class, strict=True)
    }
    return {
        **result.values,
        "AP_by_class": by_class,
        "validation_unreadable": result.num_unreadable,
    }
