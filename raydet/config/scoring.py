"""`predict`: a model and any number of images → a detections table."""

from collections import Counter
from typing import Literal

from raydet.config.fields import config, flag, option, require, require_not_negative, require_positive
from raydet.config.preparing import DEFAULT_MAX_PIXELS
from raydet.config.workers import Precision, WorkersConfig

Engine = Literal["torch", "openvino", "onnx"]
ResizeOn = Literal["cpu", "device"]
Merge = Literal["nms", "wbf"]
Keep = Literal["class_scores", "embedding", "thumbnail"]
DrawIf = Literal["any", "low_score", "many_boxes"]


@config
class PredictConfig(WorkersConfig):
    """Run a detector over any number of images → a detections table, one row per image; or draw boxes on pictures."""

    data: list[str] | str = option(
        "path or URI of an images table, a folder of images, a list of paths (.txt), a .tar, a folder of .tar "
        "files, or a video; or pictures: image files or web addresses, separated by blanks, which are drawn with their "
        "boxes",
        value="DATA",
    )
    out: str = option(
        "folder or URI of the detections table to write; for pictures optional: the image file or folder to write",
        "",
        operational=True,
    )

    checkpoint: str | None = option("model folder, as written by train, or a Hub name; required without --model", None)
    adapter: list[str] | str | None = option(
        "with --checkpoint: folders with LoRA adapters of this model, as train --lora writes them into OUT/adapter, "
        "separated by blanks; all are scored in one pass over the images, each into the table OUT/NAME",
        None,
        value="FOLDER",
        is_later=True,
    )
    model: str | None = option(
        "instead of --checkpoint: a zero-shot model (OWL-ViT, OWLv2, Grounding DINO), as folder or Hub name", None
    )
    labels: list[str] | None = option('with --model: objects to look for, such as "cat,remote control"', None)
    examples: str | None = option(
        "with --model (OWL-ViT, OWLv2): folder with a sub-folder for each class, named like it, with pictures of one "
        "object each; instead of --labels, or with them",
        None,
        value="FOLDER",
        is_later=True,
    )
    prompt_template: list[str] | None = option(
        'with --labels (OWL-ViT, OWLv2): texts in which {} stands for the label, such as "a photo of a {}"; what the '
        "model makes of several is averaged",
        None,
        is_later=True,
    )
    num_workers: int = option("parallel workers, each with a copy of the model", 1, operational=True)
    batch_size: int | Literal["auto"] = option(
        "images (or tiles) per forward pass; auto chooses the fastest; may differ when a run resumes",
        16,
        operational=True,
    )
    score_threshold: float | None = option(
        "drop detections at or below this score; by default 0, which keeps all, as AP requires; for pictures 0.3", None
    )

    operating_point: bool = option(
        "apply what raydet fit wrote into the checkpoint: score thresholds by class, calibrated scores, suppression",
        False,
    )

    engine: Engine = option(
        'engine that runs the model; openvino runs on CPUs and needs pip install "raydet[openvino]", onnx needs '
        '"raydet[onnx]", and onnxruntime-gpu instead of onnxruntime to use GPUs',
        "torch",
        group="Model",
    )
    precision: Precision = option("fp32; bf16 or fp16 if engine and hardware support it", "fp32", group="Model")
    compile: bool = option("compile the model with torch.compile", False, group="Model")
    channels_last: bool = option(
        "with --engine torch: use the channels-last memory format, which is faster", True, group="Model"
    )
    pad_batches: bool = option(
        "for models that keep the aspect ratio: pad images of similar shape to one size; otherwise each size is a "
        "separate batch",
        True,
        group="Model",
    )

    reduced_decode: bool = option(
        "decode large JPEGs at half, quarter or eighth resolution, which is faster", False, group="Input"
    )
    resize_on: ResizeOn = option(
        "cpu resizes in the decoders, bit for bit as the image processor does; device resizes in float32 where the "
        "model runs, which spares CPUs and changes scores slightly",
        "cpu",
        group="Input",
    )
    limit: int | None = option("score only this many images, the first ones; by default all", None, group="Input")
    fps: float | None = option(
        "with a video, or a folder or list of videos, as --data: frames to score per second, those on screen at that "
        "time; by default all frames of a single video",
        None,
        group="Input",
        is_later=True,
    )
    max_pixels: int = option("reject larger images as decompression bombs", DEFAULT_MAX_PIXELS, group="Input")
    allow_root: list[str] | None = option(
        "with a folder as --data: further folders that its symbolic links may lead to, such as the Hub's cache",
        None,
        group="Input",
    )

    tile: int | None = option(
        "side in pixels of the tiles that large images are cut into", None, group="Tiles and merging"
    )
    tile_overlap: float = option(
        "with --tile: fraction of a tile that it shares with its neighbour", 0.2, group="Tiles and merging"
    )
    whole_image: bool = option(
        "with --tile, unless --windowed: also score the whole image", True, group="Tiles and merging"
    )
    windowed: bool = option(
        "with --tile: read each tile from its file by itself, never a whole image; for TIFF files of any size",
        False,
        group="Tiles and merging",
        is_later=True,
    )
    flip: bool = option(
        "also score each image mirrored, and merge the best 100 boxes of both", False, group="Tiles and merging"
    )
    merge: Merge = option(
        "with --tile or --flip: nms keeps the best of overlapping boxes; wbf averages them (weighted box fusion)",
        "nms",
        group="Tiles and merging",
    )
    merge_iou: float = option(
        "with --tile or --flip: IoU above which two boxes of a class count as one object",
        0.5,
        group="Tiles and merging",
    )

    top_k: int | None = option(
        "maximum detections per image, the best-scoring ones; by default the model's own limit, with --windowed none",
        None,
        group="Detections",
    )
    classes: list[str] | None = option("classes to keep, by name; by default all", None, group="Detections")
    class_agnostic_nms: float | None = option(
        "drop a box that overlaps a better one of any class by more than this IoU; off by default",
        None,
        group="Detections",
    )

    keep: list[Keep] | None = option(
        "what else to store, one or more of: class_scores (of all classes, for each query that has a detection), "
        "embedding (the decoder's for each such query, and one of the image), thumbnail (the image at 8 × 8 pixels, by "
        "which `select` finds near-duplicates)",
        None,
        group="Detections",
    )

    rows_per_file: int | None = option(
        "images per output file, the unit of work that is repeated after a crash; by default up to 1024, rounded up to "
        "whole batches",
        None,
        group="Output",
        operational=True,
    )
    draw: int = option("images to draw with their boxes, into OUT/__drawn", 0, group="Output", operational=True)
    draw_if: DrawIf = option(
        "with --draw: any image, low_score (best box near --draw-threshold), or many_boxes",
        "any",
        group="Output",
        operational=True,
    )
    draw_threshold: float = option("with --draw: draw boxes above this score", 0.3, group="Output", operational=True)

    price_per_node_hour: float | None = option(
        "price of a node, to report the cost of a million images", None, group="Compute and cluster", operational=True
    )
    max_failures: int = option(
        "failures of workers or nodes to recover from before giving up",
        3,
        group="Compute and cluster",
        operational=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.batch_size == "auto" or (isinstance(self.batch_size, int) and self.batch_size > 0),
            f"--batch-size must be a number above 0, or auto; got {self.batch_size}",
        )
        require_positive(
            self, "num_workers", "limit", "fps", "max_pixels", "top_k", "rows_per_file", "price_per_node_hour"
        )
        require(
            self.labels is None or (len(self.labels) > 0 and all(label.strip() for label in self.labels)),
            f'--labels must be words such as "cat,remote control", got {self.labels}',
        )
        require(
            (self.checkpoint is None) != (self.model is None),
            "set either --checkpoint (a trained detector), or --model with --labels (a zero-shot model)",
        )
        require(
            (self.model is None) == (self.labels is None and self.examples is None),
            "--model (a zero-shot model) and --labels or --examples (the objects to look for) must be set together",
        )
        templates = self.prompt_template or []
        require(
            all(template.count("{}") == 1 and template.count("{") == 1 for template in templates),
            f"--prompt-template must contain {{}} once, got {templates}",
        )
        require(not templates or self.labels is not None, "--prompt-template needs --labels")
        require(
            not self.operating_point or self.checkpoint is not None,
            "--operating-point needs --checkpoint: raydet fit writes it into a checkpoint",
        )
        require(
            not (self.operating_point and (self.score_threshold or self.class_agnostic_nms)),
            "--operating-point has its own thresholds and suppression: omit --score-threshold and --class-agnostic-nms",
        )
        require(self.tile is None or self.tile >= 64, f"--tile must be at least 64, got {self.tile}")
        self._check_windowed()
        require(0 <= self.tile_overlap <= 0.75, f"--tile-overlap must be from 0 to 0.75, got {self.tile_overlap}")
        require(0 < self.merge_iou <= 1, f"--merge-iou must be above 0 and at most 1, got {self.merge_iou}")
        require(
            self.class_agnostic_nms is None or 0 < self.class_agnostic_nms <= 1,
            f"--class-agnostic-nms must be above 0 and at most 1, got {self.class_agnostic_nms}",
        )
        require_not_negative(self, "draw", "max_failures")
        for name in ("score_threshold", "draw_threshold"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"{flag(name)} must be in [0, 1), got {value}")
        self._check_keep()
        self._check_adapter()
        require(
            self.engine == "torch" or not self.compile,
            f"--compile needs --engine torch, got {self.engine}",
        )
        require(
            self.resize_on == "cpu" or self.engine == "torch",
            f"--resize-on device needs --engine torch, got {self.engine}",
        )
        require(
            self.resize_on == "cpu" or self.model is None,
            "--resize-on device needs --checkpoint: a zero-shot model resizes with its own image processor",
        )
        require(
            self.engine != "openvino" or not self.use_gpu,
            "--engine openvino runs on CPUs: omit --use-gpu, or choose --engine torch or onnx",
        )
        require(
            self.engine == "torch" or self.model is None,
            f"--model, a zero-shot model, needs --engine torch, got {self.engine}",
        )

    def _check_windowed(self) -> None:
        if not self.windowed:
            return
        require(self.tile is not None, "--windowed needs --tile, the side of the windows")
        require(not self.draw, "--draw cannot be combined with --windowed: it draws whole images")
        require(self.fps is None, "--fps cannot be combined with --windowed: it needs videos, not TIFF files")
        require(self.adapter is None, "--adapter cannot be combined with --windowed: give one model at a time")
        require(
            isinstance(self.data, str) or len(self.data) == 1,
            "--windowed takes one place as --data: a TIFF file, a folder of them, a list of paths or tar files",
        )

    def _check_keep(self) -> None:
        require(
            not (self.windowed and self.keep),
            "--keep cannot be combined with --windowed, which merges many windows",
        )
        if not self.keeps_vectors:
            return
        reasons = {
            f"--engine {self.engine}: it needs --engine torch": self.engine != "torch",
            "--model: it needs a trained detector": self.model is not None,
            "--tile, which merges boxes of several queries": self.tile is not None,
            "--flip, which merges boxes of several queries": self.flip,
            "--compile: only class_scores can": self.compile and "embedding" in self.keeps_vectors,
        }
        reason = next((reason for reason, applies in reasons.items() if applies), "")
        require(not reason, f"--keep {','.join(self.keeps_vectors)} cannot be combined with {reason}")

    def _check_adapter(self) -> None:
        if self.adapter is None:
            return
        require(bool(self.adapters) and all(self.adapters), f"--adapter must name folders, got {self.adapter}")
        require(
            self.checkpoint is not None, "--adapter needs --checkpoint: the model that the adapters were trained on"
        )
        require(self.engine == "torch", f"--adapter needs --engine torch, got {self.engine}")
        require(
            not self.compile,
            "--compile cannot be combined with --adapter: torch would compile a graph per adapter and soon give up; "
            "omit --compile",
        )
        require(
            not self.operating_point,
            "--operating-point cannot be combined with --adapter: raydet fit writes it into a checkpoint, so score "
            "the merged OUT/checkpoint",
        )

    @property
    def adapters(self) -> list[str]:
        """The folders that `adapter` names; empty without it."""
        return [self.adapter] if isinstance(self.adapter, str) else self.adapter or []

    @property
    def keeps_vectors(self) -> list[Keep]:
        """The vectors of queries that `keep` names."""
        return [name for name in self.keep or () if name in ("class_scores", "embedding")]

    @property
    def data_uri(self) -> str:
        """The table, folder, list or tar files that `data` names, if it does not name pictures."""
        assert isinstance(self.data, str), "several places are pictures"
        return self.data


