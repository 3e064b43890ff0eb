"""Small detectors that raydet builds from scratch: one for training on a CPU, and a tiny one per family.

The tiny ones (50,000 to 400,000 parameters) differ from real models in size only; tests train them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# Config classes are looked up by attribute when a model is built, so that listing the models does not import torch.
import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEFAULT_IMAGE_SIZE = 256
"""Default image size of small models: side of the input in pixels, or its longer side if the aspect ratio is kept."""

# Every backbone takes this argument, but the constructors do not declare it.
_LAST_THREE_STAGES: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}
_LAST_STAGE: dict[str, Any] = {"out_features": ["stage4"]}


def _rt_detr_v2_small() -> "PreTrainedConfig":
    """1.8 million parameters; reaches an AP of about 0.5 on BCCD in a quarter of an hour on two cores."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        **_LAST_THREE_STAGES,
    )
    return transformers.RTDetrV2Config(
        backbone_config=backbone,
        **_hybrid_encoder(width=64, channels=[64, 128, 256]),
        hidden_expansion=0.5,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_layers=3,
        num_queries=100,
        num_denoising=50,
    )


def _hybrid_encoder(*, width: int, channels: list[int]) -> dict[str, Any]:
    """Options that all small models of the RT-DETR family share."""
    return {
        "encoder_hidden_dim": width,
        "d_model": width,
        "encoder_in_channels": channels,
        "decoder_in_channels": [width] * 3,
        "feat_strides": [8, 16, 32],
        "num_feature_levels": 3,
        "anchor_image_size": None,
        # Random statistics must not be frozen.
        "freeze_backbone_batch_norms": False,
    }


def _tiny_hybrid_encoder() -> dict[str, Any]:
    return {
        **_hybrid_encoder(width=32, channels=[16, 24, 32]),
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "decoder_layers": 2,
        "decoder_n_points": 2,
        "hidden_expansion": 0.5,
        "num_queries": 20,
        "num_denoising": 10,
    }


def _tiny_rt_detr_backbone() -> "PreTrainedConfig":
    return transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        **_LAST_THREE_STAGES,
    )


def _rt_detr_tiny() -> "PreTrainedConfig":
    return transformers.RTDetrConfig(backbone_config=_tiny_rt_detr_backbone(), **_tiny_hybrid_encoder())


def _rt_detr_v2_tiny() -> "PreTrainedConfig":
    return transformers.RTDetrV2Config(
        backbone_config=_tiny_rt_detr_backbone(), decoder_n_levels=3, **_tiny_hybrid_encoder()
    )


def _tiny_hgnet() -> "PreTrainedConfig":
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 24],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        **_LAST_THREE_STAGES,
    )


def _d_fine_tiny() -> "PreTrainedConfig":
    return transformers.DFineConfig(backbone_config=_tiny_hgnet(), **{**_tiny_hybrid_encoder(), "decoder_layers": 3})


def _deimv2_tiny() -> "PreTrainedConfig":
    return transformers.Deimv2Config(
        backbone_config=_tiny_hgnet(),
        depth_mult=0.5,
        lqe_hidden_dim=16,
        **{**_tiny_hybrid_encoder(), "decoder_layers": 3},
    )


def _tiny_resnet(out_features: dict[str, Any]) -> "PreTrainedConfig":
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", **out_features
    )


def _tiny_transformer() -> dict[str, Any]:
    return {
        "backbone_config": _tiny_resnet(_LAST_STAGE),
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_queries": 20,
    }


def _detr_tiny() -> "PreTrainedConfig":
    return transformers.DetrConfig(**_tiny_transformer())


def _conditional_detr_tiny() -> "PreTrainedConfig":
    return transformers.ConditionalDetrConfig(**_tiny_transformer())


def _table_transformer_tiny() -> "PreTrainedConfig":
    return transformers.TableTransformerConfig(**_tiny_transformer())


def _dab_detr_tiny() -> "PreTrainedConfig":
    sizes = _tiny_transformer()
    return transformers.DabDetrConfig(hidden_size=sizes.pop("d_model"), **sizes)


def _deformable_detr_tiny() -> "PreTrainedConfig":
    sizes = _tiny_transformer() | {"backbone_config": _tiny_resnet(_LAST_THREE_STAGES)}
    return transformers.DeformableDetrConfig(num_feature_levels=4, encoder_n_points=2, decoder_n_points=2, **sizes)


def _deformable_detr_two_stage_tiny() -> "PreTrainedConfig":
    config: Any = _deformable_detr_tiny()
    config.two_stage = config.with_box_refine = True
    config.two_stage_num_proposals = config.num_queries
    return config  # type: ignore[no-any-return]


def _tiny_windowed_vit() -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 16,
        "out_features": ["stage2", "stage3"],
    }


def _tiny_grouped_decoder() -> dict[str, Any]:
    return {
        "d_model": 32,
        "c2f_num_blocks": 1,
        "decoder_layers": 2,
        "decoder_ffn_dim": 64,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 2,
        "decoder_n_points": 2,
        "num_queries": 20,
        "group_detr": 3,
    }


def _lw_detr_tiny() -> "PreTrainedConfig":
    backbone = transformers.LwDetrViTConfig(
        pretrain_image_size=64, num_windows=4, window_block_indices=[0, 1], **_tiny_windowed_vit()
    )
    return transformers.LwDetrConfig(backbone_config=backbone, projector_scale_factors=[1.0], **_tiny_grouped_decoder())


def _rf_detr_tiny() -> "PreTrainedConfig":
    backbone = transformers.RfDetrDinov2Config(image_size=96, num_windows=2, **_tiny_windowed_vit())
    return transformers.RfDetrConfig(backbone_config=backbone, **_tiny_grouped_decoder())


def _yolos_tiny() -> "PreTrainedConfig":
    return transformers.YolosConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=[64, 64],
        num_detection_tokens=20,
        use_mid_position_embeddings=True,
    )


@dataclass(frozen=True)
class SmallModel:
    """A detector that is built from scratch.

    Attributes:
        model_type: As in its config; known without importing torch.
        make_config: Makes the config, with the default `num_labels`.
    """

    model_type: str
    make_config: Callable[[], "PreTrainedConfig"]


SMALL_MODELS: Mapping[str, SmallModel] = {
    "rt_detr_v2_small": SmallModel("rt_detr_v2", _rt_detr_v2_small),
    "rt_detr_tiny": SmallModel("rt_detr", _rt_detr_tiny),
    "rt_detr_v2_tiny": SmallModel("rt_detr_v2", _rt_detr_v2_tiny),
    "d_fine_tiny": SmallModel("d_fine", _d_fine_tiny),
    "deimv2_tiny": SmallModel("deimv2", _deimv2_tiny),
    "detr_tiny": SmallModel("detr", _detr_tiny),
    "table_transformer_tiny": SmallModel("table-transformer", _table_transformer_tiny),
    "conditional_detr_tiny": SmallModel("conditional_detr", _conditional_detr_tiny),
    "dab_detr_tiny": SmallModel("dab-detr", _dab_detr_tiny),
    "deformable_detr_tiny": SmallModel("deformable_detr", _deformable_detr_tiny),
    "deformable_detr_two_stage_tiny": SmallModel("deformable_detr", _deformable_detr_two_stage_tiny),
    "lw_detr_tiny": SmallModel("lw_detr", _lw_detr_tiny),
    "rf_detr_tiny": SmallModel("rf_detr", _rf_detr_tiny),
    "yolos_tiny": SmallModel("yolos", _yolos_tiny),
}
