"""Facts that decide a recipe: the family and the size of a model, and the size of its input."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydet.common.errors import UserError, first_line
from raydet.models.checkpoints import PROCESSOR_FILES, read_checkpoint
from raydet.models.families import Family, family_of, too_small_size, unfit_size
from raydet.models.recipes.variants import variant_of
from raydet.models.small import DEFAULT_IMAGE_SIZE, SMALL_MODELS
from raydet.tables import storage

SQUARE_SIDE, SHORTEST_SIDE, LONGEST_SIDE = 640, 800, 1333
"""Sides of the input in pixels that models on COCO have: a square, or limits of the shortest and the longest side."""
SMALL_SIDE = SQUARE_SIDE // 2
"""Side in pixels from which every published model has cells enough for its queries."""


@dataclass(frozen=True)
class RecipeFacts:
    """A model, as far as its recipe depends on it.

    Attributes:
        name: Name, as given.
        family: Its family.
        variant: Its size, a key of the table of recipes.
        is_pretrained: False for a model that raydet builds from scratch.
        side: Side of the square input, or shortest side for families that keep the aspect ratio, in pixels; None if
            the image processor does not follow the rule of the family.
    """

    name: str
    family: Family
    variant: str
    is_pretrained: bool
    side: int | None

    @property
    def reference_side(self) -> int:
        """The side that models of this family have on COCO."""
        return SQUARE_SIDE if self.family.side_multiple > 1 else SHORTEST_SIDE

    @property
    def multiple(self) -> int:
        """Number of pixels that both sides must be a multiple of; 1 if any size will do."""
        return side_multiple_of(self.name, self.family)

    def least_side(self) -> int:
        """Return the least side in pixels of a square input that has a cell for each query; 1 if any size will do."""
        return _least_side_of(self.name, self.family)


def read_facts(name: str, image_size: int | None) -> RecipeFacts:
    """Read what the recipe of a model depends on.

    Args:
        name: A small model, a model folder or a Hub name.
        image_size: As in train, in pixels.

    Raises:
        UserError: There is no such model, or raydet cannot train it.
    """
    if name in SMALL_MODELS:
        family = family_of(SMALL_MODELS[name].model_type, where=name)
        return RecipeFacts(name, family, "", False, _side(family, image_size or DEFAULT_IMAGE_SIZE, {}))
    checkpoint = read_checkpoint(name)
    family = family_of(checkpoint.model_type, where=name)
    size = {} if image_size else _processor_size(name)
    variant = variant_of(checkpoint.model_type, checkpoint.content)
    return RecipeFacts(name, family, variant, True, _side(family, image_size, size))


def side_multiple_of(name: str, family: Family) -> int:
    """Return the number of pixels that both sides of a model's input must be a multiple of, from its config alone."""
    if family.backbone_side_fields is None:
        return family.side_multiple
    from raydet.models.processors import side_multiple

    return side_multiple(_config_of(name), family)


def check_side(option: str, side: int, name: str, family: Family) -> None:
    """Refuse a side in pixels, set by this option, that the model cannot have.

    Raises:
        UserError: It is not a multiple of what the model needs, or gives fewer cells than the model picks queries.
    """
    multiple = side_multiple_of(name, family)
    if side % multiple:
        raise unfit_size(option, side, multiple, where=name)
    if side < SMALL_SIDE and side < (least := _least_side_of(name, family)):
        raise too_small_size(option, side, least, where=name)


def _least_side_of(name: str, family: Family) -> int:
    if family.side_multiple == 1:
        return 1
    from raydet.models.processors import least_side

    config = _config_of(name)
    try:
        return least_side(config, family, num_queries=getattr(config, family.num_queries_field))
    except (ArithmeticError, AttributeError, TypeError, ValueError):  # the workers say what is wrong with it
        return 1


def _config_of(name: str) -> Any:
    if name in SMALL_MODELS:
        return SMALL_MODELS[name].make_config()
    from transformers import AutoConfig  # takes a second to import, which most models do without

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # dozens of types are possible
        raise UserError(f"cannot read the config of {name}: {first_line(error)}") from error


def _side(family: Family, image_size: int | None, size: Mapping[str, Any]) -> int | None:
    """Return the side from the option, or from the `size` of an image processor, which may be empty."""
    if family.side_multiple > 1:
        return image_size or size.get("height", SQUARE_SIDE)
    if image_size is None and "height" in size:
        return None  # a square, unlike the shortest sides of the recipe
    longest = image_size or size.get("max_height")
    if longest is None:
        side: int = size.get("shortest_edge", SHORTEST_SIDE)
        return side
    return round(longest * SHORTEST_SIDE / LONGEST_SIDE)


def _processor_size(name: str) -> Mapping[str, Any]:
    """Return `size` of a model's image processor; empty if it has none, or none that can be read."""
    try:
        for file in PROCESSOR_FILES:
            if storage.exists(name):
                path = storage.join(name, file)
                if not storage.exists(path):
                    continue
            else:
                from huggingface_hub import hf_hub_download

                path = hf_hub_download(name, file)
            content = storage.read_json(path)
            size = content.get("image_processor", content).get("size")
            if isinstance(size, dict) and all(isinstance(value, int) for value in size.values() if value is not None):
                return {key: value for key, value in size.items() if value and 0 < value < 2**15}
    except Exception:  # of many types, and the model's loader tells later, with the reason
        pass
    return {}
