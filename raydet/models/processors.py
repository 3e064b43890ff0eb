"""Hugging Face image processors: the default of a family, another image size, and the resize rule that they follow."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

# Processor classes are looked up by attribute, so that importing this module does not import torch.
import transformers

from raydet.common.errors import UserError
from raydet.models.families import Family, too_small_size, unfit_size
from raydet.models.geometry import ResizeRule, SizeHW

_YOLOS_STEP = 16
"""Pixels to whose multiples the processor of YOLOS rounds both sides; the others do not round."""

_MOST_SIDE = 16_384
"""Longest side of a model's input in pixels; more would fill the memory."""

_SHORTEST_OF_DETR, _LONGEST_OF_DETR = 800, 1333
"""Sides in pixels to which DETR resizes images, of which the second is a limit."""

_REPLACED: Mapping[str, str] = {"RfDetrImageProcessor": "RTDetrImageProcessor"}
"""Processors that resize in floating point without antialiasing, which is impossible with 8-bit images, and
replacements that read the model's outputs in the same way."""

_KEPT_OPTIONS = (
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "pad_size",
)


def default_processor(family: Family) -> Any:
    """Make the image processor for a model that comes without one."""
    processor = getattr(transformers, family.processor)()
    return _changed(processor, family.processor_options) if family.processor_options else processor


def supported_processor(processor: Any) -> Any:
    """Return an image processor whose resize raydet can reproduce: the processor itself, or its replacement."""
    replacement = _REPLACED.get(type(processor).__name__)
    if replacement is None:
        return processor
    content = processor.to_dict()
    return getattr(transformers, replacement)(**{key: content[key] for key in _KEPT_OPTIONS if key in content})


def resized_processor(processor: Any, family: Family, image_size: int) -> Any:
    """Copy an image processor so that it works at a different size.

    Args:
        processor: A Hugging Face image processor.
        family: Family of the model.
        image_size: In pixels. For families with a fixed input size, the side of the square input. For families that
            keep the aspect ratio, the longest side; every image is then padded to a square of this side, so that its
            padding does not depend on the other images of the batch.
    """
    square = {"height": image_size, "width": image_size}
    if family.side_multiple > 1:
        return _changed(processor, {"size": square, "pad_size": None})
    if family.resizes_by_edges:
        size = {"shortest_edge": image_size, "longest_edge": image_size}
    else:
        size = {"max_height": image_size, "max_width": image_size}
    return _changed(processor, {"size": size, "do_pad": True, "pad_size": square})


def step_resize_rules(processor: Any, family: Family, sizes: Sequence[int], *, where: str) -> tuple[ResizeRule, ...]:
    """Return the resize rules from which training steps draw one.

    Args:
        processor: Image processor of the model.
        family: Family of the model.
        sizes: In pixels. For families with a fixed input size, sides of the square input. For families that keep the
            aspect ratio, lengths of the shortest side, as in DETR's recipe; the longest side is limited to that of the
            processor or, if `resized_processor` has set limits, to 1333/800 of the largest size.
        where: The model, for error messages.
    """
    if family.side_multiple > 1:
        return tuple(resize_rule_of(resized_processor(processor, family, size), where=where) for size in sizes)
    own = processor.size
    longest = own.longest_edge if own.shortest_edge != own.longest_edge else None
    longest = longest or round(max(sizes, default=0) * _LONGEST_OF_DETR / _SHORTEST_OF_DETR)
    edges = [{"shortest_edge": size, "longest_edge": max(size, longest)} for size in sizes]
    return tuple(resize_rule_of(_changed(processor, {"size": size, "pad_size": None}), where=where) for size in edges)


def resize_rule_of(processor: Any, *, where: str) -> ResizeRule:
    """Read the resize rule of a Hugging Face image processor.

    Raises:
        UserError: The processor does not resize, or does so in a way that raydet does not support.
    """
    try:
        rule = _rule_of(processor, where)
        shorter = [] if rule.shortest is None or rule.longest is None else [min(rule.shortest, rule.longest)]
        sides = [*(rule.size_hw or ()), *(rule.limit_hw or ()), *(rule.pad_to_hw or ()), *shorter]
        is_ordered = rule.shortest is None or rule.longest is None or rule.shortest <= rule.longest
        if is_ordered and all(type(side) is int and 1 <= side <= _MOST_SIDE for side in sides):
            return rule
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError):
        pass
    raise UserError(
        f"the image processor of {where} has a size that is not 1 to {_MOST_SIDE:,} whole pixels, or a shortest edge "
        "above the longest; check its config"
    )


def check_normalisation(processor: Any, *, where: str) -> None:
    """Check the numbers by which an image processor scales pixels.

    Raises:
        UserError: They are not finite, are not one or three, or divide by zero.
    """
    try:
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (
            (list(values) if isinstance(values, list | tuple) else [values]) if processor.do_normalize else [1.0]
            for values in (processor.image_mean, processor.image_std)
        )
        if (
            {len(mean), len(std)} <= {1, 3}
            and all(map(math.isfinite, (factor, *mean, *std)))
            and factor * math.prod(std)
        ):
            return
    except (TypeError, ValueError, AttributeError, OverflowError):
        pass
    raise UserError(
        f"the image processor of {where} has an unusable image_mean, image_std or rescale_factor; expected "
        "finite numbers, one for each channel or one for all, and none of the last two 0"
    )


