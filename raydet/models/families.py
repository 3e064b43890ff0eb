"""Every difference between model families, one record per model type. This module imports neither torch nor Ray."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raydet.common.errors import UserError

QueryGrid = Literal["levels", "projector", "patches"]
"""Source of the cells that queries start from; see `raydet.models.processors.query_strides`."""


_PRECISE_LAYERS = (
    "bbox_embed",
    "bbox_predictor",
    "enc_bbox_head",
    "enc_out_bbox_embed",
    "enc_out_class_embed",
    "enc_score_head",
    "integral",
    "pre_bbox_head",
    "reference_points",
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model type of transformers that raydet can train.

    Attributes:
        model_type: As in the model's config.
        processor: Class of the image processor for checkpoints that come without one.
        processor_options: Arguments of that processor that differ from its defaults.
        softmax: Class scores are a softmax with "no object" as the last class, so that each query has one label and
            the class loss is a weighted mean over queries. Otherwise scores are sigmoids, and the number of boxes
            divides the sum of their losses.
        weights_in_config: transformers returns unweighted loss terms and applies the weights of the config afterwards.
        class_weight: Weight of the class loss in the authors' recipe, where transformers always uses 1; None reads
            `class_loss_coefficient` of the model's config.
        precise_layers: Last parts of the names of the layers that stay in single precision: those that predict boxes,
            or points that boxes are relative to, and those that score proposals. bf16 has eight significant bits: a
            box would move by up to 1/256 of the image's side, and most proposals of a new score head would be equal.
        top_k: Detections kept per image over all queries and classes; None keeps one per query.
        uses_pixel_mask: The model takes a mask that separates the image from its padding.
        side_multiple: Both sides of an input must be a multiple of this, in pixels; 1 for families that keep the
            aspect ratio.
        backbone_side_fields: Two fields of the model's `backbone_config` whose product takes precedence over
            `side_multiple`.
        query_grid: Source of the cells that queries start from; read only where `side_multiple` is above 1.
        num_queries_field: Field of the model's config that holds the number of queries.
        resizes_by_edges: The image processor rounds to complete patches only if its size is given as edges, so that
            `--image-size` sets edges rather than limits.
        auxiliary_loss: Each decoder layer can have a loss of its own.
        images_before_layers: The class scores of all decoder layers are [B, L, Q, C]; otherwise [L, B, Q, C].
        dense_matching: Every decoder layer learns the boxes that any layer matches to a query, unless
            `use_dense_one_to_one` in the model's config is false.
        distils: Boxes are distributions, which decoder layers learn from the last layer (`loss_ddf`).
        local_criterion: The criterion of transformers sums over ranks and must be replaced by raydet's own.
        score_head: The part of the model whose score of each class picks the queries among the encoder's cells; None if
            there is none. New classes start in it as the mean of the old ones.
        scores_proposals: With `two_stage` in its config, the model picks queries by a score that no loss term of
            transformers trains; raydet adds the term.
        graph_has_one_size: A traced graph works at a single input size, because transformers computes sampling
            locations from sizes in plain Python. Graphs of other families take every size that their image processor
            makes.
        resamples_positions: Position codes are resampled by an operation that other runtimes lack; at one input size
            they are constant.
        backbone_prefixes: Names of the backbone's parameters start with one of these.
        head_tokens: Parameters whose name contains this belong to the head although they match `backbone_prefixes`.
        denoises: In training, queries around the labelled boxes join the others. Their class embedding has no gradient
            in a batch without boxes.
        decoder: The part of the model that turns queries and the encoder's features into boxes; None if the encoder
            itself does.
        decoder_mask: Argument of the decoder that separates the features of the image from those of its padding.
        default_hidden_size: Length of the vector of a query if the model's config does not state it.
        compiled_modules: Parts of the model, in the order of the forward pass, that `--compile` compiles: backbone and
            encoder, whose shapes depend on the size of the input only.
        vision_transformer: Start of the model type in `backbone_config` if the backbone is a vision transformer, whose
            linear layers can have adapters; empty if it always is one, None if it never is.
    """

    model_type: str
    processor: str
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    softmax: bool = False
    weights_in_config: bool = False
    class_weight: float | None = None
    precise_layers: tuple[str, ...] = _PRECISE_LAYERS
    top_k: int | None = None
    uses_pixel_mask: bool = False
    side_multiple: int = 1
    backbone_side_fields: tuple[str, str] | None = None
    query_grid: QueryGrid = "levels"
    num_queries_field: str = "num_queries"
    resizes_by_edges: bool = False
    auxiliary_loss: bool = True
    images_before_layers: bool = False
    dense_matching: bool = False
    distils: bool = False
    local_criterion: bool = False
    score_head: str | None = None
    scores_proposals: bool = False
    graph_has_one_size: bool = False
    resamples_positions: bool = False
    backbone_prefixes: tuple[str, ...] = ("model.backbone.",)
    head_tokens: str | None = None
    denoises: bool = False
    decoder: str | None = "model.decoder"
    decoder_mask: str = "encoder_attention_mask"
    default_hidden_size: int = 256
    compiled_modules: tuple[str, ...] = ("model.backbone", "model.encoder")
    vision_transformer: str | None = None


