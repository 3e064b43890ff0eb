"""`inspect` and `browse`: pages to look through tables."""

from raydet.config.fields import config, option, require, require_not_negative
from raydet.config.training import AugmentationSpec


@config
class InspectConfig:
    """An images table → one HTML page: statistics, suspicious labels, and images as training sees them."""

    data: str = option("images table")
    out: str = option("folder to write: inspect.html, and the tables with its numbers", operational=True)
    val_data: str | None = option(
        "second images table to compare with the first: class shares, sizes, identical images", None
    )
    train_config: str | None = option(
        "training config (YAML); the images are shown with its model, image_size, augmentation and seed; by default "
        "as the recipe of the model decides",
        None,
    )
    augmentation: AugmentationSpec | None = option(
        "augmentation, written as in train; overrides that of --train-config", None
    )
    model: str | None = option("model whose resize the images are shown with; overrides that of --train-config", None)
    image_size: int | None = option("input side in pixels; overrides that of --train-config", None)
    num_images: int = option("maximum images per class, limited by the page's size; 0 shows none", 6)
    seed: int = option("seed of the sample of images", 0)

    def __post_init__(self) -> None:
        require_not_negative(self, "num_images", "seed")


@config
class BrowseConfig:
    """Images, detections or evaluated runs → a page on this machine to look through them; Ctrl-C ends it."""

    data: str = option("images table, detections table, or metrics folder as written by evaluate")
    second: str | None = option(
        "detections table or metrics folder to show beside the first, of the same images", None, value="DATA"
    )
    images: str | None = option(
        "images of a detections table: an images table, whose labels are shown too, a folder, a list or tar files; by "
        "default those that the run scored",
        None,
    )
    run: str | None = option("run to show, if the metrics folder holds several; by default the last one", None)
    second_run: str | None = option(
        "run to show beside the first, of --second or, without it, of the same metrics folder", None, value="RUN"
    )
    score_threshold: float | None = option(
        "lowest score at which a detection is judged against the labels; by default the one with the best F1 of an "
        "evaluated run, otherwise 0.3",
        None,
        group="Detections",
    )
    selection: str = option(
        "where the page saves a selection: SELECTION.parquet lists ids and paths, SELECTION.txt the files",
        "selection",
        group="Output",
        operational=True,
    )
    port: int = option("port on 127.0.0.1; 0 takes a free one", 0, group="Output", operational=True)

    def __post_init__(self) -> None:
        threshold = self.score_threshold
        require(threshold is None or 0 <= threshold <= 1, f"--score-threshold must be between 0 and 1, got {threshold}")
        require(0 <= self.port < 2**16, f"--port must be between 0 and 65535, got {self.port}")
        require(bool(self.selection.strip("/ ")), "--selection must name a place for the lists")
