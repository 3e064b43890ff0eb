"""One frozen dataclass per job, which checks itself. `options.py` makes them of YAML files and command lines.

A field is *operational* when it changes how long a run takes or where it runs, but not what comes out; all others
are its identity: a folder may be continued only by a run of the same identity.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from raydet.errors import UserError

ImageStorage = Literal["inline", "reference"]
Precision = Literal["fp32", "bf16", "fp16"]
Engine = Literal["torch", "openvino", "onnx"]
Merge = Literal["nms", "wbf"]
DrawIf = Literal["any", "low_score", "many_boxes"]
Augmentation = Literal["none", "flip", "light", "detr", "strong"]
AugmentationSpec = Augmentation | list[dict[str, Any]]
"""A named preset, or an albumentations pipeline: a list of `Name: {argument: value}`."""
Backbone = Literal["none", "stem", "all"]
BatchNorm = Literal["as_is", "freeze", "sync"]
Tracker = Literal["mlflow", "wandb"]
EvaluationProtocol = Literal["coco", "lvis", "voc07", "voc"]
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

DEFAULT_MAX_PIXELS = 178_956_970
"""Larger pictures are refused as decompression bombs; the number is Pillow's own limit (a quarter gigabyte of RGB)."""


def _option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    operational: bool = False,
) -> Any:
    metadata = {"help": help, "operational": operational}
    if default_factory is not dataclasses.MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value > 0, f"{name} must be above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class _PrepareConfig:
    """What every source of image files has in common."""

    out: str = _option("folder or URI of the images table to write")
    image_storage: ImageStorage = _option("inline: image bytes in the table; reference: only their paths", "inline")
    max_pixels: int = _option("larger pictures are rejected as decompression bombs", DEFAULT_MAX_PIXELS)
    num_threads: int | None = _option("decoding threads (all cores by default)", None, operational=True)

    def __post_init__(self) -> None:
        _require_positive(self, "max_pixels", "num_threads")


@dataclass(frozen=True, kw_only=True)
class PrepareImagesConfig(_PrepareConfig):
    """A folder or URI of images without labels → an images table."""

    images: str = _option("folder or URI of the images, with its subfolders")


@dataclass(frozen=True, kw_only=True)
class PrepareCocoConfig(PrepareImagesConfig):
    """COCO instances JSON and a folder of images → an images table."""

    annotations: str = _option("COCO instances JSON file, whose file names are relative to the folder of images")


@dataclass(frozen=True, kw_only=True)
class PrepareVocConfig(PrepareImagesConfig):
    """Pascal VOC XML files and a folder of images → an images table."""

    annotations: str = _option("folder or URI of the XML files, each named like its image")
    split: str | None = _option("file that lists the images to take, a name a line, as in ImageSets/Main", None)
    classes: list[str] | None = _option(
        "the classes in their order, or one .txt file with a name a line; by default all in the XML files", None
    )
    zero_based: bool = _option("the first pixel is 0 in these files, and 1 in those of the VOC devkit", False)


