"""`export` and `push`: tables and checkpoints → formats that other tools open."""

from typing import Literal

from raydet.config.fields import config, option, require, require_not_negative, require_positive


@config
class PushConfig:
    """Upload a checkpoint or tables to the Hugging Face Hub; log in with `hf auth login` or set HF_TOKEN."""

    repo: str = option("repository on the Hub, as owner/name; created if it does not exist")
    checkpoint: str | None = option("model folder, as written by train", None)
    data: str | None = option(
        "instead of a checkpoint, what becomes a data set: a table, a folder with the tables train and val, or a "
        "metrics folder",
        None,
    )
    private: bool = option("make a new repository private", False)
    revision: str | None = option("branch to push to; by default main", None)
    metrics: str | None = option("metrics folder, as written by evaluate, for the table in the model card", None)
    license: str | None = option("licence stated in the card, in the Hub's spelling: apache-2.0, …", None)

    def __post_init__(self) -> None:
        require((self.checkpoint is None) != (self.data is None), "push takes either --checkpoint or --data")
        require(
            self.metrics is None or self.data is None,
            "--metrics is for the model card of a checkpoint; to push the metrics themselves, name their folder with "
            "--data",
        )


@config
class ExportCocoConfig:
    """Detections table → COCO results JSON; images table → COCO instances JSON."""

    data: str = option("detections table or images table")
    out: str = option("JSON file or URI to write", operational=True)
    score_threshold: float = option("drop detections at or below this score", 0.0)

    def __post_init__(self) -> None:
        require(0 <= self.score_threshold < 1, f"--score-threshold must be in [0, 1), got {self.score_threshold}")


@config
class _ExportFolderConfig:
    """Options of the exports that write a folder with labels and images."""

    out: str = option("folder or URI to write; must be absent or empty", operational=True)
    copy_images: bool | None = option("copy the images too; by default those whose bytes are in the table", None)


@config
class _ExportToolConfig(_ExportFolderConfig):
    """Options of the exports to annotation tools."""

    data: str = option("images table, or detections table for boxes to correct")
    score_threshold: float = option("drop detections at or below this score", 0.0)

    def __post_init__(self) -> None:
        require(0 <= self.score_threshold < 1, f"--score-threshold must be in [0, 1), got {self.score_threshold}")


@config
class ExportCvatConfig(_ExportToolConfig):
    """Images table or detections table → CVAT's XML 1.1 ("CVAT for images")."""


@config
class ExportLabelStudioConfig(_ExportToolConfig):
    """Images table or detections table → Label Studio's JSON: annotations, or predictions with scores."""

    image_prefix: str = option(
        "start of the image addresses, before the file name: a bucket, a URL, or by default Label Studio's local files",
        "/data/local-files/?d=images/",
    )


@config
class ExportVocConfig(_ExportFolderConfig):
    """Images table → Pascal VOC XML files."""

    data: str = option("images table")
    split: Literal["train", "val", "test"] = option("name of the split in the exported layout", "train")
    zero_based: bool = option("number pixels from 0; the VOC devkit numbers them from 1", False)


@config
class ExportYoloConfig(_ExportFolderConfig):
    """Images table or detections table → YOLO label files in Ultralytics layout."""

    data: str = option("images table or detections table")
    split: Literal["train", "val", "test"] = option("name of the split in the exported layout", "train")
    score_threshold: float = option("drop detections at or below this score", 0.0)

    def __post_init__(self) -> None:
        require(0 <= self.score_threshold < 1, f"--score-threshold must be in [0, 1), got {self.score_threshold}")


@config
class ExportOnnxConfig:
    """Checkpoint → one ONNX file, from normalised pixels to logits and boxes, verified against the checkpoint."""

    checkpoint: str = option("model folder, as written by train, or a Hub name")
    out: str = option("ONNX file to write", operational=True)
    image_size: int | None = option("input side in pixels; by default the model's own", None)
    pixels_in: bool = option(
        "the graph also resizes, normalises and chooses the best detections: from pixels of pictures to boxes", False
    )
    check_data: str | None = option(
        "with --pixels-in: images table with labels, to compare AP and boxes of graph and checkpoint on", None
    )

    def __post_init__(self) -> None:
        require_positive(self, "image_size")
        require(self.check_data is None or self.pixels_in, "--check-data needs --pixels-in")
        require(
            self.check_data is None or self.image_size is None,
            "--check-data compares with the checkpoint at its own size; omit --image-size",
        )


@config
class ExportOpenvinoConfig:
    """Checkpoint → a folder with an OpenVINO graph, in float or INT8, for `predict --engine openvino`."""

    checkpoint: str = option("model folder, as written by train, or a Hub name")
    out: str = option("folder or URI to write; must be absent or empty", operational=True)
    fp16_weights: bool = option("store weights in fp16: half the size, and slightly different scores", False)
    pixels_in: bool = option(
        "also write pixels_in.xml, a graph that resizes, normalises and chooses the best detections: from pixels of "
        'pictures to boxes; needs pip install "raydet[onnx]"',
        False,
    )
    check_data: str | None = option(
        "images table with labels, to compare AP and boxes of graph (of pixels_in.xml, if written) and checkpoint on",
        None,
    )
    int8: bool = option('quantise to INT8 as much as --max-ap-drop allows; needs pip install "raydet[int8]"', False)
    calibration: str | None = option("with --int8: images table of typical images, such as the training images", None)
    calibration_images: int = option("with --int8: images of that table to calibrate with", 300)
    truth: str | None = option("with --int8: images table with labels that were not trained on, to measure AP", None)
    max_ap_drop: float = option(
        "with --int8: loss of AP that the 95 % interval of the difference to the float model must exclude", 0.005
    )
    bootstrap: int = option("with --int8: resamples of the images for the interval", 1000)
    seed: int = option("with --int8: seed of the resamples", 0)

    def __post_init__(self) -> None:
        require_positive(self, "calibration_images", "bootstrap")
        require_not_negative(self, "seed")
        require(0 < self.max_ap_drop < 1, f"--max-ap-drop must be above 0 and below 1, got {self.max_ap_drop}")
        tables = {"--calibration": self.calibration, "--truth": self.truth}
        for name, table in tables.items():
            require(self.int8 or table is None, f"{name} needs --int8")
            require(not self.int8 or table is not None, f"--int8 needs {name}, an images table")
        require(
            not (self.int8 and self.fp16_weights),
            "--fp16-weights changes the graph after --int8 has measured it; omit it with --int8",
        )
        require(not (self.int8 and self.pixels_in), "--pixels-in writes a float graph; omit it with --int8")
        require(
            not (self.int8 and self.check_data),
            "--check-data compares a float graph with the checkpoint; --int8 measures AP on --truth instead",
        )
