"""`evaluate`, `compare`, `fit` and `report`."""

from typing import Literal

from raydet.config.fields import config, option, require, require_not_negative, require_positive

EvaluationProtocol = Literal["coco", "lvis", "voc07", "voc"]
JoinKey = Literal["id", "path"]

_JOIN = "match images by id, or by path relative to their folder"


@config
class EvaluateConfig:
    """Labelled images and detections → COCO numbers on the screen, and metrics tables."""

    truth: str = option("images table with the truth, or COCO instances JSON")
    detections: str = option("detections table, or COCO results JSON")
    out: str | None = option(
        "folder for the metrics tables; without it the numbers are only printed", None, operational=True
    )
    join: JoinKey = option(_JOIN, "id")
    slice_by: list[str] = option(
        "groups of images or boxes to measure separately: columns of the images table such as camera, or box_size, "
        "crowding, image_size",
        default_factory=list,
    )
    crops: str | None = option(
        "crops table of these detections: --slice-by takes its columns too, such as label or answer_1, as the answer "
        "about the best-scoring detection of an image that has one",
        None,
        is_later=True,
    )
    target_precision: float | None = option(
        "also report, for each class, the lowest score threshold that reaches this precision", None
    )
    allow_partial: bool = option("measure the images that truth and detections share, if the two differ", False)
    class_mapping: dict[str, str] | None = option(
        "classes with another name in the detections than in the truth, as {DETECTED: TRUE}; classes of the same name "
        "need no entry",
        None,
    )

    protocol: EvaluationProtocol = option(
        "coco; lvis: federated, by neg_category_ids and not_exhaustive_category_ids of the truth; voc07: 11 points at "
        "IoU 0.5; voc: all points at IoU 0.5",
        "coco",
        group="Measurement",
    )
    iou_thresholds: list[float] | None = option(
        "IoU thresholds of AP; by default COCO's 0.50 to 0.95 in steps of 0.05", None, group="Measurement"
    )
    max_detections: list[int] | None = option(
        "limits on the number of detections per class and image; by default COCO's 1, 10, 100",
        None,
        group="Measurement",
    )
    class_agnostic: bool = option("treat all classes as one", False, group="Measurement")
    bootstrap: int = option(
        "resamples of the images for 95 % intervals, which need --out; 0 turns them off", 1000, group="Measurement"
    )
    seed: int = option("seed of the resampling", 0, group="Measurement")

    verify: bool = option(
        "also run pycocotools on the same boxes (of large data, on a random sample of the images) and compare the "
        "twelve numbers; exit with code 1 if a bit differs",
        False,
        group="Measurement",
        operational=True,
    )

    run: str | None = option(
        "name of this run in the tables; by default the name of the detections' folder", None, group="Output"
    )
    model: str | None = option("name of the model in the tables", None, group="Output")
    split: str | None = option(
        "name of the split in the tables; by default the name of the truth", None, group="Output"
    )

    num_shards: int | None = option(
        "parts that are matched in parallel; the numbers do not depend on it",
        None,
        group="Compute and cluster",
        operational=True,
    )
    ray_address: str | None = option(
        "Ray cluster that matches the parts, or `local` to start one on this machine; by default threads of this "
        "process match them",
        None,
        group="Compute and cluster",
        operational=True,
    )

    def __post_init__(self) -> None:
        require_positive(self, "num_shards")
        require_not_negative(self, "bootstrap", "seed")
        require(self.ray_address is None or bool(self.ray_address.strip()), "--ray-address must not be empty")
        require(self.crops is None or bool(self.slice_by), "--crops needs --slice-by with a column of the crops table")
        thresholds, limits = self.iou_thresholds, self.max_detections
        require(
            thresholds is None
            or (
                0 < len(thresholds) <= 64
                and thresholds == sorted(set(thresholds))
                and 0 < thresholds[0] <= 1
                and thresholds[-1] <= 1
            ),
            f"--iou-thresholds must be at most 64 increasing numbers above 0 and at most 1, got {thresholds}",
        )
        require(
            limits is None or (len(limits) > 0 and limits == sorted(set(limits)) and limits[0] > 0),
            f"--max-detections must be increasing numbers above 0, got {limits}",
        )
        require(
            self.target_precision is None or 0 < self.target_precision <= 1,
            f"--target-precision must be above 0 and at most 1, got {self.target_precision}",
        )
        require(
            self.protocol == "coco" or (thresholds is None and not self.class_agnostic),
            f"--protocol {self.protocol} has its own rules: omit --iou-thresholds and --class-agnostic",
        )
        require(
            not self.verify
            or (self.protocol == "coco" and thresholds is None and limits is None and not self.class_agnostic),
            "--verify compares COCO's twelve numbers: omit --protocol, --iou-thresholds, --max-detections and "
            "--class-agnostic",
        )


@config
class CompareConfig:
    """Two sets of detections of the same images → paired differences with intervals, per class and per image."""

    truth: str = option("images table with the truth, or COCO instances JSON")
    first: str = option("detections table, or COCO results JSON: the baseline")
    second: str = option("detections table, or COCO results JSON: compared with the first")
    out: str | None = option("folder for the tables; without it the numbers are only printed", None, operational=True)
    bootstrap: int = option("resamples of the images for 95 % intervals", 1000)
    seed: int = option("seed of the resampling", 0)
    join: JoinKey = option(_JOIN, "id")
    num_images: int = option("number of images to list, those with the largest change", 20)

    def __post_init__(self) -> None:
        require_positive(self, "bootstrap", "num_images")
        require_not_negative(self, "seed")


@config
class FitConfig:
    """Labelled images and a checkpoint's detections → score thresholds and calibration, written into the checkpoint."""

    truth: str = option("images table with the truth, or COCO instances JSON")
    detections: str = option("detections table that predict wrote with this checkpoint, with all scores")
    checkpoint: str = option("model folder to write the operating point into, for predict --operating-point")
    target_precision: float | None = option(
        "for each class, the lowest score threshold that keeps this precision on new images with a probability of "
        "95 %; by default the threshold with the best F1",
        None,
    )
    seed: int = option("seed of the folds for cross-validation", 0)

    def __post_init__(self) -> None:
        require_not_negative(self, "seed")
        require(
            self.target_precision is None or 0 < self.target_precision < 1,
            f"--target-precision must be above 0 and below 1, got {self.target_precision}",
        )


@config
class ReportConfig:
    """Metrics tables → one HTML file that opens offline."""

    metrics: str = option("metrics folder, as written by evaluate")
    out: str | None = option("HTML file to write; by default report.html in the metrics folder", None, operational=True)
    run: str | None = option("run to show, if the folder holds several; by default the last one", None)
    train_run: str | None = option("run folder of train, for the training curves", None)
    crops: list[str] | None = option(
        "crops tables of these detections: their answers are counted, with the precision for each, and shown with the "
        "boxes",
        None,
        value="CROPS",
    )
    num_images: int = option("images in each gallery", 12)

    def __post_init__(self) -> None:
        require_not_negative(self, "num_images")