@dataclass(frozen=True, kw_only=True)
class PrepareYoloConfig(_PrepareConfig):
    """A data set in the layout of Ultralytics, or a folder of images and one of labels → an images table."""

    data: str | None = _option("data.yaml of the data set; or else images, labels and classes", None)
    split: Literal["train", "val", "test"] = _option("which part of data.yaml to take", "train")
    images: str | None = _option("without data: folder or URI of the images, with its subfolders", None)
    labels: str | None = _option("without data: folder or URI of the .txt files, laid out like the images", None)
    classes: list[str] | None = _option(
        "without data: the classes in their order, or one .txt file with a name a line", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = (self.images, self.labels, self.classes)
        _require(
            all(part is None for part in parts) if self.data is not None else all(part is not None for part in parts),
            "give either data, the data set's data.yaml, or all of images, labels and classes",
        )


@dataclass(frozen=True, kw_only=True)
class PrepareShapesConfig:
    """Generated pictures of rectangles, ellipses and triangles → two images tables, OUT/train and OUT/val."""

    out: str = _option("folder or URI; the tables are OUT/train and OUT/val")
    num_train: int = _option("training images", 1000)
    num_val: int = _option("held-out images", 200)
    image_size: int = _option("side of the square pictures in pixels", 128)
    max_shapes: int = _option("most shapes in a picture; the fewest is none", 6)
    seed: int = _option("the same seed gives the same pixels", 0)
    num_threads: int | None = _option("decoding threads (all cores by default)", None, operational=True)

    def __post_init__(self) -> None:
        _require_positive(self, "num_train", "num_val", "max_shapes", "num_threads")
        _require(self.image_size >= 32, f"image_size must be at least 32, got {self.image_size}")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class _WorkersConfig:
    """What jobs with a model on several workers have in common; none of it changes what comes out."""

    use_gpu: bool | None = _option("one GPU per worker; by default, when the cluster has any", None, operational=True)
    cpus_per_worker: float | None = _option(
        "CPUs reserved for each worker; by default half of the cluster's, shared out, the rest decodes",
        None,
        operational=True,
    )
    threads_per_worker: int | None = _option(
        "torch threads in a worker; its share of the cores", None, operational=True
    )

    def __post_init__(self) -> None:
        _require_positive(self, "cpus_per_worker", "threads_per_worker")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_WorkersConfig):
    """Fine-tune a detector, or train a small one from scratch."""

    num_workers: int | list[int] = _option(
        "workers side by side, each with its copy of the model; [1, 4] takes as many from 1 to 4 as there is room for",
        1,
        operational=True,
    )
    train_data: str = _option("images table to learn from")
    val_data: str = _option("images table to validate on after each epoch")
    out: str = _option("run folder: OUT/checkpoint is the best model, OUT/last the newest", operational=True)

    model: str = _option(
        "a Hub name, a local model folder, or a named small model built from scratch (rt_detr_v2_small, …)",
        "rt_detr_v2_small",
    )
    image_size: int | None = _option(
        "side in pixels that images are resized to (for models that keep the aspect: of the longest side); "
        "the model's own by default",
        None,
    )
    multi_scale: list[int] | None = _option(
        "sides in pixels, of which each training step draws one; validation uses image_size", None
    )
    freeze_backbone: Backbone = _option("none of the backbone stays as loaded, its stem, or all of it", "none")
    unfreeze_epoch: int | None = _option("epoch, counted from 1, from which a frozen backbone learns too", None)
    batch_norm: BatchNorm = _option(
        "as_is: as the model has them; freeze: they stay as loaded; sync: statistics over the images of all workers",
        "as_is",
    )

    epochs: int = _option("passes over the training images; may be raised later", 50, operational=True)
    batch_size: int = _option("images per optimizer step, over all workers together", 8)
    accumulate: int = _option("parts that each worker splits its share of a batch into, to save memory", 1)
    learning_rate: float = _option("AdamW's peak rate", 1e-4)
    backbone_learning_rate: float | None = _option("the backbone's own; a tenth of learning_rate by default", None)
    weight_decay: float = _option("not applied to biases and norms", 1e-4)
    schedule: Schedule = _option("learning-rate schedule, by transformers.get_scheduler's name, or one_cycle", "cosine")
    schedule_options: dict[str, Any] | None = _option(
        "further arguments of the schedule, such as {num_cycles: 3} or {num_decay_steps: 500}", None
    )
    schedule_epochs: int | None = _option("epochs the schedule is laid out for; `epochs` by default", None)
    warmup_steps: int = _option("steps of linear warm-up", 0)
    max_grad_norm: float = _option("gradients are clipped to this norm", 0.1)
    precision: Precision = _option("fp32, bf16 autocast, or fp16 autocast with loss scaling", "fp32")
    gradient_checkpointing: bool = _option("compute activations again instead of keeping them", False, operational=True)
    compile: bool = _option("compile the model with torch.compile", False, operational=True)
    augmentation: AugmentationSpec = _option(
        "none, flip, light (the Hugging Face guide's), detr (random resize and crop), strong (mosaic, mixup, copied "
        "small objects), or a list of albumentations transforms as `Name: {argument: value}`",
        "light",
    )
    close_mosaic: int = _option("last epochs without augmentation other than flips, and without multi_scale", 0)
    ema_decay: float = _option("moving average of the weights, validated and saved as the model; 0 is off", 0.0)
    seed: int = _option("of the weights, the order of the images and their augmentation", 0)

    validate_every: int = _option("epochs between two validations; the last epoch always has one", 1)
    validate_fraction: float = _option("part of the validation images to use, evenly spread over the table", 1.0)
    validate_batch_size: int | None = _option("images at once in validation; batch_size by default", None)
    metric_for_best_model: str = _option(
        "what OUT/checkpoint is the best by: one of COCO's twelve, AP:CLASS for one class, or loss", "AP"
    )
    early_stopping_patience: int | None = _option(
        "stop after so many validations without a better metric_for_best_model", None, operational=True
    )

    keep: int = _option("states to go on from that are kept, the newest ones", 2, operational=True)
    checkpoint_every_steps: int | None = _option(
        "steps between two states within an epoch; by default there is one at the end of each epoch",
        None,
        operational=True,
    )
    trackers: list[Tracker] = _option(
        "mlflow, wandb: logged to besides TensorBoard, when installed", default_factory=list, operational=True
    )
    log_images: int = _option(
        "validation images drawn with truth and predictions at each validation", 8, operational=True
    )
    max_failures: int = _option("times that dead workers are replaced before giving up", 3, operational=True)
    shuffle_window_mb: int = _option("compressed images shuffled together", 256)

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
        _require(
            len(workers) == 2 and 0 < workers[0] <= workers[1],
            f"num_workers must be a number above 0, or the fewest and the most as [1, 4]; got {self.num_workers}",
        )
        _require_positive(self, "epochs", "batch_size", "accumulate", "learning_rate", "backbone_learning_rate")
        _require_positive(self, "validate_every", "validate_batch_size", "shuffle_window_mb", "max_grad_norm")
        _require_positive(self, "schedule_epochs", "keep", "checkpoint_every_steps", "early_stopping_patience")
        for name in ("weight_decay", "warmup_steps", "close_mosaic", "max_failures", "seed", "log_images"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(0 <= self.ema_decay < 1, f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        _require(
            0 < self.validate_fraction <= 1,
            f"validate_fraction must be above 0 and at most 1, got {self.validate_fraction}",
        )
        _require(
            self.metric_for_best_model in (*COCO_METRICS, "loss") or self.metric_for_best_model.startswith("AP:"),
            f"metric_for_best_model must be one of {', '.join(COCO_METRICS)}, AP:CLASS or loss, "
            f"got {self.metric_for_best_model}",
        )
        _require(
            self.unfreeze_epoch is None or (self.unfreeze_epoch > 1 and self.freeze_backbone != "none"),
            f"unfreeze_epoch needs freeze_backbone stem or all, and must be at least 2; got {self.unfreeze_epoch} "
            f"with freeze_backbone {self.freeze_backbone}",
        )
        pipeline = [] if isinstance(self.augmentation, str) else self.augmentation
        for item in pipeline:
            _require(
                len(item) == 1 and all(isinstance(value, dict | None) for value in item.values()),
                f"augmentation: each transform must be written as `Name: {{argument: value}}`, got {item}",
            )
        sizes = self.multi_scale
        _require(
            sizes is None or (len(sizes) > 0 and all(size >= 32 for size in sizes)),
            f"multi_scale must be sides in pixels of at least 32, got {sizes}",
        )
        _require(
            self.image_size is None or self.image_size >= 32, f"image_size must be at least 32, got {self.image_size}"
        )
        _require(
            self.batch_size >= self.max_workers,
            f"batch_size is over all workers together: {self.batch_size} images cannot keep {self.max_workers} workers "
            "busy; raise batch_size or lower num_workers",
        )


@dataclass(frozen=True, kw_only=True)
class PredictConfig(_WorkersConfig):
    """Run a model over any number of images → a detections table, one row for each image."""

    num_workers: int = _option("workers side by side, each with its copy of the model", 1, operational=True)
    checkpoint: str | None = _option("model folder, as written by train, or a Hub name", None)
    model: str | None = _option(
        "instead of checkpoint: a zero-shot model (OWL-ViT, OWLv2, Grounding DINO), by folder or Hub name", None
    )
    labels: list[str] | None = _option('what a zero-shot model is to look for: "cat,remote control"', None)
    data: str = _option(
        "images table, folder of images, list of paths (.txt), or tar files (a .tar, or a folder of them); or URIs"
    )
    out: str = _option("folder or URI of the detections table", operational=True)

    engine: Engine = _option(
        'what runs the model; openvino and onnx are for CPUs, after pip install "raydet[openvino]" or "raydet[onnx]"',
        "torch",
    )
    precision: Precision = _option("fp32, or bf16 or fp16 where the engine and the hardware have it", "fp32")
    compile: bool = _option("compile the model with torch.compile", False)
    channels_last: bool = _option("for torch: keep the channels of a pixel together in memory, which is faster", True)
    batch_size: int | Literal["auto"] = _option(
        "images (or tiles) that the model sees at once; auto measures; a run may go on with another",
        16,
        operational=True,
    )
    pad_together: bool = _option(
        "for models that keep the aspect: pad images of like shape to one size; without it each size runs by itself",
        True,
    )
    reduced_decode: bool = _option("decode large JPEGs at a half, quarter or eighth of their size", False)
    max_pixels: int = _option("larger pictures are reported as decompression bombs", DEFAULT_MAX_PIXELS)

    tile: int | None = _option("side in pixels of the tiles that large pictures are cut into", None)
    overlap: float = _option("with tile: part of a tile that it shares with its neighbour", 0.2)
    whole_image: bool = _option("with tile: look at the picture as a whole, too", True)
    flip: bool = _option("look at each picture mirrored, too, and merge the best 100 boxes of both", False)
    merge: Merge = _option(
        "with tile or flip: nms keeps the best of boxes that overlap, wbf averages them (weighted box fusion)", "nms"
    )
    merge_iou: float = _option("with tile or flip: IoU from which two boxes of a class are taken for one object", 0.5)

    score_threshold: float = _option("detections at or below this score are left out; 0 keeps all, as AP needs", 0.0)
    top_k: int | None = _option("most detections of an image, the best ones; the model's own number by default", None)
    classes: list[str] | None = _option("classes to keep, by name; all by default", None)
    class_agnostic_nms: float | None = _option(
        "leave out a box that overlaps a better one of any class by more than this IoU; off by default", None
    )

    rows_per_file: int | None = _option(
        "images of an output file, the unit of work that is done again after a kill; by default up to 1024, "
        "rounded up to whole batches",
        None,
        operational=True,
    )
    draw: int = _option("pictures to draw with their boxes, into OUT/_drawn", 0, operational=True)
    draw_if: DrawIf = _option(
        "with draw: any picture, low_score (best box near draw_threshold), or many_boxes", "any", operational=True
    )
    draw_threshold: float = _option("with draw: boxes at or below this score are not drawn", 0.3, operational=True)
    price_per_node_hour: float | None = _option("to say what a million images cost", None, operational=True)
    max_failures: int = _option(
        "times that lost workers or nodes are made up for before giving up", 3, operational=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.batch_size == "auto" or (isinstance(self.batch_size, int) and self.batch_size > 0),
            f"batch_size must be a number above 0, or auto; got {self.batch_size}",
        )
        _require_positive(self, "num_workers", "max_pixels", "top_k", "rows_per_file", "price_per_node_hour")
        _require(
            self.labels is None or (len(self.labels) > 0 and all(label.strip() for label in self.labels)),
            f'labels must be words such as "cat,remote control", got {self.labels}',
        )
        _require(
            (self.checkpoint is None) != (self.model is None),
            "name either --checkpoint, a trained detector, or --model with --labels, a zero-shot one",
        )
        _require(
            (self.model is None) == (self.labels is None),
            "--model, a zero-shot model, and --labels, what it is to look for, go together",
        )
        _require(self.tile is None or self.tile >= 64, f"tile must be at least 64, got {self.tile}")
        _require(0 <= self.overlap <= 0.75, f"overlap must be from 0 to 0.75, got {self.overlap}")
        _require(0 < self.merge_iou <= 1, f"merge_iou must be above 0 and at most 1, got {self.merge_iou}")
        _require(
            self.class_agnostic_nms is None or 0 < self.class_agnostic_nms <= 1,
            f"class_agnostic_nms must be above 0 and at most 1, got {self.class_agnostic_nms}",
        )
        for name in ("draw", "max_failures"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("score_threshold", "draw_threshold"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        _require(
            self.engine == "torch" or not self.compile,
            f"compile is torch's, the engine is {self.engine}",
        )
        _require(
            self.engine == "torch" or not self.use_gpu,
            f"engine {self.engine} runs on CPUs; leave use_gpu out, or choose engine torch",
        )
        _require(
            self.engine == "torch" or self.model is None,
            f"a zero-shot model runs on torch only, the engine is {self.engine}",
        )


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Share a checkpoint on the Hugging Face Hub, with a model card; log in with `hf auth login` or set HF_TOKEN."""

    checkpoint: str = _option("model folder, as written by train")
    repo: str = _option("repository on the Hub, as owner/name; it is made if it is not there")
    private: bool = _option("make a new repository private", False)
    revision: str | None = _option("branch to push to; main by default", None)
    metrics: str | None = _option("metrics folder of evaluate, whose COCO table goes into the model card", None)
    license: str | None = _option("licence named in the model card, as the Hub spells it: apache-2.0, …", None)


@dataclass(frozen=True, kw_only=True)
class ExportCocoConfig:
    """Detections table → COCO results JSON; images table → COCO instances JSON."""

    data: str = _option("detections table or images table")
    out: str = _option("JSON file or URI to write", operational=True)
    score_threshold: float = _option("detections at or below this score are left out", 0.0)

    def __post_init__(self) -> None:
        _require(0 <= self.score_threshold < 1, f"score_threshold must be in [0, 1), got {self.score_threshold}")


@dataclass(frozen=True, kw_only=True)
class _ExportFolderConfig:
    """What exports of one file an image have in common."""

    out: str = _option("folder or URI to write, which must be empty or not there", operational=True)
    split: Literal["train", "val", "test"] = _option("which part of a data set this is", "train")
    copy_images: bool | None = _option(
        "copy the pictures too; by default those whose bytes are in the table, and not those it only refers to", None
    )


@dataclass(frozen=True, kw_only=True)
class ExportVocConfig(_ExportFolderConfig):
    """Images table → Pascal VOC XML files."""

    data: str = _option("images table")
    zero_based: bool = _option("call the first pixel 0 instead of 1, as the VOC devkit does", False)


@dataclass(frozen=True, kw_only=True)
class ExportYoloConfig(_ExportFolderConfig):
    """Images table or detections table → YOLO label files in the layout of Ultralytics."""

    data: str = _option("images table or detections table")
    score_threshold: float = _option("detections at or below this score are left out", 0.0)

    def __post_init__(self) -> None:
        _require(0 <= self.score_threshold < 1, f"score_threshold must be in [0, 1), got {self.score_threshold}")


@dataclass(frozen=True, kw_only=True)
class ExportOnnxConfig:
    """Checkpoint → one ONNX file, from normalised pixels to logits and boxes, checked against the checkpoint."""

    checkpoint: str = _option("model folder, as written by train, or a Hub name")
    out: str = _option("ONNX file to write", operational=True)
    image_size: int | None = _option("side in pixels that pictures are resized or padded to; the model's own", None)

    def __post_init__(self) -> None:
        _require_positive(self, "image_size")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Truth and detections → metrics tables, and the COCO numbers on the screen."""

    truth: str = _option("images table, or COCO instances JSON")
    detections: str = _option("detections table, or COCO results JSON")
    out: str | None = _option(
        "folder of the metrics tables; without it the numbers are only printed", None, operational=True
    )
    run: str | None = _option("name of this run in the tables; by default that of the detections' folder", None)
    model: str | None = _option("name of the model in the tables", None)
    split: str | None = _option("name of the split in the tables; by default that of the truth", None)
    protocol: EvaluationProtocol = _option(
        "coco; lvis: federated, by the truth's neg_category_ids and not_exhaustive_category_ids; voc07: 11 points at "
        "IoU 0.5; voc: all points at IoU 0.5",
        "coco",
    )
    iou_thresholds: list[float] | None = _option("IoU thresholds of AP; COCO's .50:.05:.95 by default", None)
    max_detections: list[int] | None = _option("detections of a class counted in an image; COCO's 1, 10, 100", None)
    class_agnostic: bool = _option("count all classes as one", False)
    allow_partial: bool = _option("measure the images that truth and detections share, if they differ", False)
    slice_by: list[str] = _option(
        "measure groups of images or boxes apart: columns of the images table such as camera, or box_size, crowding, "
        "image_size",
        default_factory=list,
    )
    bootstrap: int = _option("resamples of the images for 95 % intervals, with out; 0 for none", 1000)
    wished_precision: float | None = _option("also say the lowest score threshold of each class that gives it", None)
    seed: int = _option("of the resampling", 0)
    num_shards: int | None = _option(
        "parts matched side by side; the numbers do not depend on it", None, operational=True
    )
    address: str | None = _option(
        "Ray cluster that matches the parts, or `local` for one on this machine; by default threads of this process do",
        None,
        operational=True,
    )

    def __post_init__(self) -> None:
        _require_positive(self, "num_shards")
        _require(self.bootstrap >= 0, f"bootstrap must not be negative, got {self.bootstrap}")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        thresholds, limits = self.iou_thresholds, self.max_detections
        _require(
            thresholds is None
            or (
                0 < len(thresholds) <= 64
                and thresholds == sorted(set(thresholds))
                and 0 < thresholds[0] <= 1
                and thresholds[-1] <= 1
            ),
            f"iou_thresholds must be up to 64 rising numbers above 0 and at most 1, got {thresholds}",
        )
        _require(
            limits is None or (len(limits) > 0 and limits == sorted(set(limits)) and limits[0] > 0),
            f"max_detections must be rising numbers above 0, got {limits}",
        )
        _require(
            self.wished_precision is None or 0 < self.wished_precision <= 1,
            f"wished_precision must be above 0 and at most 1, got {self.wished_precision}",
        )
        _require(
            self.protocol == "coco" or (thresholds is None and not self.class_agnostic),
            f"the protocol {self.protocol} has its own rules: leave out iou_thresholds and class_agnostic",
        )


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Two detections of the same images beside each other: paired differences with intervals, by class and image."""

    truth: str = _option("images table, or COCO instances JSON")
    first: str = _option("detections table, or COCO results JSON")
    second: str = _option("detections table, or COCO results JSON")
    out: str | None = _option("folder of the tables; without it the numbers are only printed", None, operational=True)
    bootstrap: int = _option("resamples of the images for 95 % intervals", 1000)
    seed: int = _option("of the resampling", 0)
    num_images: int = _option("images that changed most to list", 20)

    def __post_init__(self) -> None:
        _require_positive(self, "bootstrap", "num_images")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Metrics tables → one HTML file that opens offline."""

    metrics: str = _option("folder that evaluate wrote")
    out: str | None = _option("HTML file to write; report.html in that folder by default", None, operational=True)
    run: str | None = _option("which run, where the folder holds several; the last by default", None)
    train_run: str | None = _option("run folder of train, for the training curves", None)
    num_images: int = _option("pictures in each gallery", 12)

    def __post_init__(self) -> None:
        _require(self.num_images >= 0, f"num_images must not be negative, got {self.num_images}")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole way on generated images: prepare, train, predict, evaluate."""

    out: str = _option("run folder", "runs/demo", operational=True)
    recipe: str | None = _option("training config; jobs/configs/demo.yaml by default", None)
    num_train: int = _option("training images", 800)
    num_val: int = _option("held-out images", 100)
    epochs: int | None = _option("passes over the training images; the recipe's by default", None)
    num_workers: int = _option("training workers", 1, operational=True)

    def __post_init__(self) -> None:
        _require_positive(self, "num_train", "num_val", "epochs", "num_workers")


def field_names(config_class: type) -> list[str]:
    """The options of a config, in the order they are declared."""
    return [item.name for item in fields_of(config_class)]


def fields_of(config_class: type) -> tuple[dataclasses.Field[Any], ...]:
    """The declarations of a config's options, in order."""
    return dataclasses.fields(config_class)


def is_required(item: "dataclasses.Field[Any]") -> bool:
    """Whether an option has no default."""
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def default_of(item: "dataclasses.Field[Any]") -> Any:
    """What an option is when it is not given."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def identity(config: Any) -> dict[str, Any]:
    """The fields that decide what comes out, without the operational ones."""
    return {
        item.name: getattr(config, item.name) for item in dataclasses.fields(config) if not item.metadata["operational"]
    }


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that stand for a config's identity."""
    content = json.dumps([type(config).__name__, identity(config)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def to_yaml(config: Any) -> str:
    """The whole resolved config, every field with its value."""
    # Not needed by those who only build a config.
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def changed_fields(config: Any, earlier: dict[str, Any]) -> list[str]:
    """Which identity fields differ from an earlier config of the same class, as `name: then → now`."""
    now = identity(config)
    return [f"{name}: {earlier.get(name)} → {now[name]}" for name in now if earlier.get(name) != now[name]]