_DETR = Family(
    model_type="detr", processor="DetrImageProcessor", softmax=True, weights_in_config=True, uses_pixel_mask=True
)
_CONDITIONAL_DETR = replace(
    _DETR,
    model_type="conditional_detr",
    processor="ConditionalDetrImageProcessor",
    softmax=False,
    class_weight=2.0,
    precise_layers=(*_PRECISE_LAYERS, "ref_point_head"),
    top_k=100,
)
_RT_DETR = Family(
    model_type="rt_detr",
    processor="RTDetrImageProcessor",
    # The encoder adds neighbouring levels of the feature pyramid; the coarsest level has a stride of 32.
    side_multiple=32,
    images_before_layers=True,
    denoises=True,
    score_head="enc_score_head",
)
_LW_DETR = Family(
    model_type="lw_detr",
    processor="DeformableDetrImageProcessor",
    weights_in_config=True,
    top_k=100,
    uses_pixel_mask=True,
    # The vision transformer attends within windows, a whole number of which must fit.
    side_multiple=16,
    backbone_side_fields=("patch_size", "num_windows_side"),
    query_grid="projector",
    local_criterion=True,
    score_head="enc_out_class_embed",
    # The projector beside it is not pretrained.
    backbone_prefixes=("model.backbone.backbone.",),
    compiled_modules=("model.backbone",),
    vision_transformer="",
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        _DETR,
        replace(_DETR, model_type="table-transformer"),
        _CONDITIONAL_DETR,
        replace(
            _CONDITIONAL_DETR,
            model_type="deformable_detr",
            processor="DeformableDetrImageProcessor",
            scores_proposals=True,
            graph_has_one_size=True,
        ),
        replace(
            _CONDITIONAL_DETR,
            model_type="dab-detr",
            class_weight=1.0,
            precise_layers=_PRECISE_LAYERS,
            decoder_mask="memory_key_padding_mask",
        ),
        _RT_DETR,
        replace(_RT_DETR, model_type="rt_detr_v2"),
        replace(_RT_DETR, model_type="d_fine", distils=True, dense_matching=True),
        # The backbone is an HGNetV2 or a DINOv3.
        replace(
            _RT_DETR,
            model_type="deimv2",
            distils=True,
            dense_matching=True,
            backbone_prefixes=("model.conv_encoder.model.", "model.conv_encoder.backbone."),
            compiled_modules=("model.conv_encoder", "model.encoder"),
            vision_transformer="dinov3",
        ),
        _LW_DETR,
        replace(
            _LW_DETR,
            model_type="rf_detr",
            processor="RTDetrImageProcessor",
            # Unlike the backbones of RT-DETR, a DINOv2 needs normalised colours.
            processor_options={"do_normalize": True},
            top_k=None,
            side_multiple=8,
            backbone_side_fields=("patch_size", "num_windows"),
            query_grid="patches",
            resamples_positions=True,
        ),
        Family(
            model_type="yolos",
            processor="YolosImageProcessor",
            softmax=True,
            weights_in_config=True,
            num_queries_field="num_detection_tokens",
            resizes_by_edges=True,
            # transformers reads a decoder depth that YOLOS does not have, and fails.
            auxiliary_loss=False,
            backbone_prefixes=("vit.",),
            head_tokens="detection_tokens",
            decoder=None,
            default_hidden_size=768,
            compiled_modules=("vit",),
            vision_transformer="",
        ),
    )
}

