"""Configurations of published checkpoints, one for each family: the values of their `config.json`, without weights.

Values that equal the defaults of transformers are left out. Several checkpoints for COCO have 91 labels, of which N/A
stands for the ids that COCO does not use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedConfig

from benchmarks.published_models import PUBLISHED

UNUSED_IDS = frozenset({0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
"""Ids below 91 that no class of COCO has."""
COCO_91 = tuple("N/A" if number in UNUSED_IDS else f"thing {number}" for number in range(91))
"""One name for each id, as in checkpoints that count classes by COCO's ids."""
COCO_80 = tuple(name for name in COCO_91 if name != "N/A")

_DETR_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
_RESNET_50 = {"use_timm_backbone": True, "backbone": "resnet50", "use_pretrained_backbone": False}
_WIDTHS_OF_B0: Mapping[str, Any] = {
    "hidden_sizes": [128, 256, 512, 1024],
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [3, 3, 3, 3],
    "use_learnable_affine_block": True,
}


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A published checkpoint without its weights.

    Attributes:
        hub: Name on the Hub.
        model_type: Model type, as in its config.
        values: Values of its config that differ from the defaults of transformers; sub-configs by their model type.
        labels: Class names by index.
        processor: Class of its image processor.
        processor_values: Values of that processor that differ from its defaults.
        millions: Parameters in millions.
        smallest_size: Smallest image size in pixels, a multiple of 32, at which it has enough cells for its queries.
    """

    hub: str
    model_type: str
    values: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = COCO_91
    processor: str
    processor_values: Mapping[str, Any] = field(default_factory=dict)
    millions: int
    smallest_size: int = 128

    def make_config(self) -> PreTrainedConfig:
        """Make the config as the Hub has it."""
        labels = {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: number for number, name in enumerate(self.labels)},
        }
        if self.model_type in _FROM_BENCHMARKS:
            return _FROM_BENCHMARKS[self.model_type](**labels)
        values = dict(self.values)
        backbone = dict(values.pop("backbone_config", {}))
        if backbone:
            values["backbone_config"] = transformers.AutoConfig.for_model(backbone.pop("model_type"), **backbone)
        return transformers.AutoConfig.for_model(self.model_type, **values, **labels)

    def make_processor(self) -> Any:
        """Make the image processor as the Hub has it."""
        return getattr(transformers, self.processor)(**self.processor_values)


_FROM_BENCHMARKS = {"rt_detr_v2": PUBLISHED["rt_detr_v2_r18"], "d_fine": PUBLISHED["d_fine_s"]}

MODELS: Mapping[str, PublishedModel] = {
    "detr": PublishedModel(
        hub="facebook/detr-resnet-50",
        model_type="detr",
        values=_RESNET_50,
        processor="DetrImageProcessor",
        processor_values={"size": _DETR_SIZE},
        millions=42,
    ),
    "conditional_detr": PublishedModel(
        hub="microsoft/conditional-detr-resnet-50",
        model_type="conditional_detr",
        values=_RESNET_50,
        processor="ConditionalDetrImageProcessor",
        processor_values={"size": _DETR_SIZE},
        millions=43,
    ),
    "deformable_detr": PublishedModel(
        hub="SenseTime/deformable-detr",
        model_type="deformable_detr",
        values=_RESNET_50,
        processor="DeformableDetrImageProcessor",
        processor_values={"size": _DETR_SIZE},
        millions=40,
    ),
    "deformable_detr_two_stage": PublishedModel(
        hub="SenseTime/deformable-detr-with-box-refine-two-stage",
        model_type="deformable_detr",
        values={**_RESNET_50, "two_stage": True, "with_box_refine": True},
        processor="DeformableDetrImageProcessor",
        processor_values={"size": _DETR_SIZE},
        millions=41,
        smallest_size=160,
    ),
    "dab_detr": PublishedModel(
        hub="IDEA-Research/dab-detr-resnet-50",
        model_type="dab-detr",
        values=_RESNET_50,
        processor="ConditionalDetrImageProcessor",
        processor_values={"size": _DETR_SIZE},
        millions=44,
    ),
    "table_transformer": PublishedModel(
        hub="microsoft/table-transformer-detection",
        model_type="table-transformer",
        values={**_RESNET_50, "backbone": "resnet18", "num_queries": 15},
        labels=("table", "table rotated"),
        processor="DetrImageProcessor",
        processor_values={"size": {"shortest_edge": 800, "longest_edge": 800}},
        millions=29,
    ),
    "yolos": PublishedModel(
        hub="hustvl/yolos-tiny",
        model_type="yolos",
        values={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_attention_heads": 3,
            "image_size": [800, 1333],
            "use_mid_position_embeddings": False,
        },
        processor="YolosImageProcessor",
        processor_values={"size": {"shortest_edge": 512, "longest_edge": 1333}},
        millions=6,
    ),
    "rt_detr": PublishedModel(
        hub="PekingU/rtdetr_r50vd",
        model_type="rt_detr",
        labels=COCO_80,
        processor="RTDetrImageProcessor",
        millions=43,
    ),
    "rt_detr_v2": PublishedModel(
        hub="PekingU/rtdetr_v2_r18vd",
        model_type="rt_detr_v2",
        labels=COCO_80,
        processor="RTDetrImageProcessor",
        millions=20,
    ),
    "d_fine": PublishedModel(
        hub="ustc-community/dfine-small-coco",
        model_type="d_fine",
        labels=COCO_80,
        processor="RTDetrImageProcessor",
        millions=10,
    ),
    "deimv2": PublishedModel(
        hub="Intellindust/DEIMv2_HGNetv2_N_COCO",
        model_type="deimv2",
        values={
            "backbone_config": {"model_type": "hgnet_v2", "out_indices": [3, 4], **_WIDTHS_OF_B0},
            "encoder_in_channels": [512, 1024],
            "encoder_hidden_dim": 128,
            "encoder_ffn_dim": 512,
            "encode_proj_layers": [1],
            "feat_strides": [16, 32],
            "hidden_expansion": 0.34,
            "depth_mult": 0.5,
            "d_model": 128,
            "decoder_in_channels": [128, 128],
            "decoder_ffn_dim": 512,
            "decoder_layers": 3,
            "decoder_n_points": [6, 6],
            "num_feature_levels": 2,
            "decoder_activation_function": "silu",
        },
        labels=COCO_80,
        processor="RTDetrImageProcessor",
        millions=4,
        smallest_size=256,
    ),
    "deimv2_dinov3": PublishedModel(
        hub="Intellindust/DEIMv2_DINOv3_S_COCO",
        model_type="deimv2",
        values={
            "backbone_config": {
                "model_type": "dinov3_vit",
                "hidden_size": 192,
                "num_attention_heads": 3,
                "num_hidden_layers": 12,
                "intermediate_size": 768,
                "layerscale_value": 1.0,
                "num_register_tokens": 0,
                "pos_embed_rescale": None,
                "key_bias": False,
                "rope_theta": 100.0,
                "out_indices": [4, 8, 12],
                "apply_layernorm": False,
                "reshape_hidden_states": True,
            },
            "encoder_in_channels": [192, 192, 192],
            "encoder_hidden_dim": 192,
            "encoder_ffn_dim": 512,
            "hidden_expansion": 0.34,
            "depth_mult": 0.67,
            "d_model": 192,
            "decoder_in_channels": [192, 192, 192],
            "decoder_ffn_dim": 512,
            "decoder_layers": 4,
            "decoder_n_points": [3, 6, 3],
            "decoder_activation_function": "silu",
            "encoder_has_trailing_conv": False,
        },
        labels=COCO_80,
        processor="RTDetrImageProcessor",
        processor_values={"do_normalize": True},
        millions=10,
    ),
    "lw_detr": PublishedModel(
        hub="AnnaZhang/lwdetr_tiny_60e_coco",
        model_type="lw_detr",
        values={
            "backbone_config": {
                "model_type": "lw_detr_vit",
                "image_size": 1024,
                "hidden_size": 192,
                "num_hidden_layers": 6,
                "window_block_indices": [0, 2, 4],
                "out_indices": [1, 3, 5],
            },
            "projector_scale_factors": [1.0],
            "num_queries": 100,
            "decoder_n_points": 2,
        },
        processor="DeformableDetrImageProcessor",
        processor_values={"size": {"height": 640, "width": 640}},
        millions=12,
        smallest_size=192,
    ),
    "rf_detr": PublishedModel(
        hub="Roboflow/rf-detr-nano",
        model_type="rf_detr",
        values={
            "backbone_config": {
                "model_type": "rf_detr_dinov2",
                "image_size": 384,
                "patch_size": 16,
                "hidden_size": 384,
                "num_attention_heads": 6,
                "num_windows": 2,
                "out_indices": [3, 6, 9, 12],
            },
            "decoder_layers": 2,
            "decoder_n_points": 2,
        },
        processor="DetrImageProcessor",
        processor_values={"size": {"height": 384, "width": 384}},
        millions=30,
        smallest_size=288,
    ),
}
"""Published models by a short name; every family has at least one."""
