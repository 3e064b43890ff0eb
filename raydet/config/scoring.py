"""`predict`: a model over images, however many."""

from dataclasses import dataclass
from typing import Literal

from raydet.config.fields import option, require, require_positive
from raydet.config.preparing import DEFAULT_MAX_PIXELS
from raydet.config.workers import Precision, WorkersConfig

Engine = Literal["torch", "openvino", "onnx"]
Merge = Literal["nms", "wbf"]
DrawIf = Literal["any", "low_score", "many_boxes"]


@dataclass(frozen=True, kw_only=True)
class PredictConfig(WorkersConfig):
    """Run a model over any number of images → a detections table, one row for each image."""

    num_workers: int = option("workers side by side, each with its copy of the model", 1, operational=True)
    checkpoint: str | None = option("model folder, as written by train, or a Hub name", None)
    model: str | None = option(
        "instead of checkpoint: a zero-shot model (OWL-ViT, OWLv2, Grounding DINO), by folder or Hub name", None
    )
    labels: list[str] | None = option('what a zero-shot model is to look for: "cat,remote control"', None)
    data: str = option(
        "images table, folder of images, list of paths (.txt), or tar files (a .tar, or a folder of them); or URIs"
    )
    out: str = option("folder or URI of the detections table", operational=True)

    engine: Engine = option(
        'what runs the model; openvino and onnx are for CPUs, after pip install "raydet[openvino]" or "raydet[onnx]"',
        "torch",
    )
    precision: Precision = option("fp32, or bf16 or fp16 where the engine and the hardware have it", "fp32")
    compile: bool = option("compile the model with torch.compile", False)
    channels_last: bool = option("for torch: keep the channels of a pixel together in memory, which is faster", True)
    batch_size: int | Literal["auto"] = option(
        "images (or tiles) that the model sees at once; auto measures; a run may go on with another",
        16,
        operational=True,
    )
    pad_together: bool = option(
        "for models that keep the aspect: pad images of like shape to one size; without it each size runs by itself",
        True,
    )
    reduced_decode: bool = option("decode large JPEGs at a half, quarter or eighth of their size", False)
    max_pixels: int = option("larger pictures are reported as decompression bombs", DEFAULT_MAX_PIXELS)

    tile: int | None = option("side in pixels of the tiles that large pictures are cut into", None)
    overlap: float = option("with tile: part of a tile that it shares with its neighbour", 0.2)
    whole_image: bool = option("with tile: look at the picture as a whole, too", True)
    flip: bool = option("look at each picture mirrored, too, and merge the best 100 boxes of both", False)
    merge: Merge = option(
        "with tile or flip: nms keeps the best of boxes that overlap, wbf averages them (weighted box fusion)", "nms"
    )
    merge_iou: float = option("with tile or flip: IoU from which two boxes of a class are taken for one object", 0.5)

    score_threshold: float = option("detections at or below this score are left out; 0 keeps all, as AP needs", 0.0)
    top_k: int | None = option("most detections of an image, the best ones; the model's own number by default", None)
    classes: list[str] | None = option("classes to keep, by name; all by default", None)
    class_agnostic_nms: float | None = option(
        "leave out a box that overlaps a better one of any class by more than this IoU; off by default", None
    )

    rows_per_file: int | None = option(
        "images of an output file, the unit of work that is done again after a kill; by default up to 1024, "
        "rounded up to whole batches",
        None,
        operational=True,
    )
    draw: int = option("pictures to draw with their boxes, into OUT/_drawn", 0, operational=True)
    draw_if: DrawIf = option(
        "with draw: any picture, low_score (best box near draw_threshold), or many_boxes", "any", operational=True
    )
    draw_threshold: float = option("with draw: boxes at or below this score are not drawn", 0.3, operational=True)
    price_per_node_hour: float | None = option("to say what a million images cost", None, operational=True)
    max_failures: int = option("times that lost workers or nodes are made up for before giving up", 3, operational=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.batch_size == "auto" or (isinstance(self.batch_size, int) and self.batch_size > 0),
            f"batch_size must be a number above 0, or auto; got {self.batch_size}",
        )
        require_positive(self, "num_workers", "max_pixels", "top_k", "rows_per_file", "price_per_node_hour")
        require(
            self.labels is None or (len(self.labels) > 0 and all(label.strip() for label in self.labels)),
            f'labels must be words such as "cat,remote control", got {self.labels}',
        )
        require(
            (self.checkpoint is None) != (self.model is None),
            "name either --checkpoint, a trained detector, or --model with --labels, a zero-shot one",
        )
        require(
            (self.model is None) == (self.labels is None),
            "--model, a zero-shot model, and --labels, what it is to look for, go together",
        )
        require(self.tile is None or self.tile >= 64, f"tile must be at least 64, got {self.tile}")
        require(0 <= self.overlap <= 0.75, f"overlap must be from 0 to 0.75, got {self.overlap}")
        require(0 < self.merge_iou <= 1, f"merge_iou must be above 0 and at most 1, got {self.merge_iou}")
        require(
            self.class_agnostic_nms is None or 0 < self.class_agnostic_nms <= 1,
            f"class_agnostic_nms must be above 0 and at most 1, got {self.class_agnostic_nms}",
        )
        for name in ("draw", "max_failures"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("score_threshold", "draw_threshold"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        require(
            self.engine == "torch" or not self.compile,
            f"compile is torch's, the engine is {self.engine}",
        )
        require(
            self.engine == "torch" or not self.use_gpu,
            f"engine {self.engine} runs on CPUs; leave use_gpu out, or choose engine torch",
        )
        require(
            self.engine == "torch" or self.model is None,
            f"a zero-shot model runs on torch only, the engine is {self.engine}",
        )
