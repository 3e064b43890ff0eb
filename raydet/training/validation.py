"""Validation during training: exact COCO numbers, counting each image once, on any number of workers."""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raydet.common.boxes import Boxes, as_boxes, xywh_to_normalised_cxcywh
from raydet.engines.detector_engine import DetectorEngine, EngineBatch
from raydet.images.drawing import draw_comparison
from raydet.measuring.numbers.accumulator import NO_DETECTIONS, CocoAccumulator, ImageDetections, ImageTruth
from raydet.measuring.numbers.metrics import CocoResult
from raydet.models.collate import LABELLED, Example
from raydet.models.detector import Detections, Detector
from raydet.models.losses.final_boxes import FinalLoss, mean_loss
from raydet.tables.schema import Category
from raydet.training.crew import Crew
from raydet.training.feeding.batches import BatchReader, ReadyBatch
from raydet.training.feeding.ordering import RunPlan
from raydet.training.history import ValidationRecord
from raydet.training.progress import WorkerProgress
from raydet.training.tracking.trackers import RunTracker

if TYPE_CHECKING:
    from raydet.training.trainer import Trainer

RgbImage = npt.NDArray[np.uint8]


def validate(
    trainer: "Trainer",
    crew: Crew,
    plan: RunPlan,
    reader: BatchReader,
    *,
    tracker: RunTracker | None,
    progress: Callable[[float], WorkerProgress],
) -> ValidationRecord | None:
    """Run the current model over every validation image. Collective: every rank must call it.

    Args:
        trainer: Trainer whose model runs in the same way as a checkpoint in `predict`.
        crew: Communication with the other workers.
        plan: Plan of the run.
        reader: Reader positioned at the first batch of the validation.
        tracker: Tracker that receives the first images, drawn; None on all ranks but 0.
        progress: Returns the progress to show for a completed share of the validation.

    Returns:
        The results, the same on every rank; None if the command asked to stop.
    """
    started, epoch = time.perf_counter(), trainer.position.epoch
    categories = trainer.detector.categories
    engine, accumulator, is_to_stop = trainer.engine(), CocoAccumulator(categories), False
    trainer.detector.model.eval()  # once, not for every batch; the next epoch begins in training mode
    loss = FinalLoss() if trainer.config.metric_for_best_model == "loss" else None
    drawn: dict[str, RgbImage] = {}
    num_drawn = 0 if tracker is None else trainer.config.log_images
    num_rounds = plan.validation_rounds(crew.world_size)
    for number in range(num_rounds):
        is_to_stop = crew.is_asked_to_stop(partial(progress, number / num_rounds) if crew.rank == 0 else None)
        if is_to_stop:  # other ranks either see the request too or finish their part
            break
        batch = reader.take("validate", epoch, number, 0)
        found = detect(engine, batch, observe=None if loss is None else _adding_to(loss, trainer.detector, batch))
        for image_id, truth in batch.truths.items():
            detections = _as_found(found.get(image_id))
            accumulator.add(image_id, truth, detections, unreadable=image_id in batch.unreadable)
        for example in batch.examples[: max(0, num_drawn - len(drawn))]:
            image_id = example.image_id
            tag = f"validation/{image_id}"
            drawn[tag] = _comparison(example, batch.truths[image_id], found[image_id], categories)
    shards = crew.gather((is_to_stop, b"" if is_to_stop else accumulator.to_bytes(), loss))
    record = None
    if shards is not None and not any(was_cut for was_cut, _, _ in shards):
        merged = CocoAccumulator(categories)
        for _, shard, _ in shards:
            merged.merge(shard)
        total = None if loss is None else mean_loss(trainer.detector, [part for _, _, part in shards])
        record = _record(merged.result(), loss=total, seconds=time.perf_counter() - started)
    if tracker is not None and drawn and record is not None:
        tracker.images((epoch + 1) * plan.steps_per_epoch, drawn)
    shared: ValidationRecord | None = crew.share(record)
    return shared


def detect(
    engine: DetectorEngine,
    batch: ReadyBatch,
    *,
    observe: Callable[[EngineBatch, Tensor, Tensor], None] | None = None,
) -> dict[int, Detections]:
    """Detect objects in the readable images of a batch; return the detections by image id."""
    found = engine.start(engine.prepare_resized(batch.examples), observe=observe)()
    return dict(zip(batch.batch.image_ids, map(_finite, found), strict=True))


def _finite(found: Detections) -> Detections:
    """Leave out boxes that are not finite, as ruined weights give; the engine leaves out such scores."""
    kept = np.isfinite(found.boxes_xywh).all(axis=1)
    return found if kept.all() else Detections(found.boxes_xywh[kept], found.scores[kept], found.categories[kept])


def _adding_to(loss: FinalLoss, detector: Detector, batch: ReadyBatch) -> Callable[[EngineBatch, Tensor, Tensor], None]:
    """Return a function that adds the loss of a part of this batch, against the truth without what is unknown."""

    def add(part: EngineBatch, logits: Tensor, boxes_cxcywh: Tensor) -> None:
        labels = []
        for place in part.places:
            truth = batch.truths[batch.batch.image_ids[place]]
            kept = ~truth.iscrowd
            label = {}
            if truth.labelled is not None:
                kept &= np.isin(truth.category, truth.labelled)
                label = {LABELLED: torch.from_numpy(truth.labelled)}
            boxes = xywh_to_normalised_cxcywh(truth.boxes_xywh, batch.batch.original_sizes_hw[place])[kept]
            label |= {
                "class_labels": torch.from_numpy(truth.category[kept]).to(logits.device),
                "boxes": torch.from_numpy(boxes).float().to(logits.device),
            }
            labels.append(label)
        loss.add(detector, logits, boxes_cxcywh, labels)

    return add


def _as_found(detected: Detections | None) -> ImageDetections:
    if detected is None:
        return NO_DETECTIONS
    return ImageDetections(detected.boxes_xywh, detected.scores, detected.categories)


def _comparison(example: Example, truth: ImageTruth, found: Detections, categories: tuple[Category, ...]) -> RgbImage:
    """Draw ground truth and predictions side by side, at the size of the model's input."""
    scale_hw = np.array(example.image.shape[:2]) / np.array(example.original_size_hw)

    def scaled(boxes_xywh: Boxes) -> Boxes:
        return as_boxes(boxes_xywh * np.array([scale_hw[1], scale_hw[0]] * 2))

    return draw_comparison(
        example.image,
        scaled(truth.boxes_xywh),
        truth.category,
        scaled(found.boxes_xywh),
        found.categories,
        found.scores,
        [category.name for category in categories],
    )


def _record(result: CocoResult, *, loss: float | None, seconds: float) -> ValidationRecord:
    """Make the record of a validation for the history."""
    return ValidationRecord(
        numbers=result.values,
        ap_by_class={
            category.name: numbers.AP for category, numbers in zip(result.categories, result.per_class, strict=True)
        },
        num_unreadable=result.num_unreadable,
        loss=loss,
        seconds=seconds,
    )
