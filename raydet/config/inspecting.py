"""`inspect`."""

from dataclasses import dataclass

from raydet.config.fields import option, require
from raydet.config.training import AugmentationSpec


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """A page about an images table: its numbers, what is odd in it, and pictures as a model in training sees them."""

    data: str = option("images table")
    val_data: str | None = option("images table to compare it with: class shares, sizes, identical images", None)
    out: str = option("folder of inspect.html and of the tables that hold its numbers", operational=True)
    recipe: str | None = option(
        "training config (YAML) whose model, image_size, augmentation and seed the pictures follow; train's own "
        "defaults without one",
        None,
    )
    augmentation: AugmentationSpec | None = option("instead of the recipe's, as train has it", None)
    model: str | None = option("instead of the recipe's: the model whose resize the pictures follow", None)
    image_size: int | None = option("instead of the recipe's, in pixels", None)
    num_images: int = option("pictures of each class, as far as they fit on the page; 0 for none", 6)
    seed: int = option("of the sample of pictures", 0)

    def __post_init__(self) -> None:
        for name in ("num_images", "seed"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
