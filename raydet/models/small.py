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


def _rt_detr_v2_small() -> dict[str, Any]:
    """1.8 million parameters; reaches an AP of about 0.5 on BCCD in a quarter of an hour on two cores."""
    return {
        "backbone_config": transformers.RTDetrResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 256],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            **_LAST_THREE_STAGES,
        ),
        **_hybrid_encoder(width=64, channels=[64, 128, 256]),
        "hidden_expansion": 0.5,
        "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_layers": 3,
        "num_queries": 100,
        "num_denoising": 50,
    }


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


def _tiny_hybrid_encoder(backbone: "PreTrainedConfig") -> dict[str, Any]:
    return {
        "backbone_config": backbone,
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


def _rt_detr_tiny() -> dict[str, Any]:
    return _tiny_hybrid_encoder(
        transformers.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            **_LAST_THREE_STAGES,
        )
    )


def _d_fine_tiny() -> dict[str, Any]:
    backbone = transformers.HGNetV2Config(
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
    return {**_tiny_hybrid_encoder(backbone), "decoder_layers": 3}


def _detr_tiny(stages: Mapping[str, Any] = _LAST_STAGE) -> dict[str, Any]:
    return {
        "backbone_config": transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", **stages
        ),
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_queries": 20,
    }


def _dab_detr_tiny() -> dict[str, Any]:
    sizes = _detr_tiny()
    return {"hidden_size": sizes.pop("d_model"), **sizes}


def _deformable_detr_tiny() -> dict[str, Any]:
    own = {"num_feature_levels": 4, "encoder_n_points": 2, "decoder_n_points": 2}
    return {**_detr_tiny(_LAST_THREE_STAGES), **own}


def _two_stage_tiny() -> dict[str, Any]:
    sizes = _deformable_detr_tiny()
    return {**sizes, "two_stage": True, "with_box_refine": True, "two_stage_num_proposals": sizes["num_queries"]}


def _tiny_windowed_vit() -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 16,
        "out_features": ["stage2", "stage3"],
    }


def _tiny_grouped_decoder(backbone: "PreTrainedConfig") -> dict[str, Any]:
    return {
        "backbone_config": backbone,
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


def _lw_detr_tiny() -> dict[str, Any]:
    backbone = transformers.LwDetrViTConfig(
        pretrain_image_size=64, num_windows=4, window_block_indices=[0, 1], **_tiny_windowed_vit()
    )
    return {**_tiny_grouped_decoder(backbone), "projector_scale_factors": [1.0]}


def _rf_detr_tiny() -> dict[str, Any]:
    return _tiny_grouped_decoder(transformers.RfDetrDinov2Config(image_size=96, num_windows=2, **_tiny_windowed_vit()))


def _yolos_tiny() -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "image_size": [64, 64],
        "num_detection_tokens": 20,
        "use_mid_position_embeddings": True,
    }


@dataclass(frozen=True)
class SmallModel:
    """A detector that is built from scratch.

    Attributes:
        model_type: As in its config; known without importing torch.
        make_options: Makes the options of the config that differ from the defaults of its class.
    """

    model_type: str
    make_options: Callable[[], dict[str, Any]]

    def make_config(self) -> "PreTrainedConfig":
        """Make the config, with the default `num_labels`."""
        return transformers.AutoConfig.for_model(self.model_type, **self.make_options())


SMALL_MODELS: Mapping[str, SmallModel] = {
    "rt_detr_v2_small": SmallModel("rt_detr_v2", _rt_detr_v2_small),
    "rt_detr_tiny": SmallModel("rt_detr", _rt_detr_tiny),
    "rt_detr_v2_tiny": SmallModel("rt_detr_v2", lambda: {**_rt_detr_tiny(), "decoder_n_levels": 3}),
    "d_fine_tiny": SmallModel("d_fine", _d_fine_tiny),
    "deimv2_tiny": SmallModel("deimv2", lambda: {**_d_fine_tiny(), "depth_mult": 0.5, "lqe_hidden_dim": 16}),
    "detr_tiny": SmallModel("detr", _detr_tiny),
    "table_transformer_tiny": SmallModel("table-transformer", _detr_tiny),
    "conditional_detr_tiny": SmallModel("conditional_detr", _detr_tiny),
    "dab_detr_tiny": SmallModel("dab-detr", _dab_detr_tiny),
    "deformable_detr_tiny": SmallModel("deformable_detr", _deformable_detr_tiny),
    "deformable_detr_two_stage_tiny": SmallModel("deformable_detr", _two_stage_tiny),
    "lw_detr_tiny": SmallModel("lw_detr", _lw_detr_tiny),
    "rf_detr_tiny": SmallModel("rf_detr", _rf_detr_tiny),
    "yolos_tiny": SmallModel("yolos", _yolos_tiny),
}