CropsTask = Literal[
    "image-classification",
    "zero-shot-image-classification",
    "image-text-to-text",
    "image-feature-extraction",
    "depth-estimation",
]


@config
class CropsConfig(WorkersConfig):
    """Detections and their images → what a second model says about each detection: a class, an answer, a vector."""

    detections: str = option("detections table, as written by predict")
    data: str = option("the images that were scored, as given to predict")
    model: str = option("model folder, or a Hub name")
    task: CropsTask = option("what the model does, in the Hub's words")
    out: str = option("folder or URI of the crops table to write", operational=True)

    labels: list[str] | None = option(
        "with zero-shot-image-classification: classes to choose from, in words", None, group="Model"
    )
    prompt_template: str | None = option(
        'with --labels: text in which {} stands for the label; by default "This is a photo of {}."', None, group="Model"
    )
    ask: list[str] | None = option(
        "with image-text-to-text: questions, or the text to continue; several may be asked; without one the model "
        "describes the crop",
        None,
        group="Model",
    )
    max_new_tokens: int = option("with image-text-to-text: longest answer in tokens", 32, group="Model")
    top_k: int = option("with classification: classes to store, the best ones", 5, group="Model")
    precision: Precision = option("fp32; bf16 or fp16 if the hardware supports it", "fp32", group="Model")
    batch_size: int = option("crops per forward pass", 16)

    score_threshold: float = option("look only at detections with at least this score", 0.3, group="Detections")
    margin: float = option("share of a box's width and height that is added on each side", 0.0, group="Detections")
    min_side: int = option("smallest side of a crop in pixels; smaller ones get no answer", 4, group="Detections")
    max_pixels: int = option("reject larger images as decompression bombs", DEFAULT_MAX_PIXELS, group="Input")
    allow_root: list[str] | None = option(
        "with a folder as --data: further folders that its symbolic links may lead to", None, group="Input"
    )
    fps: float | None = option(
        "with videos as --data: frames per second, as given to predict", None, group="Input", is_later=True
    )

    relabel: float | None = option(
        "with classification: also write OUT/relabelled, the detections with the class of each label that has at least "
        "this score",
        None,
        group="Output",
        operational=True,
    )
    rows_per_file: int | None = option(
        "images per output file, the unit of work that is repeated after a crash; by default 64",
        None,
        group="Output",
        operational=True,
    )
    num_workers: int = option(
        "parallel workers, each with a copy of the model", 1, group="Compute and cluster", operational=True
    )
    max_failures: int = option(
        "on a Ray cluster: times that each worker is replaced after it was lost, before giving up",
        3,
        group="Compute and cluster",
        operational=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self,
            "max_new_tokens",
            "top_k",
            "batch_size",
            "min_side",
            "max_pixels",
            "fps",
            "rows_per_file",
            "num_workers",
        )
        require_not_negative(self, "max_failures")
        require(0 <= self.score_threshold <= 1, f"--score-threshold must be from 0 to 1, got {self.score_threshold}")
        require(0 <= self.margin <= 10, f"--margin must be from 0 to 10, got {self.margin}")
        require(
            self.relabel is None or (self.task.endswith("classification") and 0 <= self.relabel <= 1),
            "--relabel must be from 0 to 1, with a --task that is a classification",
        )
        is_zero_shot = self.task == "zero-shot-image-classification"
        require(
            is_zero_shot == bool(self.labels),
            "--task zero-shot-image-classification and --labels (the classes to choose from) must be set together",
        )
        require(
            self.prompt_template is None or (is_zero_shot and self.prompt_template.count("{}") == 1),
            "--prompt-template needs --labels, and must contain {} once",
        )
        repeated = [label for label, number in Counter(self.labels or []).items() if number > 1]
        require(not repeated, f"--labels names {', '.join(repeated)} more than once")
        texts = [*(self.labels or []), *(self.ask or [])]
        require(all(text.strip() for text in texts), "--labels and --ask must not be empty texts")
        require(not self.ask or self.task == "image-text-to-text", "--ask needs --task image-text-to-text")
