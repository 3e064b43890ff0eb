"""`train`, and `demo`, which runs the complete pipeline.

Options of `train` that default to None and say so are decided by the recipe of the model, see `raydet.models.recipes`.
"""

from typing import Any, Literal

from raydet.config.fields import PAIRS, config, option, require, require_not_negative, require_positive
from raydet.config.workers import Precision, WorkersConfig

Augmentation = Literal["none", "flip", "light", "detr", "rfdetr", "rtdetr", "dfine", "strong"]
AugmentationSpec = Augmentation | list[dict[str, Any]]
"""A named preset, or an albumentations pipeline: a list of `Name: {argument: value}`."""
Recipe = Literal["auto", "none"]
Backbone = Literal["none", "stem", "all"]
BatchNorm = Literal["as_is", "freeze", "sync"]
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
OVERRIDABLE = ("learning_rate", "backbone_learning_rate", "max_grad_norm", "precision", "augmentation")
"""Options of `train` that --override can change in mid-run."""
MOST_WEIGHT = 100.0
"""Maximum weight of a table."""
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@config
class TrainConfig(WorkersConfig):
    """Fine-tune a detector, or train a small one from scratch."""

    train_data: str | list[str] = option(
        "images table to train on, or several; TABLE:WEIGHT shows each of its images WEIGHT times per epoch on average",
        value="TABLE[:WEIGHT] ...",
    )
    val_data: str = option("images table for validation after each epoch")
    out: str = option("run folder: OUT/checkpoint is the best model, OUT/last the newest", operational=True)

    model: str = option(
        "Hub name, local model folder, or named small model that is built from scratch (rt_detr_v2_small, …)",
        "rt_detr_v2_small",
    )
    recipe: Recipe = option(
        "auto: options that are not given follow the recipe of the model's authors and the number of images, as "
        "--print-config shows; none: fixed values, the same for all models",
        "auto",
        operational=True,
    )
    epochs: int | None = option(
        "passes over the training images; may be raised when a run resumes; by default the recipe's",
        None,
        operational=True,
    )
    batch_size: int | None = option(
        "images per optimizer step, over all workers together; by default the recipe's", None
    )
    learning_rate: float | None = option(
        "peak learning rate of AdamW; by default the recipe's, scaled with the batch", None
    )
    num_workers: int | list[int] | Literal["auto"] = option(
        "parallel workers, each with a copy of the model; 1,4 uses between 1 and 4, as many as the cluster has room "
        "for; auto uses all GPUs, or one worker without GPUs",
        "auto",
        operational=True,
    )

    image_size: int | None = option(
        "input side in pixels (the longest side for models that keep the aspect ratio); by default the model's own",
        None,
        group="Model",
    )
    multi_scale: list[int] | None = option(
        "input sides in pixels (the shortest side for models that keep the aspect ratio), one per training step; "
        "validation uses --image-size; [] for a single size; by default the recipe's",
        None,
        group="Model",
    )
    class_mapping: dict[str, str] | None = option(
        "renamed classes, as {OLD: NEW}: NEW of the training table starts with the weights of OLD of --model; classes "
        "of the same name need no entry",
        None,
        group="Model",
    )
    freeze_backbone: Backbone | None = option(
        "part of the backbone that keeps its loaded weights; by default the recipe's", None, group="Model"
    )
    unfreeze_epoch: int | None = option(
        "epoch, counted from 1, from which a frozen backbone trains too", None, group="Model"
    )
    lora: dict[str, int | float] | None = option(
        "low-rank adapters in the vision transformer of the model, whose own weights are then frozen: their rank r, "
        "alpha (by default 2 · r) for a scale of alpha / r, and dropout (by default 0), as r=16 alpha=32",
        None,
        group="Model",
        value=PAIRS,
        is_later=True,
    )
    batch_norm: BatchNorm | None = option(
        "as_is: as the model defines it; freeze: keep the loaded statistics; sync: statistics over the images of all "
        "workers; by default the recipe's",
        None,
        group="Model",
    )

    backbone_learning_rate: float | None = option(
        "learning rate of the backbone; by default the recipe's fraction of --learning-rate",
        None,
        group="Optimisation",
    )
    layer_decay: float | None = option(
        "factor of the learning rate from each layer of a vision transformer as backbone to the layer below; by "
        "default the recipe's",
        None,
        group="Optimisation",
    )
    learning_rate_factors: dict[str, float] | None = option(
        "factors of the learning rate of parameters outside of the backbone, as {PART_OF_NAME: FACTOR}; by default the "
        "recipe's",
        None,
        group="Optimisation",
    )
    weight_decay: float | None = option(
        "weight decay, not applied to biases and norms; by default the recipe's", None, group="Optimisation"
    )
    schedule: Schedule = option(
        "learning-rate schedule: any of transformers.get_scheduler, or one_cycle", "cosine", group="Optimisation"
    )
    schedule_options: dict[str, Any] | None = option(
        "further arguments of the schedule, such as {num_cycles: 3} or {num_decay_steps: 500}",
        None,
        group="Optimisation",
    )
    schedule_epochs: int | None = option("length of the schedule; by default --epochs", None, group="Optimisation")
    warmup_steps: int | None = option(
        "steps of linear warm-up; by default the recipe's, at most a tenth of the run", None, group="Optimisation"
    )
    max_grad_norm: float | None = option(
        "norm to which gradients are clipped; by default the recipe's", None, group="Optimisation"
    )
    gradient_accumulation_steps: int | None = option(
        "parts into which each worker splits its share of a batch to save memory; by default the recipe's",
        None,
        group="Optimisation",
    )
    precision: Precision | None = option(
        "fp32, bf16 autocast, or fp16 autocast with loss scaling; by default bf16 on GPUs and fp32 on CPUs",
        None,
        group="Optimisation",
    )
    ema_decay: float | None = option(
        "decay of the moving average of the weights, which is then validated and saved as the model; 0 turns it off; "
        "by default the recipe's, which depends on the length of the run",
        None,
        group="Optimisation",
    )
    ema_rise_steps: int | None = option(
        "time constant in steps of the rise of --ema-decay from 0; by default the recipe's", None, group="Optimisation"
    )
    override: dict[str, Any] | None = option(
        f"changes to a run from its newest state on, of {', '.join(OVERRIDABLE[:-1])} or {OVERRIDABLE[-1]}; a resumed "
        "run keeps them, with or without this option",
        None,
        group="Optimisation",
        operational=True,
        value=PAIRS,
    )
    seed: int = option("seed of the weights, the order of the images and their augmentation", 0, group="Optimisation")

    augmentation: AugmentationSpec | None = option(
        "none; flip; light (as in the Hugging Face guide); detr, rfdetr (flip, random crop), rtdetr, dfine (colours, "
        "zoom-out, IoU crop, flip), as in the recipes of these families; strong (mosaic, mixup, copied small objects); "
        "or a list of albumentations transforms as `Name: {argument: value}`; by default the recipe's",
        None,
        group="Augmentation",
    )
    close_mosaic: int | None = option(
        "final epochs that train with flips as the only augmentation and without --multi-scale; by default the "
        "recipe's",
        None,
        group="Augmentation",
    )
    repeat_rare: float | None = option(
        "show images of a class that only a fraction f < REPEAT_RARE of the images has √(REPEAT_RARE / f) times as "
        "often; LVIS uses 0.001",
        None,
        group="Input",
    )
    rename_classes: dict[str, str] | str | None = option(
        "new names of classes, as {OLD: NEW} or a YAML file of such lines, before the classes of all tables are merged "
        "by name",
        None,
        group="Input",
        value="{OLD: NEW} | FILE",
    )
    teacher: str | list[str] | None = option(
        "detections in the training images by a model, or several, from `predict --keep class_scores`: boxes and class "
        "scores to learn besides the labels; TABLE:WEIGHT weights their loss terms",
        None,
        group="Input",
        value="TABLE[:WEIGHT] ...",
    )
    shuffle_window_mb: int = option("megabytes of compressed images that are shuffled together", 256, group="Input")

    validate_every: int | None = option(
        "epochs between validations; the last epoch is always validated; by default the recipe's, for 25 to 50 "
        "validations in a long run",
        None,
        group="Validation",
    )
    validate_fraction: float = option(
        "fraction of the validation images to use, spread evenly over the table", 1.0, group="Validation"
    )
    validate_batch_size: int | None = option(
        "images per validation batch; by default --batch-size", None, group="Validation"
    )
    metric_for_best_model: str = option(
        "metric that chooses OUT/checkpoint: one of COCO's twelve, AP:CLASS for one class, or loss, that of the final "
        "boxes over the validation images",
        "AP",
        group="Validation",
        value="METRIC",
    )
    early_stopping_patience: int | None = option(
        "stop after this many validations without an improvement of --metric-for-best-model; 0 never stops; by default "
        "the recipe's",
        None,
        group="Validation",
        operational=True,
    )

    trackers: list[str] = option(
        "trackers to log to besides TensorBoard: reporting integrations of transformers (mlflow, trackio, wandb, …), "
        "whose packages must be installed, or MODULE:CLASS of a TrainerCallback",
        group="Output",
        default_factory=list,
        operational=True,
    )
    log_images: int = option(
        "validation images logged with truth and predictions at each validation", 8, group="Output", operational=True
    )
    keep_states: int = option(
        "number of newest training states to keep; a run resumes from the newest", 2, group="Output", operational=True
    )
    save_every_steps: int | None = option(
        "steps between saved states within an epoch; by default a state is saved only at the end of an epoch",
        None,
        group="Output",
        operational=True,
    )

    gradient_checkpointing: bool = option(
        "recompute activations instead of keeping them in memory", False, group="Compute and cluster", operational=True
    )
    compile: bool = option(
        "compile backbone and encoder with torch.compile, once per input size; takes minutes, which pays off on a GPU "
        "for models with a fixed input size",
        False,
        group="Compute and cluster",
        operational=True,
    )
    max_failures: int = option(
        "failures of workers or nodes to recover from before giving up",
        3,
        group="Compute and cluster",
        operational=True,
    )

    @property
    def min_workers(self) -> int:
        """Minimum number of workers; 1 for `auto`."""
        return self._workers[0]

    @property
    def max_workers(self) -> int:
        """Maximum number of workers; 1 for `auto`."""
        return self._workers[1]

    @property
    def _workers(self) -> list[int]:
        number = 1 if self.num_workers == "auto" else self.num_workers
        return number if isinstance(number, list) else [number, number]

    def __post_init__(self) -> None:
        super().__post_init__()
        workers = self._workers
        require(
            len(workers) == 2 and 0 < workers[0] <= workers[1],
            f"--num-workers must be a positive number, or a minimum and a maximum such as [1, 4]; "
            f"got {self.num_workers}",
        )
        require_positive(self, "epochs", "batch_size", "gradient_accumulation_steps", "learning_rate")
        require_positive(self, "backbone_learning_rate", "validate_every", "validate_batch_size", "shuffle_window_mb")
        require_positive(self, "max_grad_norm", "schedule_epochs", "keep_states", "save_every_steps")
        require_positive(self, "ema_rise_steps", "layer_decay")
        require(
            self.repeat_rare is None or 0 < self.repeat_rare <= 1,
            f"--repeat-rare must be above 0 and at most 1, got {self.repeat_rare}",
        )
        require(self.train_data != [], "--train-data must name at least one images table")
        require(self.teacher != [], "--teacher must name at least one detections table")
        require_not_negative(self, "weight_decay", "warmup_steps", "close_mosaic", "max_failures", "seed", "log_images")
        require_not_negative(self, "early_stopping_patience")
        require(0 <= (self.ema_decay or 0) < 1, f"--ema-decay must be at least 0 and below 1, got {self.ema_decay}")
        require((self.layer_decay or 1) <= 1, f"--layer-decay must be at most 1, got {self.layer_decay}")
        for part, factor in (self.learning_rate_factors or {}).items():
            require(factor > 0, f"--learning-rate-factors: the factor of {part} must be above 0, got {factor}")
        require(
            0 < self.validate_fraction <= 1,
            f"--validate-fraction must be above 0 and at most 1, got {self.validate_fraction}",
        )
        require_metric("--metric-for-best-model", self.metric_for_best_model)
        require(
            self.unfreeze_epoch is None or (self.unfreeze_epoch > 1 and self.freeze_backbone in ("stem", "all")),
            f"--unfreeze-epoch needs --freeze-backbone stem or all, and must be at least 2; got {self.unfreeze_epoch} "
            f"with --freeze-backbone {self.freeze_backbone or 'none'}",
        )
        if self.lora is not None:
            self._check_lora(self.lora)
        pipeline = self.augmentation if isinstance(self.augmentation, list) else []
        for item in pipeline:
            require(
                len(item) == 1 and all(isinstance(value, dict | None) for value in item.values()),
                f"--augmentation: each transform must be written as `Name: {{argument: value}}`, got {item}",
            )
        sizes = self.multi_scale
        require(
            all(size >= 32 for size in sizes or ()),
            f"--multi-scale must be sides in pixels of at least 32, got {sizes}",
        )
        require(
            self.image_size is None or self.image_size >= 32, f"--image-size must be at least 32, got {self.image_size}"
        )
        require(
            self.batch_size is None or self.batch_size >= self.max_workers,
            f"--batch-size counts the images of all workers together: {self.batch_size} images cannot keep "
            f"{self.max_workers} workers busy; raise --batch-size or lower --num-workers",
        )

    def _check_lora(self, options: dict[str, int | float]) -> None:
        rank, known = options.get("r"), ("r", "alpha", "dropout")
        require(set(options) <= set(known), f"--lora takes {', '.join(known)}, got {', '.join(options)}")
        require(isinstance(rank, int) and 0 < rank <= 1024, f"--lora needs a rank r from 1 to 1024, got {rank}")
        alpha, dropout = options.get("alpha", 1), options.get("dropout", 0)
        require(isinstance(alpha, int) and alpha > 0, f"--lora: alpha must be a positive integer, got {alpha}")
        require(0 <= dropout < 1, f"--lora: dropout must be at least 0 and below 1, got {dropout}")
        require(
            self.freeze_backbone in (None, "all") and self.unfreeze_epoch is None,
            "--lora keeps the weights of the backbone frozen; omit --freeze-backbone and --unfreeze-epoch",
        )


def require_metric(name: str, metric: str) -> None:
    """Raise UserError unless the metric is one that validation measures; `name` is the option in the message."""
    require(
        metric in (*COCO_METRICS, "loss") or metric.startswith("AP:"),
        f"{name} must be one of {', '.join(COCO_METRICS)}, AP:CLASS or loss, got {metric}",
    )


@config
class DemoConfig:
    """The complete pipeline on generated images: prepare, train, predict, evaluate, report."""

    out: str = option("run folder", "runs/demo", operational=True)
    train_config: str | None = option("training config (YAML); by default the demo's own", None)
    num_train: int = option("training images", 800)
    num_val: int = option("held-out images", 100)
    epochs: int | None = option("passes over the training images; by default those of --train-config", None)
    num_workers: int = option("training workers", 2, operational=True)

    def __post_init__(self) -> None:
        require_positive(self, "num_train", "num_val", "epochs", "num_workers")
