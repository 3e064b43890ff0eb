"""`prepare`: a source of images → an images table."""

from dataclasses import dataclass
from typing import Literal

from raydet.config.fields import option, require, require_positive

ImageStorage = Literal["inline", "reference"]
Duplicates = Literal["keep", "drop"]
Truncated = Literal["reject", "keep"]
BboxFormat = Literal["coco", "voc", "yolo"]
DEFAULT_MAX_PIXELS = 178_956_970
"""Larger pictures are refused as decompression bombs; the number is Pillow's own limit (a quarter gigabyte of RGB)."""


@dataclass(frozen=True, kw_only=True)
class _PrepareConfig:
    """What every source of image files has in common."""

    out: str = option("folder or URI of the images table to write", operational=True)
    image_storage: ImageStorage = option("inline: image bytes in the table; reference: only their paths", "inline")
    max_pixels: int = option("larger pictures are rejected as decompression bombs", DEFAULT_MAX_PIXELS)
    truncated: Truncated = option("images whose files end early: rejected, or kept as far as they go", "reject")
    duplicate_boxes: Duplicates = option("boxes that repeat another of their class in their image", "keep")
    duplicate_images: Duplicates = option("images with the same content as one before them", "keep")
    val_fraction: float | None = option(
        "part of the images that becomes OUT/val, and the rest OUT/train; by default all are in OUT", None
    )
    seed: int = option("of the choice of the images for OUT/val", 1337)
    num_threads: int | None = option(
        "reading and decoding threads (all cores by default; on Ray, of each task)", None, operational=True
    )
    use_ray: bool | None = option(
        "work in Ray tasks on all nodes; by default for large data sets, and where RAY_ADDRESS is set",
        None,
        operational=True,
    )

    def __post_init__(self) -> None:
        require_positive(self, "max_pixels", "num_threads")
        require(
            self.truncated == "reject" or self.image_storage == "inline",
            "truncated: keep needs image_storage: inline, since what is kept is a mended copy of the file",
        )
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        fraction = self.val_fraction
        require(fraction is None or 0 < fraction < 1, f"val_fraction must be between 0 and 1, got {fraction}")


@dataclass(frozen=True, kw_only=True)
class PrepareImagesConfig(_PrepareConfig):
    """A folder or URI of images without labels → an images table."""

    images: str = option(
        "folder or URI of the images, with its subfolders; without labels also a list of paths or addresses "
        "(.txt, .lst, or .csv with a column url or path)"
    )


@dataclass(frozen=True, kw_only=True)
class PrepareCocoConfig(PrepareImagesConfig):
    """COCO instances JSON and a folder of images → an images table."""

    annotations: str = option("COCO instances JSON file, whose file names are relative to the folder of images")


@dataclass(frozen=True, kw_only=True)
class PrepareVocConfig(PrepareImagesConfig):
    """Pascal VOC XML files and a folder of images → an images table."""

    annotations: str = option("folder or URI of the XML files, each named like its image")
    split: str | None = option("file that lists the images to take, a name a line, as in ImageSets/Main", None)
    classes: list[str] | None = option(
        "the classes in their order, or one .txt file with a name a line; by default all in the XML files", None
    )
    zero_based: bool = option("the first pixel is 0 in these files, and 1 in those of the VOC devkit", False)


@dataclass(frozen=True, kw_only=True)
class PrepareYoloConfig(_PrepareConfig):
    """A data set in the layout of Ultralytics, or a folder of images and one of labels → an images table."""

    data: str | None = option("data.yaml of the data set; or else images, labels and classes", None)
    split: Literal["train", "val", "test"] = option("which part of data.yaml to take", "train")
    images: str | None = option("without data: folder or URI of the images, with its subfolders", None)
    labels: str | None = option("without data: folder or URI of the .txt files, laid out like the images", None)
    classes: list[str] | None = option(
        "without data: the classes in their order, or one .txt file with a name a line", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = (self.images, self.labels, self.classes)
        require(
            all(part is None for part in parts) if self.data is not None else all(part is not None for part in parts),
            "give either data, the data set's data.yaml, or all of images, labels and classes",
        )


@dataclass(frozen=True, kw_only=True)
class PrepareHubConfig(_PrepareConfig):
    """A data set of the Hugging Face Hub, or a local one that `datasets` opens → an images table."""

    dataset: str = option(
        "name on the Hugging Face Hub, or a path: imagefolder, Parquet files, what save_to_disk wrote, an images table"
    )
    split: str = option("which part, such as train or train[:10%]", "train")
    subset: str | None = option("the configuration, of a data set that has several", None)
    revision: str | None = option("branch, tag or commit on the Hub", None)
    image_column: str | None = option("column of the images; by default `image`, or the only one of that type", None)
    objects_column: str | None = option(
        "column of the boxes and classes; by default `objects`, and without that one the images have no labels", None
    )
    bbox_format: BboxFormat = option(
        "coco: left, top, width, height; voc: left, top, right, bottom; yolo: centre and size in parts of the image",
        "coco",
    )
    classes: list[str] | None = option(
        "the classes in their order, or one .txt file with a name a line; by default those the data set states", None
    )


@dataclass(frozen=True, kw_only=True)
class PrepareShapesConfig:
    """Generated pictures of rectangles, ellipses and triangles → two images tables, OUT/train and OUT/val."""

    out: str = option("folder or URI; the tables are OUT/train and OUT/val", operational=True)
    num_train: int = option("training images", 1000)
    num_val: int = option("held-out images", 200)
    image_size: int = option("side of the square pictures in pixels", 128)
    max_shapes: int = option("most shapes in a picture; the fewest is none", 6)
    seed: int = option("the same seed gives the same pixels", 0)
    num_threads: int | None = option("decoding threads (all cores by default)", None, operational=True)

    def __post_init__(self) -> None:
        require_positive(self, "num_train", "num_val", "max_shapes", "num_threads")
        require(self.image_size >= 32, f"image_size must be at least 32, got {self.image_size}")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
