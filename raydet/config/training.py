"""`train`, and `demo`, which goes the whole way."""

from dataclasses import dataclass
from typing import Any, Literal

from raydet.config.fields import option, require, require_positive
from raydet.config.workers import Precision, WorkersConfig

Augmentation = Literal["none", "flip", "light", "detr", "strong"]
AugmentationSpec = Augmentation | list[dict[str, Any]]
"""A named preset, or an albumentations pipeline: a list of `Name: {argument: value}`."""
Backbone = Literal["none", "stem", "all"]
BatchNorm = Literal["as_is", "freeze", "sync"]
Tracker = Literal["mlflow", "wandb"]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "one_cycle",
]
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(WorkersConfig):
    """Fine-tune a detector, or train a small one from scratch."""

    num_workers: int | list[int] = option(
        "workers side by side, each with its copy of the model; [1, 4] takes as many from 1 to 4 as there is room for",
        1,
        operational=True,
    )
    train_data: str = option("images table to learn from")
    val_data: str = option("images table to validate on after each epoch")
    out: str = option("run folder: OUT/checkpoint is the best model, OUT/last the newest", operational=True)

    model: str = option(
        "a Hub name, a local model folder, or a named small model built from scratch (rt_detr_v2_small, …)",
        "rt_detr_v2_small",
    )
    image_size: int | None = option(
        "side in pixels that images are resized to (for models that keep the aspect: of the longest side); "
        "the model's own by default",
        None,
    )
    multi_scale: list[int] | None = option(
        "sides in pixels, of which each training step draws one; validation uses image_size", None
    )
    freeze_backbone: Backbone = option("none of the backbone stays as loaded, its stem, or all of it", "none")
    unfreeze_epoch: int | None = option("epoch, counted from 1, from which a frozen backbone learns too", None)
    batch_norm: BatchNorm = option(
        "as_is: as the model has them; freeze: they stay as loaded; sync: statistics over the images of all workers",
        "as_is",
    )

    epochs: int = option("passes over the training images; may be raised later", 50, operational=True)
    batch_size: int = option("images per optimizer step, over all workers together", 8)
    accumulate: int = option("parts that each worker splits its share of a batch into, to save memory", 1)
    learning_rate: float = option("AdamW's peak rate", 1e-4)
    backbone_learning_rate: float | None = option("the backbone's own; a tenth of learning_rate by default", None)
    weight_decay: float = option("not applied to biases and norms", 1e-4)
    schedule: Schedule = option("learning-rate schedule, by transformers.get_scheduler's name, or one_cycle", "cosine")
    schedule_options: dict[str, Any] | None = option(
        "further arguments of the schedule, such as {num_cycles: 3} or {num_decay_steps: 500}", None
    )
    schedule_epochs: int | None = option("epochs the schedule is laid out for; `epochs` by default", None)
    warmup_steps: int = option("steps of linear warm-up", 0)
    max_grad_norm: float = option("gradients are clipped to this norm", 0.1)
    precision: Precision = option("fp32, bf16 autocast, or fp16 autocast with loss scaling", "fp32")
    gradient_checkpointing: bool = option("compute activations again instead of keeping them", False, operational=True)
    compile: bool = option("compile the model with torch.compile", False, operational=True)
    augmentation: AugmentationSpec = option(
        "none, flip, light (the Hugging Face guide's), detr (random resize and crop), strong (mosaic, mixup, copied "
        "small objects), or a list of albumentations transforms as `Name: {argument: value}`",
        "light",
    )
    close_mosaic: int = option("last epochs without augmentation other than flips, and without multi_scale", 0)
    ema_decay: float = option("moving average of the weights, validated and saved as the model; 0 is off", 0.0)
    seed: int = option("of the weights, the order of the images and their augmentation", 0)

    validate_every: int = option("epochs between two validations; the last epoch always has one", 1)
    validate_fraction: float = option("part of the validation images to use, evenly spread over the table", 1.0)
    validate_batch_size: int | None = option("images at once in validation; batch_size by default", None)
    metric_for_best_model: str = option(
        "what OUT/checkpoint is the best by: one of COCO's twelve, AP:CLASS for one class, or loss", "AP"
    )
    early_stopping_patience: int | None = option(
        "stop after so many validations without a better metric_for_best_model", None, operational=True
    )

    keep: int = option("states to go on from that are kept, the newest ones", 2, operational=True)
    checkpoint_every_steps: int | None = option(
        "steps between two states within an epoch; by default there is one at the end of each epoch",
        None,
        operational=True,
    )
    trackers: list[Tracker] = option(
        "mlflow, wandb: logged to besides TensorBoard, when installed", default_factory=list, operational=True
    )
    log_images: int = option(
        "validation images drawn with truth and predictions at each validation", 8, operational=True
    )
    max_failures: int = option("times that dead workers are replaced before giving up", 3, operational=True)
    shuffle_window_mb: int = option("compressed images shuffled together", 256)

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the run uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def __post_init__(self) -> None:
        super().__post_init__()
        workers = [self.num_workers] * 2 if isinstance(self.num_workers, int) else self.num_workers
        require(
            len(workers) == 2 and 0 < workers[0] <= workers[1],
            f"num_workers must be a number above 0, or the fewest and the most as [1, 4]; got {self.num_workers}",
        )
        require_positive(self, "epochs", "batch_size", "accumulate", "learning_rate", "backbone_learning_rate")
        require_positive(self, "validate_every", "validate_batch_size", "shuffle_window_mb", "max_grad_norm")
        require_positive(self, "schedule_epochs", "keep", "checkpoint_every_steps", "early_stopping_patience")
        for name in ("weight_decay", "warmup_steps", "close_mosaic", "max_failures", "seed", "log_images"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        require(0 <= self.ema_decay < 1, f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        require(
            0 < self.validate_fraction <= 1,
            f"validate_fraction must be above 0 and at most 1, got {self.validate_fraction}",
        )
        require(
            self.metric_for_best_model in (*COCO_METRICS, "loss") or self.metric_for_best_model.startswith("AP:"),
            f"metric_for_best_model must be one of {', '.join(COCO_METRICS)}, AP:CLASS or loss, "
            f"got {self.metric_for_best_model}",
        )
        require(
            self.unfreeze_epoch is None or (self.unfreeze_epoch > 1 and self.freeze_backbone != "none"),
            f"unfreeze_epoch needs freeze_backbone stem or all, and must be at least 2; got {self.unfreeze_epoch} "
            f"with freeze_backbone {self.freeze_backbone}",
        )
        pipeline = [] if isinstance(self.augmentation, str) else self.augmentation
        for item in pipeline:
            require(
                len(item) == 1 and all(isinstance(value, dict | None) for value in item.values()),
                f"augmentation: each transform must be written as `Name: {{argument: value}}`, got {item}",
            )
        sizes = self.multi_scale
        require(
            sizes is None or (len(sizes) > 0 and all(size >= 32 for size in sizes)),
            f"multi_scale must be sides in pixels of at least 32, got {sizes}",
        )
        require(
            self.image_size is None or self.image_size >= 32, f"image_size must be at least 32, got {self.image_size}"
        )
        require(
            self.batch_size >= self.max_workers,
            f"batch_size is over all workers together: {self.batch_size} images cannot keep {self.max_workers} workers "
            "busy; raise batch_size or lower num_workers",
        )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole way on generated images: prepare, train, predict, evaluate."""

    out: str = option("run folder", "runs/demo", operational=True)
    recipe: str | None = option("training config; jobs/configs/demo.yaml by default", None)
    num_train: int = option("training images", 800)
    num_val: int = option("held-out images", 100)
    epochs: int | None = option("passes over the training images; the recipe's by default", None)
    num_workers: int = option("training workers", 1, operational=True)

    def __post_init__(self) -> None:
        require_positive(self, "num_train", "num_val", "epochs", "num_workers")
