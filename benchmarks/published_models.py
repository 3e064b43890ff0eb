"""Published detectors with random weights, built from the values of their configs; nothing is downloaded."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

# Classes are looked up by attribute, so that importing this module does not import torch.
import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from raydet.models.detector import Detector
    from raydet.tables.schema import Category

_LAST_THREE_STAGES: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}


def _rt_detr_v2_r18(**options: Any) -> "PreTrainedConfig":
    """`PekingU/rtdetr_v2_r18vd`."""
    backbone = transformers.RTDetrResNetConfig(
        depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", **_LAST_THREE_STAGES
    )
    return transformers.RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=3,
        **options,
    )


def _rt_detr_v2_r50(**options: Any) -> "PreTrainedConfig":
    """`PekingU/rtdetr_v2_r50vd`, whose values are the defaults of transformers."""
    return transformers.RTDetrV2Config(**options)


def _d_fine_s(**options: Any) -> "PreTrainedConfig":
    """`ustc-community/dfine-small-coco`."""
    backbone = transformers.HGNetV2Config(
        hidden_sizes=[128, 256, 512, 1024],
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 64, 256, 512],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=[64, 256, 512, 1024],
        stage_num_blocks=[1, 1, 2, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[3, 3, 3, 3],
        use_learnable_affine_block=True,
        **_LAST_THREE_STAGES,
    )
    return transformers.DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=[256, 512, 1024],
        hidden_expansion=0.5,
        depth_mult=0.34,
        decoder_layers=3,
        decoder_n_points=[3, 6, 3],
        **options,
    )


PUBLISHED: Mapping[str, Callable[..., "PreTrainedConfig"]] = {
    "rt_detr_v2_r18": _rt_detr_v2_r18,
    "rt_detr_v2_r50": _rt_detr_v2_r50,
    "d_fine_s": _d_fine_s,
}


def published_model(name: str, class_names: Sequence[str]) -> "PreTrainedModel":
    """Build a model with random weights, the same in every call.

    Args:
        name: A key of `PUBLISHED`.
        class_names: Names of the classes.
    """
    import torch

    labels = dict(enumerate(class_names))
    options = {"num_labels": len(labels), "id2label": labels, "label2id": {label: key for key, label in labels.items()}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = transformers.AutoModelForObjectDetection.from_config(PUBLISHED[name](**options))
    return model


def published_detector(name: str, categories: "Sequence[Category]", *, image_size: int) -> "Detector":
    """Wrap `published_model` and an image processor for square inputs of `image_size` pixels."""
    from raydet.models.detector import Detector

    processor = transformers.RTDetrImageProcessor(size={"height": image_size, "width": image_size})
    model = published_model(name, [category.name for category in categories])
    return Detector(model, processor, categories, where=name)
