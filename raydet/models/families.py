"""What the model families of transformers do differently, and what their image processors say about geometry."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydet.common.errors import UserError
from raydet.models.geometry import ResizeRule


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model type of transformers.

    Attributes:
        model_type: As in the model's config.
        processor: The image processor class for checkpoints that come without one.
        softmax: Class scores are a softmax with "no object" as the last class, so that each query has one label, and
            the class loss is a weighted mean over queries; else they are sigmoids and its sum is divided by the boxes.
        weights_in_config: transformers returns loss terms without their weights and applies these outside.
        top_k: Detections kept per image over all queries and classes; None keeps as many as there are queries.
        uses_pixel_mask: The model is told where the padding is.
        side_multiple: Images are resized to a fixed size, whose sides must be a multiple of this, in pixels; a model's
            own backbone may ask for a larger one, see `side_multiple_of`. 1 where the aspect is kept.
        auxiliary_loss: Each decoder layer can learn by its own loss.
        distils: The boxes are distributions, which decoder layers learn from the last one (`loss_ddf`).
        backbone_prefixes: Parameters that begin like one of these belong to the backbone.
    """

    model_type: str
    processor: str
    softmax: bool = False
    weights_in_config: bool = False
    top_k: int | None = None
    uses_pixel_mask: bool = False
    side_multiple: int = 1
    auxiliary_loss: bool = True
    distils: bool = False
    backbone_prefixes: tuple[str, ...] = ("model.backbone.",)


def _detr_like(model_type: str, processor: str, *, softmax: bool) -> Family:
    return Family(
        model_type=model_type,
        processor=processor,
        softmax=softmax,
        weights_in_config=True,
        top_k=None if softmax else 100,
        uses_pixel_mask=True,
    )


def _rt_detr_like(model_type: str, *, distils: bool, backbone_prefixes: tuple[str, ...]) -> Family:
    return Family(
        model_type=model_type,
        processor="RTDetrImageProcessor",
        # Neighbouring levels of the feature pyramid are laid over each other, the coarsest one has a stride of 32.
        side_multiple=32,
        distils=distils,
        backbone_prefixes=backbone_prefixes,
    )


def _lw_detr_like(model_type: str, processor: str, *, top_k: int | None, side_multiple: int) -> Family:
    return Family(
        model_type=model_type,
        processor=processor,
        weights_in_config=True,
        top_k=top_k,
        uses_pixel_mask=True,
        # The vision transformer looks at the picture in windows, a whole number of which must fit.
        side_multiple=side_multiple,
        # Beside it lies the projector, which does not come from its pretraining.
        backbone_prefixes=("model.backbone.backbone.",),
    )


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        _detr_like("detr", "DetrImageProcessor", softmax=True),
        _detr_like("table-transformer", "DetrImageProcessor", softmax=True),
        _detr_like("conditional_detr", "ConditionalDetrImageProcessor", softmax=False),
        _detr_like("deformable_detr", "DeformableDetrImageProcessor", softmax=False),
        _detr_like("dab-detr", "ConditionalDetrImageProcessor", softmax=False),
        _rt_detr_like("rt_detr", distils=False, backbone_prefixes=("model.backbone.",)),
        _rt_detr_like("rt_detr_v2", distils=False, backbone_prefixes=("model.backbone.",)),
        _rt_detr_like("d_fine", distils=True, backbone_prefixes=("model.backbone.",)),
        # An HGNetV2 or a DINOv3.
        _rt_detr_like(
            "deimv2", distils=True, backbone_prefixes=("model.conv_encoder.model.", "model.conv_encoder.backbone.")
        ),
        _lw_detr_like("lw_detr", "DeformableDetrImageProcessor", top_k=100, side_multiple=16),
        _lw_detr_like("rf_detr", "RTDetrImageProcessor", top_k=None, side_multiple=8),
        Family(
            model_type="yolos",
            processor="YolosImageProcessor",
            softmax=True,
            weights_in_config=True,
            # transformers reads a decoder depth that YOLOS does not have, and fails.
            auxiliary_loss=False,
            backbone_prefixes=("vit.",),
        ),
    )
}