def _rule_of(processor: Any, where: str) -> ResizeRule:
    size = processor.size
    pad_size = processor.pad_size if processor.do_pad else None
    common: dict[str, Any] = {
        "resample": int(processor.resample),
        "pad_to_hw": (pad_size.height, pad_size.width) if pad_size is not None else None,
    }
    if not processor.do_resize:
        raise UserError(
            f"the image processor of {where} does not resize; set do_resize in its preprocessor_config.json"
        )
    if not 0 <= common["resample"] <= 3:
        raise UserError(f"the image processor of {where} has resample {common['resample']}; it must be 0, 1, 2 or 3")
    if size.shortest_edge and size.longest_edge:
        return ResizeRule(
            mode="keep_aspect",
            shortest=size.shortest_edge,
            longest=size.longest_edge,
            multiple_of=_YOLOS_STEP if type(processor).__name__.startswith("Yolos") else 1,
            **common,
        )
    if size.max_height and size.max_width:
        return ResizeRule(mode="keep_aspect", limit_hw=(size.max_height, size.max_width), **common)
    if size.height and size.width:
        return ResizeRule(mode="fixed", size_hw=(size.height, size.width), **common)
    raise UserError(
        f"the image processor of {where} has size {dict(size)}; raydet supports height and width, shortest_edge and "
        "longest_edge, or max_height and max_width"
    )


def check_image_size(config: Any, family: Family, rule: ResizeRule, *, num_queries: int, where: str) -> None:
    """Refuse input sizes at which the model would fail in the middle of a run.

    Raises:
        UserError: The size varies, is not a multiple of what the model needs, or has fewer cells than queries.
    """
    multiple = side_multiple(config, family)
    if multiple == 1:
        return
    size_hw = rule.size_hw or rule.pad_to_hw
    if size_hw is None:
        raise UserError(
            f"the image processor of {where} keeps the aspect ratio of each image, but the model needs sides that are "
            f"a multiple of {multiple}; set --image-size"
        )
    height, width = size_hw
    if height % multiple or width % multiple:
        raise unfit_size("image-size", height, multiple, where=where)
    if _num_cells(config, family, size_hw) < num_queries:
        raise too_small_size("image-size", height, least_side(config, family, num_queries=num_queries), where=where)


def check_num_queries(config: Any, family: Family, rule: ResizeRule, *, num_queries: int, where: str) -> None:
    """Refuse a trained model that picks more queries than its images have cells.

    Raises:
        UserError: It does.
    """
    size_hw = rule.size_hw or rule.pad_to_hw
    if size_hw is None or side_multiple(config, family) == 1:
        return
    num_cells = _num_cells(config, family, size_hw)
    if num_cells < num_queries:
        raise UserError(
            f"the model {where} cannot run: its config.json states {num_queries} queries, but its images of "
            f"{size_hw[1]} × {size_hw[0]} pixels have only {num_cells} cells to pick them from; correct this number "
            "or the size in preprocessor_config.json"
        )


def _num_cells(config: Any, family: Family, size_hw: SizeHW) -> int:
    """Return the number of cells from which a model with `side_multiple` above 1 picks its queries."""
    height, width = size_hw
    return sum(int(height // stride) * int(width // stride) for stride in query_strides(config, family))


def least_side(config: Any, family: Family, *, num_queries: int) -> int:
    """Return the least side in pixels of a square input with a cell for each query, or the largest side that there is.

    Args:
        config: Config of a model with `side_multiple` above 1.
        family: Its family.
        num_queries: Queries that the model picks from the cells of its feature maps.
    """
    multiple = side_multiple(config, family)
    sides = range(multiple, _MOST_SIDE + multiple, multiple)
    place = bisect_left(sides, num_queries, key=lambda side: _num_cells(config, family, (side, side)))
    return sides[min(place, len(sides) - 1)]


def query_strides(config: Any, family: Family) -> Sequence[float]:
    """Return the strides in pixels of the feature maps from whose cells queries start, one per level."""
    if family.query_grid == "projector":
        return [config.backbone_config.patch_size / scale for scale in config.projector_scale_factors]
    if family.query_grid == "patches":
        return [config.backbone_config.patch_size]
    strides: Sequence[float] = config.feat_strides
    return strides


def side_multiple(config: Any, family: Family) -> int:
    """Return the number of pixels that both sides of an input must be a multiple of; 1 if any size will do."""
    if family.backbone_side_fields is None:
        return family.side_multiple
    first, second = (getattr(config.backbone_config, name) for name in family.backbone_side_fields)
    return int(first * second)


def _changed(processor: Any, changes: Mapping[str, Any]) -> Any:
    return type(processor).from_dict({**processor.to_dict(), **changes})
