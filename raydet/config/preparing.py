"""`prepare`: a source of images → an images table."""

from typing import Literal

from raydet.config.fields import config, flag, option, require, require_not_negative, require_positive
from raydet.config.measuring import JoinKey

ImageStorage = Literal["inline", "reference"]
Duplicates = Literal["keep", "drop"]
Truncated = Literal["reject", "keep"]
Unlabelled = Literal["keep", "reject"]
TaskLabels = Literal["annotations", "predictions"]
BboxFormat = Literal["coco", "voc", "yolo"]
DEFAULT_MAX_PIXELS = 178_956_970
"""Larger images are rejected as decompression bombs; the same limit as Pillow's own, half a gigabyte of RGB."""


@config
class PrepareTableConfig:
    """Options shared by all sources of images."""

    out: str = option("folder or URI of the images table to write", operational=True)
    val_fraction: float | None = option(
        "fraction of the images to write to OUT/val, the rest to OUT/train; by default all go to OUT", None
    )
    image_storage: ImageStorage = option(
        "inline: the table holds the image files; reference: it holds only their paths", "inline"
    )
    seed: int = option("seed of the choice of images for OUT/val", 1337)

    max_pixels: int = option("reject larger images as decompression bombs", DEFAULT_MAX_PIXELS, group="Input")
    duplicate_boxes: Duplicates = option(
        "keep or drop boxes that repeat another box of their class in the same image", "keep", group="Input"
    )
    duplicate_images: Duplicates = option(
        "keep or drop images with the same content as an earlier one", "keep", group="Input"
    )

    num_threads: int | None = option(
        "threads that read and decode; by default one per core (on Ray: per core of each task)",
        None,
        group="Compute and cluster",
        operational=True,
    )
    use_ray: bool | None = option(
        "run as Ray tasks on all nodes; on by default for large data sets, and if RAY_ADDRESS is set",
        None,
        group="Compute and cluster",
        operational=True,
    )

    def __post_init__(self) -> None:
        require_positive(self, "max_pixels", "num_threads")
        require_not_negative(self, "seed")
        fraction = self.val_fraction
        require(fraction is None or 0 < fraction < 1, f"--val-fraction must be between 0 and 1, got {fraction}")


@config
class PrepareConfig(PrepareTableConfig):
    """Options shared by all sources of image files."""

    allow_root: list[str] | None = option(
        "further folders that symbolic links in the named folders may lead to, such as the Hub's cache",
        None,
        group="Input",
    )
    truncated: Truncated = option("truncated images: reject them, or keep the readable part", "reject", group="Input")
    labelled: list[str] | None = option(
        "classes that the images are labelled for, if not for all: nothing is learned or measured where others may be",
        None,
        group="Input",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.truncated == "reject" or self.image_storage == "inline",
            "--truncated keep needs --image-storage inline: it keeps a repaired copy of the file",
        )


@config
class PrepareImagesConfig(PrepareConfig):
    """Images without labels → an images table."""

    images: str = option(
        "folder or URI of the images, with its subfolders, or a list of paths or URLs (.txt, .lst, or .csv with a "
        "column url or path)"
    )


@config
class PrepareCocoConfig(PrepareConfig):
    """COCO instances JSON and its images → an images table."""

    annotations: str = option("COCO instances JSON file; its file names are relative to --images")
    images: str = option("folder or URI of the images")


@config
class PrepareVocConfig(PrepareConfig):
    """Pascal VOC XML files and their images → an images table."""

    annotations: str = option("folder or URI of the XML files, each named like its image")
    images: str = option("folder or URI of the images")
    split: str | None = option(
        "file that lists the images to use, one name per line, as in ImageSets/Main", None, group="Input"
    )
    classes: list[str] | None = option(
        "the classes in order, or a .txt file with one name per line; by default those in the XML files",
        None,
        group="Input",
    )
    zero_based: bool = option(
        "the files number pixels from 0; the VOC devkit numbers them from 1", False, group="Input"
    )
    unlabelled: Unlabelled = option(
        "images without an XML file: reject them, or keep them as images without objects", "reject", group="Input"
    )


@config
class PrepareYoloConfig(PrepareConfig):
    """A data set in Ultralytics layout, or folders of images and labels → an images table."""

    data: str | None = option("data.yaml of the data set; required without --images, --labels and --classes", None)
    split: Literal["train", "val", "test"] = option("split of data.yaml to use", "train")
    images: str | None = option("without --data: folder or URI of the images, with its subfolders", None)
    labels: str | None = option("without --data: folder or URI of the .txt files, laid out like the images", None)
    classes: list[str] | None = option(
        "without --data: the classes in order, or a .txt file with one name per line", None
    )
    unlabelled: Unlabelled = option("images without a label file: keep them without objects, or reject them", "keep")

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = (self.images, self.labels, self.classes)
        require(
            all(part is None for part in parts) if self.data is not None else all(part is not None for part in parts),
            "set either --data (the data.yaml of the data set), or all of --images, --labels and --classes",
        )


@config
class PrepareCvatConfig(PrepareConfig):
    """CVAT's XML 1.1 ("CVAT for images") and its images → an images table."""

    annotations: str = option("XML file; its image names are relative to --images")
    images: str = option("folder or URI of the images")


