"""`evaluate`, `compare` and `report`."""

from dataclasses import dataclass
from typing import Literal

from raydet.config.fields import option, require, require_positive

EvaluationProtocol = Literal["coco", "lvis", "voc07", "voc"]
JoinKey = Literal["id", "path"]

_JOIN = "what is the same for one image on both sides: its id, or its path, whatever folder it lies in"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Truth and detections → metrics tables, and the COCO numbers on the screen."""

    truth: str = option("images table, or COCO instances JSON")
    detections: str = option("detections table, or COCO results JSON")
    out: str | None = option(
        "folder of the metrics tables; without it the numbers are only printed", None, operational=True
    )
    run: str | None = option("name of this run in the tables; by default that of the detections' folder", None)
    model: str | None = option("name of the model in the tables", None)
    split: str | None = option("name of the split in the tables; by default that of the truth", None)
    protocol: EvaluationProtocol = option(
        "coco; lvis: federated, by the truth's neg_category_ids and not_exhaustive_category_ids; voc07: 11 points at "
        "IoU 0.5; voc: all points at IoU 0.5",
        "coco",
    )
    iou_thresholds: list[float] | None = option("IoU thresholds of AP; COCO's .50:.05:.95 by default", None)
    max_detections: list[int] | None = option("detections of a class counted in an image; COCO's 1, 10, 100", None)
    class_agnostic: bool = option("count all classes as one", False)
    allow_partial: bool = option("measure the images that truth and detections share, if they differ", False)
    join: JoinKey = option(_JOIN, "id")
    slice_by: list[str] = option(
        "measure groups of images or boxes apart: columns of the images table such as camera, or box_size, crowding, "
        "image_size",
        default_factory=list,
    )
    bootstrap: int = option("resamples of the images for 95 % intervals, with out; 0 for none", 1000)
    wished_precision: float | None = option("also say the lowest score threshold of each class that gives it", None)
    seed: int = option("of the resampling", 0)
    num_shards: int | None = option(
        "parts matched side by side; the numbers do not depend on it", None, operational=True
    )
    address: str | None = option(
        "Ray cluster that matches the parts, or `local` for one on this machine; by default threads of this process do",
        None,
        operational=True,
    )

    def __post_init__(self) -> None:
        require_positive(self, "num_shards")
        require(self.bootstrap >= 0, f"bootstrap must not be negative, got {self.bootstrap}")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        thresholds, limits = self.iou_thresholds, self.max_detections
        require(
            thresholds is None
            or (
                0 < len(thresholds) <= 64
                and thresholds == sorted(set(thresholds))
                and 0 < thresholds[0] <= 1
                and thresholds[-1] <= 1
            ),
            f"iou_thresholds must be up to 64 rising numbers above 0 and at most 1, got {thresholds}",
        )
        require(
            limits is None or (len(limits) > 0 and limits == sorted(set(limits)) and limits[0] > 0),
            f"max_detections must be rising numbers above 0, got {limits}",
        )
        require(
            self.wished_precision is None or 0 < self.wished_precision <= 1,
            f"wished_precision must be above 0 and at most 1, got {self.wished_precision}",
        )
        require(
            self.protocol == "coco" or (thresholds is None and not self.class_agnostic),
            f"the protocol {self.protocol} has its own rules: leave out iou_thresholds and class_agnostic",
        )


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Two detections of the same images beside each other: paired differences with intervals, by class and image."""

    truth: str = option("images table, or COCO instances JSON")
    first: str = option("detections table, or COCO results JSON")
    second: str = option("detections table, or COCO results JSON")
    out: str | None = option("folder of the tables; without it the numbers are only printed", None, operational=True)
    bootstrap: int = option("resamples of the images for 95 % intervals", 1000)
    seed: int = option("of the resampling", 0)
    join: JoinKey = option(_JOIN, "id")
    num_images: int = option("images that changed most to list", 20)

    def __post_init__(self) -> None:
        require_positive(self, "bootstrap", "num_images")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Metrics tables → one HTML file that opens offline."""

    metrics: str = option("folder that evaluate wrote")
    out: str | None = option("HTML file to write; report.html in that folder by default", None, operational=True)
    run: str | None = option("which run, where the folder holds several; the last by default", None)
    train_run: str | None = option("run folder of train, for the training curves", None)
    num_images: int = option("pictures in each gallery", 12)

    def __post_init__(self) -> None:
        require(self.num_images >= 0, f"num_images must not be negative, got {self.num_images}")