_UNTRAINABLE: Mapping[str, str] = {"pp_doclayout": "PP-DocLayout", "pp_ocr": "PP-OCR"}
"""Detectors that transformers can only run: it has no loss for them. By the beginning of their model type."""


def family_of(model_type: str, *, where: str) -> Family:
    """The family of a model type.

    Raises:
        UserError: It is not a detector that can be trained.
    """
    for beginning, product in _UNTRAINABLE.items():
        if model_type.startswith(beginning):
            raise UserError(
                f"{where} is {product} ({model_type}), which transformers cannot train; "
                f"raydet knows {', '.join(sorted(FAMILIES))}"
            )
    if model_type not in FAMILIES:
        raise UserError(
            f"{where} is a {model_type or 'nameless'} model, not a detector that raydet can train; "
            f"it knows {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def side_multiple_of(config: Any, family: Family) -> int:
    """What the sides of a model's images must be a multiple of, in pixels; 1 where any size will do.

    Args:
        config: The model's.
        family: Of the model.
    """
    if family.model_type == "lw_detr":
        return int(config.backbone_config.patch_size * config.backbone_config.num_windows_side)
    if family.model_type == "rf_detr":
        return int(config.backbone_config.patch_size * config.backbone_config.num_windows)
    return family.side_multiple


def resize_rule_of(processor: Any, *, where: str) -> ResizeRule:
    """Reads the geometry out of a Hugging Face image processor.

    Raises:
        UserError: It does not resize, or in a way that no detector's processor does.
    """
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
    if common["resample"] > 3:
        raise UserError(f"the image processor of {where} has resample {common['resample']}; it must be 0, 1, 2 or 3")
    if size.shortest_edge and size.longest_edge:
        multiple_of = 16 if type(processor).__name__.startswith("Yolos") else 1
        return ResizeRule(
            mode="keep_aspect",
            shortest=size.shortest_edge,
            longest=size.longest_edge,
            multiple_of=multiple_of,
            **common,
        )
    if size.max_height and size.max_width:
        return ResizeRule(mode="keep_aspect", limit_hw=(size.max_height, size.max_width), **common)
    if size.height and size.width:
        return ResizeRule(mode="fixed", size_hw=(size.height, size.width), **common)
    raise UserError(f"cannot tell how the image processor of {where} resizes: its size is {dict(size)}")


def resized_processor(processor: Any, family: Family, image_size: int) -> Any:
    """A copy of an image processor that works at another size.

    Args:
        processor: A Hugging Face image processor.
        family: Of the model it belongs to.
        image_size: In pixels, the side for families with a fixed size; for the others the longest side, and the side
            of the square that every image is padded to, so that padding does not depend on an image's neighbours.
    """
    square = {"height": image_size, "width": image_size}
    changes: dict[str, Any]
    if family.side_multiple > 1:
        changes = {"size": square, "pad_size": None}
    else:
        edges = {"shortest_edge": image_size, "longest_edge": image_size}
        limits = {"max_height": image_size, "max_width": image_size}
        # YOLOS rounds to whole patches only when it is given edges.
        changes = {"size": edges if family.model_type == "yolos" else limits, "do_pad": True, "pad_size": square}
    return type(processor).from_dict({**processor.to_dict(), **changes})


FIXED_SIZE_ONLY = ("deformable_detr",)
"""Model types whose graph works at one size only: transformers computes where they look from sizes in plain Python,
which a traced graph keeps as they were. The other families of this module work at all sizes that their image
processor makes."""


def check_sizes(model_type: str, *, keeps_aspect: bool, where: str, remedy: str) -> None:
    """Refuses a model whose images have many sizes where its graph works at one only.

    Args:
        model_type: As in its config.
        keeps_aspect: Its image processor lets every image keep its aspect and does not pad to one size.
        where: The checkpoint.
        remedy: What would be right, for the message.

    Raises:
        UserError: It is one of `FIXED_SIZE_ONLY`, and its images have many sizes.
    """
    if keeps_aspect and model_type in FIXED_SIZE_ONLY:
        raise UserError(
            f"a {model_type} model leaves torch at one size only, and the image processor of {where} lets every image "
            f"keep its aspect; {remedy}"
        )
