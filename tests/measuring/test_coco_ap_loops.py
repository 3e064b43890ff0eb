"""`CocoAP` in the loops of others: Ray Train, plain PyTorch, and the Trainer of Hugging Face."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

import raydet
from raydet.common.boxes import as_boxes, xyxy_to_xywh
from raydet.measuring.numbers.accumulator import ImageDetections, ImageTruth
from raydet.models.small import SMALL_MODELS
from raydet.tables.schema import Category
from tests.measuring.numbers.test_metrics import Image, reference
from tests.measuring.test_coco_ap import (
    TWELVE,
    Item,
    Measured,
    as_items,
    assert_numbers_of_ranks,
    numbers_of_rank,
    small,
    small_case,
    twelve,
)

__all__ = ["small"]
pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_of_ray_train_with_any_number_of_images(tmp_path: Path, small: Measured) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        _run_worker,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "ray"), name="run"),
    ).fit()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_numbers_of_ranks(found, small[1])


def _run_worker(config: dict[str, Any]) -> None:
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    images, categories = small_case()
    numbers = numbers_of_rank(rank, as_items(images, categories, with_ids=True))
    torch.save(numbers, f"{config['folder']}/{rank}.pt")


NUM_IMAGES, SIDE, NUM_LABELS = 14, 64, 3
CATEGORIES = [Category(number, str(number)) for number in range(NUM_LABELS)]


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """Random pictures whose labelled boxes a detector finds more or less."""

    def __init__(self, model: Any, processor: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.rand(NUM_IMAGES, 3, SIDE, SIDE, generator=generator)
        self.labels: list[dict[str, Tensor]] = []
        with torch.no_grad():
            found = detections_of(processor, model(pixel_values=self.pixels))
        for number, own in enumerate(found):
            count = number % 4  # some images have no box
            boxes = xyxy_to_xywh(own["boxes"][:count].double().numpy()) * np.array([1.0, 1.0, 1.1, 1.2])
            centres = torch.from_numpy(np.concatenate([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1) / SIDE)
            labels = {"image_id": torch.tensor([number]), "class_labels": own["labels"][:count]}
            self.labels.append(
                {**labels, "boxes": centres.float(), "area": torch.from_numpy(boxes[:, 2] * boxes[:, 3])}
            )

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[number], "labels": self.labels[number]}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": [item["labels"] for item in items],
    }


def detections_of(processor: Any, outputs: Any) -> list[Item]:
    sizes_hw = torch.tensor([[SIDE, SIDE]] * len(outputs.logits))
    found: list[Item] = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes_hw)
    return found


def target_of(labels: dict[str, Any]) -> Item:
    """Return the labels of the model as a target with corners in pixels."""
    boxes = torch.as_tensor(labels["boxes"]).reshape(-1, 4).double() * SIDE
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
    target = {"boxes": corners, "labels": torch.as_tensor(labels["class_labels"])}
    return target | {key: torch.as_tensor(labels[key]) for key in ("area", "image_id")}


def of_pycocotools(preds: list[Item], targets: list[Item]) -> list[float]:
    """Return pycocotools' numbers for the same boxes."""
    images = []
    for pred, target in zip(preds, targets, strict=True):
        found, labelled = (xyxy_to_xywh(as_boxes(side["boxes"].double().numpy())) for side in (pred, target))
        truth = ImageTruth(labelled, target["labels"].numpy(), target["area"].numpy(), np.zeros(len(labelled), bool))
        scores = pred["scores"].double().numpy()
        images.append(Image(int(target["image_id"]), truth, ImageDetections(found, scores, pred["labels"].numpy())))
    stats: list[float] = reference(images, CATEGORIES).stats.tolist()
    return stats


@pytest.fixture(scope="module")
def detector() -> tuple[Any, Any, Pictures]:
    """A tiny model with random weights, its processor and its pictures."""
    torch.manual_seed(0)
    config: Any = SMALL_MODELS["rt_detr_v2_tiny"].make_config()
    config.num_labels = NUM_LABELS
    model = transformers.RTDetrV2ForObjectDetection(config).eval()
    processor = transformers.RTDetrImageProcessor()
    return model, processor, Pictures(model, processor)


def test_a_plain_loop(detector: tuple[Any, Any, Pictures]) -> None:
    model, processor, pictures = detector
    metric = raydet.CocoAP(class_metrics=True)
    every_pred, every_target = [], []
    for batch in DataLoader(pictures, batch_size=4, collate_fn=collate):
        with torch.no_grad():
            preds = detections_of(processor, model(pixel_values=batch["pixel_values"]))
        targets = [target_of(labels) for labels in batch["labels"]]
        metric.update(preds, targets)
        every_pred += preds
        every_target += targets
    numbers = twelve(metric.compute())
    assert numbers == of_pycocotools(every_pred, every_target)
    assert 0.1 < numbers[0] < 0.9


def test_the_trainer_of_hugging_face(detector: tuple[Any, Any, Pictures], tmp_path: Path) -> None:
    model, processor, pictures = detector
    every_pred: list[Item] = []
    every_target: list[Item] = []

    def compute_metrics(evaluation: Any) -> dict[str, float]:
        metric = raydet.CocoAP(sync_on_compute=False)
        for outputs, labels in zip(evaluation.predictions, evaluation.label_ids, strict=True):
            answer = SimpleNamespace(logits=torch.tensor(outputs[1]), pred_boxes=torch.tensor(outputs[2]))
            preds, targets = detections_of(processor, answer), [target_of(own) for own in labels]
            metric.update(preds, targets)
            every_pred.extend(preds)
            every_target.extend(targets)
        numbers = metric.compute()
        return {name: float(numbers[name]) for name in TWELVE}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=4,
        remove_unused_columns=False,
        eval_do_concat_batches=False,
        report_to="none",
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, data_collator=collate, eval_dataset=pictures, compute_metrics=compute_metrics
    )
    result = trainer.evaluate()
    numbers = [result[f"eval_{name}"] for name in TWELVE]
    assert numbers == of_pycocotools(every_pred, every_target)
    assert 0.1 < numbers[0] < 0.9
