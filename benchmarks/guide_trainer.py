"""The script of the Hugging Face object-detection guide: `Trainer`, albumentations, torchmetrics; no raydet.

    python benchmarks/guide_trainer.py --model FOLDER --train "TRAIN/*.parquet" --val "VAL/*.parquet" --out FOLDER

As in the guide, the model is validated and saved after every epoch. `train_vs_peers.py` converts images and boxes with
the same functions.
"""

import argparse
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np


def main() -> None:
    """Train as the guide does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--train", required=True, help="Parquet files of the training images")
    parser.add_argument("--val", required=True, help="Parquet files of the validation images")
    parser.add_argument("--out", required=True, help="folder of the checkpoints")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--loaders", type=int, default=1, help="loader processes")
    options = parser.parse_args()

    import torch
    from datasets import load_dataset
    from transformers import AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainingArguments

    rows = load_dataset("parquet", data_files={"train": options.train, "validation": options.val})
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = AutoModelForObjectDetection.from_pretrained(options.model)
    train_rows = rows["train"].with_transform(functools.partial(transform, pipeline("light"), processor))
    val_rows = rows["validation"].with_transform(functools.partial(transform, pipeline("none"), processor))
    arguments = TrainingArguments(
        output_dir=options.out,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=5e-5,
        lr_scheduler_type="cosine",
        weight_decay=1e-4,
        max_grad_norm=0.01,
        metric_for_best_model="eval_map",
        greater_is_better=True,
        load_best_model_at_end=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        dataloader_num_workers=options.loaders,
        remove_unused_columns=False,
        eval_do_concat_batches=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=val_rows,
        processing_class=processor,
        data_collator=collate,
        compute_metrics=functools.partial(_mean_average_precision, processor),
    )
    trainer.train()


def pipeline(augmentation: str) -> Any:
    """Make the albumentations pipeline: `light` is the guide's; `flip` and `none` are parts of it."""
    import albumentations as A

    flip = A.HorizontalFlip(p=0.5)
    light = [A.Perspective(p=0.1), flip, A.RandomBrightnessContrast(p=0.5), A.HueSaturationValue(p=0.1)]
    return A.Compose(
        {"light": light, "flip": [flip], "none": [A.NoOp()]}[augmentation],
        bbox_params=A.BboxParams(format="coco", label_fields=["category"], clip=True, min_area=25),
    )


def transform(pipeline: Any, processor: Any, rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Convert rows to tensors as in the guide: augment each image, then run the image processor."""
    images, annotations = [], []
    for image_id, image, objects in zip(rows["image_id"], rows["image"], rows["objects"], strict=True):
        pixels = np.array(image.convert("RGB"))
        augmented = pipeline(image=pixels, bboxes=objects["bbox"], category=objects["category"])
        boxes = [
            {"image_id": image_id, "category_id": int(label), "iscrowd": 0, "area": box[2] * box[3], "bbox": list(box)}
            for label, box in zip(augmented["category"], augmented["bboxes"], strict=True)
        ]
        images.append(augmented["image"])
        annotations.append({"image_id": image_id, "annotations": boxes})
    result: dict[str, Any] = processor(images=images, annotations=annotations, return_tensors="pt")
    return {name: result[name] for name in ("pixel_values", "labels")}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of transformed rows."""
    import torch

    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": [item["labels"] for item in items],
    }


def _mean_average_precision(processor: Any, evaluation: Any) -> dict[str, float]:
    """Compute COCO's numbers from batches of outputs and labels."""
    import torch
    from torchmetrics.detection.mean_ap import MeanAveragePrecision
    from torchvision.ops import box_convert

    metric = MeanAveragePrecision(box_format="xyxy", class_metrics=True)
    for outputs, labels in zip(evaluation.predictions, evaluation.label_ids, strict=True):
        sizes_hw = torch.tensor(np.array([label["orig_size"] for label in labels]))
        answer = SimpleNamespace(logits=torch.tensor(outputs[1]), pred_boxes=torch.tensor(outputs[2]))
        found = processor.post_process_object_detection(answer, threshold=0.0, target_sizes=sizes_hw)
        truths = []
        for label, (height, width) in zip(labels, sizes_hw.tolist(), strict=True):
            boxes = box_convert(torch.tensor(label["boxes"]).reshape(-1, 4), "cxcywh", "xyxy")
            scale = torch.tensor([width, height, width, height])
            truths.append({"boxes": boxes * scale, "labels": torch.tensor(label["class_labels"])})
        metric.update(found, truths)
    numbers = metric.compute()
    return {name: round(float(numbers[name]), 4) for name in ("map", "map_50", "map_75", "mar_100")}


if __name__ == "__main__":
    main()