@config
class PrepareLabelStudioConfig(PrepareConfig):
    """Label Studio's JSON export and its images → an images table."""

    annotations: str = option("JSON file, in Label Studio's export format JSON")
    images: str = option("folder or URI of the images, found by the ends of their addresses in Label Studio")
    classes: list[str] | None = option(
        "the classes in order, or a .txt file with one name per line; by default those of the file, sorted by name",
        None,
        group="Input",
    )
    labels: TaskLabels = option(
        "annotations: what people drew; predictions: what models found", "annotations", group="Input"
    )
    score_threshold: float = option("drop predictions at or below this score", 0.0, group="Input")
    unlabelled: Unlabelled = option(
        "tasks without annotations or predictions: reject them, or keep them as images without objects",
        "reject",
        group="Input",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.score_threshold < 1, f"--score-threshold must be in [0, 1), got {self.score_threshold}")
        require(
            self.labels == "predictions" or self.score_threshold == 0,
            "--score-threshold needs --labels predictions: annotations have no scores",
        )


@config
class PrepareCsvConfig(PrepareConfig):
    """A CSV file with a box per row (VoTT, TensorFlow, RetinaNet) and its images → an images table."""

    annotations: str = option(
        "CSV file with a box per row; the columns of VoTT, TensorFlow and RetinaNet are recognised"
    )
    images: str = option("folder or URI of the images, found by the ends of their paths in the file")
    columns: dict[str, str | int] | None = option(
        "columns of another file: image, class, and xmin, ymin, xmax, ymax or x, y, w, h → name in the header, or "
        "number from 1 without one",
        None,
        group="Input",
    )
    classes: list[str] | None = option(
        "the classes in order, or a .txt file with one name per line; by default those of the file, sorted by name",
        None,
        group="Input",
    )
    fractions: bool = option("boxes are fractions of the image's width and height, not pixels", False, group="Input")


@config
class PrepareHubConfig(PrepareConfig):
    """A data set on the Hugging Face Hub, or a local one that `datasets` opens → an images table."""

    dataset: str = option(
        "name on the Hugging Face Hub, or a path: imagefolder, Parquet files, a save_to_disk folder, an images table"
    )
    split: str = option("split to use, such as train or train[:10%]", "train")
    subset: str | None = option("configuration of a data set that has several", None)
    revision: str | None = option("branch, tag or commit on the Hub", None)
    image_column: str | None = option(
        "column of the images; by default `image`, or the only column of images", None, group="Input"
    )
    objects_column: str | None = option(
        "column of boxes and classes; by default `objects`; a data set without it has no labels", None, group="Input"
    )
    bbox_format: BboxFormat = option(
        "coco: left, top, width, height; voc: left, top, right, bottom; yolo: centre and size as fractions of the "
        "image",
        "coco",
        group="Input",
    )
    classes: list[str] | None = option(
        "the classes in order, or a .txt file with one name per line; by default those that the data set states",
        None,
        group="Input",
    )
    allow_web: bool = option("fetch images whose rows hold web URLs instead of rejecting them", False, group="Input")


@config
class PrepareDetectionsConfig(PrepareTableConfig):
    """A model's detections, and the images table that it scored → an images table with the detections as labels."""

    detections: str = option("detections table, with a row for each image of --data")
    data: str = option("images table that was scored; its own labels are not used")
    threshold: float | None = option("detections with at least this score become labels", None)
    thresholds: str | None = option(
        "YAML or JSON file with a threshold for each class, as `class name: score`; the key `default` holds for all "
        "other classes, null gives a class no labels",
        None,
    )
    target_precision: float | None = option(
        "for each class, take the lowest threshold whose detections reach this precision on --truth", None
    )
    truth: str | None = option(
        "with --target-precision: images table with the truth for some of the images, or COCO instances JSON", None
    )
    join: JoinKey = option(
        "how to find the images of --truth among the detections: by id, or by path relative to their folder", "id"
    )
    ignore_threshold: float | None = option(
        "detections with at least this score that are no labels become ignore regions (crowds); by default they are "
        "dropped",
        None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = (self.threshold, self.thresholds, self.target_precision)
        require(
            sum(rule is not None for rule in rules) == 1,
            "set one of --threshold, --thresholds FILE and --target-precision",
        )
        require(
            (self.target_precision is None) == (self.truth is None),
            "--target-precision and --truth need each other: the precision is measured on the truth",
        )
        require(self.truth is not None or self.join == "id", "--join is about --truth; omit it")
        for name in ("threshold", "target_precision", "ignore_threshold"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, f"{flag(name)} must be above 0 and at most 1, got {value}")
        require(
            self.threshold is None or self.ignore_threshold is None or self.ignore_threshold < self.threshold,
            f"--ignore-threshold must be below --threshold, got {self.ignore_threshold} and {self.threshold}",
        )


@config
class PrepareShapesConfig:
    """Generated images of rectangles, ellipses and triangles with labels → two images tables."""

    out: str = option("folder or URI; the tables are OUT/train and OUT/val", operational=True)
    num_train: int = option("training images", 1000)
    num_val: int = option("held-out images", 200)
    image_size: int = option("side of the square images in pixels", 128)
    max_shapes: int = option("maximum shapes per image; some images have none", 6)
    seed: int = option("seed of the images; the same seed gives the same pixels", 0)
    num_threads: int | None = option("threads that encode; by default one per core", None, operational=True)

    def __post_init__(self) -> None:
        require_positive(self, "num_train", "num_val", "max_shapes", "num_threads")
        require(self.image_size >= 32, f"--image-size must be at least 32, got {self.image_size}")
        require_not_negative(self, "seed")
