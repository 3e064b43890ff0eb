"""`inspect`: a page about an images table."""

from raydet.config.fields import config, option, require_not_negative
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
