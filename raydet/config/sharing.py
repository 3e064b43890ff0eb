"""`export` and `push`: what others open."""

from dataclasses import dataclass
from typing import Literal

from raydet.config.fields import option, require, require_positive


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Share a checkpoint on the Hugging Face Hub, with a model card; log in with `hf auth login` or set HF_TOKEN."""

    checkpoint: str = option("model folder, as written by train")
    repo: str = option("repository on the Hub, as owner/name; it is made if it is not there")
    private: bool = option("make a new repository private", False)
    revision: str | None = option("branch to push to; main by default", None)
    metrics: str | None = option("metrics folder of evaluate, whose COCO table goes into the model card", None)
    license: str | None = option("licence named in the model card, as the Hub spells it: apache-2.0, …", None)


@dataclass(frozen=True, kw_only=True)
class ExportCocoConfig:
    """Detections table → COCO results JSON; images table → COCO instances JSON."""

    data: str = option("detections table or images table")
    out: str = option("JSON file or URI to write", operational=True)
    score_threshold: float = option("detections at or below this score are left out", 0.0)

    def __post_init__(self) -> None:
        require(0 <= self.score_threshold < 1, f"score_threshold must be in [0, 1), got {self.score_threshold}")


@dataclass(frozen=True, kw_only=True)
class _ExportFolderConfig:
    """What exports of one file an image have in common."""

    out: str = option("folder or URI to write, which must be empty or not there", operational=True)
    split: Literal["train", "val", "test"] = option("which part of a data set this is", "train")
    copy_images: bool | None = option(
        "copy the pictures too; by default those whose bytes are in the table, and not those it only refers to", None
    )


@dataclass(frozen=True, kw_only=True)
class ExportVocConfig(_ExportFolderConfig):
    """Images table → Pascal VOC XML files."""

    data: str = option("images table")
    zero_based: bool = option("call the first pixel 0 instead of 1, as the VOC devkit does", False)


@dataclass(frozen=True, kw_only=True)
class ExportYoloConfig(_ExportFolderConfig):
    """Images table or detections table → YOLO label files in the layout of Ultralytics."""

    data: str = option("images table or detections table")
    score_threshold: float = option("detections at or below this score are left out", 0.0)

    def __post_init__(self) -> None:
        require(0 <= self.score_threshold < 1, f"score_threshold must be in [0, 1), got {self.score_threshold}")


@dataclass(frozen=True, kw_only=True)
class ExportOnnxConfig:
    """Checkpoint → one ONNX file, from normalised pixels to logits and boxes, checked against the checkpoint."""

    checkpoint: str = option("model folder, as written by train, or a Hub name")
    out: str = option("ONNX file to write", operational=True)
    image_size: int | None = option("side in pixels that pictures are resized or padded to; the model's own", None)

    def __post_init__(self) -> None:
        require_positive(self, "image_size")