_UNTRAINABLE: Mapping[str, str] = {"pp_doclayout": "PP-DocLayout", "pp_ocr": "PP-OCR"}
"""Detectors for which transformers has no loss, by the prefix of their model type."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotFamily:
    """One model type of transformers that finds objects by their names in plain words.

    Attributes:
        model_type: As in the model's config.
        reads_labels: `separately`: the text model embeds each label separately, once (OWL-ViT). `together`: all labels
            form one text, which the model reads with each image (Grounding DINO).
        pads_to_square: Boxes are relative to a square around the image if the image processor pads to one.
    """

    model_type: str
    reads_labels: Literal["separately", "together"]
    pads_to_square: bool = False


ZERO_SHOT_FAMILIES: Mapping[str, ZeroShotFamily] = {
    family.model_type: family
    for family in (
        ZeroShotFamily(model_type="owlvit", reads_labels="separately"),
        ZeroShotFamily(model_type="owlv2", reads_labels="separately", pads_to_square=True),
        ZeroShotFamily(model_type="grounding-dino", reads_labels="together"),
        ZeroShotFamily(model_type="mm-grounding-dino", reads_labels="together"),
    )
}


def family_of(model_type: str, *, where: str) -> Family:
    """Look up the family of a model type; `where` names the model in the error message.

    Raises:
        UserError: raydet cannot train this model type.
    """
    known = ", ".join(sorted(FAMILIES))
    for prefix, product in _UNTRAINABLE.items():
        if model_type.startswith(prefix):
            raise UserError(
                f"{where} is {product} ({model_type}), which transformers cannot train; raydet supports {known}"
            )
    if model_type not in FAMILIES:
        raise UserError(
            f"{where} is a {model_type or 'nameless'} model, not a detector that raydet can train; "
            f"raydet supports {known}"
        )
    return FAMILIES[model_type]


def check_adaptable(family: Family, content: Mapping[str, Any], *, where: str) -> None:
    """Check that a model has a vision transformer, which `--lora` can adapt.

    Args:
        family: Its family.
        content: The content of its `config.json`.
        where: The model, for the error message.

    Raises:
        UserError: Its backbone is of another kind.
    """
    kind = family.vision_transformer
    if kind is not None and str((content.get("backbone_config") or {}).get("model_type", "")).startswith(kind):
        return
    families = [
        f"{each.model_type} with a {each.vision_transformer}" if each.vision_transformer else each.model_type
        for each in FAMILIES.values()
        if each.vision_transformer is not None
    ]
    raise UserError(
        f"--lora adapts the vision transformer of a model, but {where} is a {family.model_type} model with another "
        f"backbone; use one of {', '.join(families)}, or --freeze-backbone all"
    )


def unfit_size(option: str, size: int, multiple: int, *, where: str) -> UserError:
    """Make the error for a side that the model cannot divide; `where` names the model."""
    below = size // multiple * multiple
    nearest = f"{below} or {below + multiple}" if below else str(multiple)
    return UserError(f"--{option} must be a multiple of {multiple} for {where}, got {size}; the nearest: {nearest}")


def too_small_size(option: str, size: int, least: int, *, where: str) -> UserError:
    """Make the error for a side at which the feature maps have fewer cells than the model picks queries."""
    return UserError(
        f"--{option} must be at least {least} for {where}, got {size}: its feature maps have fewer cells than the "
        "model picks queries"
    )


def check_graph_sizes(family: Family, *, keeps_aspect: bool, where: str, remedy: str) -> None:
    """Refuse to trace a model whose images vary in size, as they keep their aspect ratio, if its graph has one size.

    `where` names the checkpoint in the message, which ends in `remedy`.

    Raises:
        UserError: The sizes vary and `family.graph_has_one_size`.
    """
    if keeps_aspect and family.graph_has_one_size:
        raise UserError(
            f"the graph of a {family.model_type} model works at one size only, but the image processor of {where} "
            f"keeps the aspect ratio of each image; {remedy}"
        )
