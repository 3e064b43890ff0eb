"""The recipes of the model families' authors, one row per size, each with its source.

Rates hold for the batch size of their row; `raydet.models.recipes.resolve` scales them with the batch, as the authors
of D-FINE and DEIMv2 do. What the authors do not say (a moving average for DETR) follows the rules there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raydet.config import AugmentationSpec, Backbone


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training options of one model.

    Attributes:
        source: Repository and paths of the authors' files that the values come from.
        learning_rate: Learning rate of the head.
        batch_size: Batch size for which `learning_rate` holds.
        scales_with_batch: The rate is proportional to the batch size.
        backbone_factor: Learning rate of the backbone over that of the head.
        layer_decay: Factor from each layer of a vision transformer to the one below.
        factors: Factors of the head's rate by part of the parameter's name.
        weight_decay: Weight decay.
        max_grad_norm: Norm to which gradients are clipped.
        freeze_backbone: Part of the backbone that does not learn.
        warmup_steps: Most steps of warm-up.
        warmup_epochs: Most epochs of warm-up.
        augmentation: Preset, or list of transforms.
        plain_part: Part of the epochs at the end with flips as the only augmentation, and a single size.
        scales: Smallest and largest side in training over that in validation; equal for a single size.
        scale_steps: Sides in training, on each side of that in validation, in multiples of what the model divides;
            replaces `scales`.
        images_at_once: Most images of a micro-batch, of the model's own size, on a GPU with 16 GB.
    """

    source: str
    learning_rate: float
    batch_size: int
    scales_with_batch: bool = True
    backbone_factor: float = 0.1
    layer_decay: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.1
    freeze_backbone: Backbone = "none"
    warmup_steps: int = 500
    warmup_epochs: int = 1
    augmentation: AugmentationSpec = "detr"
    plain_part: float = 0.0
    scales: tuple[float, float] = (1.0, 1.0)
    scale_steps: int = 0
    images_at_once: int = 16


_RT_DETR = Recipe(
    source="lyuwenyu/RT-DETR: rtdetrv2_pytorch/configs/rtdetr/include/optimizer.yml, include/dataloader.yml, "
    "rtdetr_r18vd_6x_coco.yml, rtdetr_r34vd_6x_coco.yml",
    learning_rate=1e-4,
    batch_size=16,
    warmup_steps=2000,
    augmentation="rtdetr",
    plain_part=0.025,
    scales=(0.75, 1.25),
)
_RT_DETR_R50 = replace(
    _RT_DETR,
    source="lyuwenyu/RT-DETR: rtdetrv2_pytorch/configs/rtdetr/include/optimizer.yml, include/rtdetr_r50vd.yml, "
    "rtdetr_r50vd_6x_coco.yml",
    freeze_backbone="stem",
    images_at_once=8,
)
_RT_DETR_R101 = replace(
    _RT_DETR_R50,
    source="lyuwenyu/RT-DETR: rtdetrv2_pytorch/configs/rtdetr/rtdetr_r101vd_6x_coco.yml, include/optimizer.yml",
    backbone_factor=0.01,
)
_V2 = "lyuwenyu/RT-DETR: rtdetrv2_pytorch/configs/rtdetrv2/include/optimizer.yml, include/dataloader.yml"
_D_FINE = Recipe(
    source="Peterande/D-FINE: configs/dfine/dfine_hgnetv2_s_coco.yml, include/optimizer.yml, include/dataloader.yml",
    learning_rate=2e-4,
    batch_size=32,
    backbone_factor=0.5,
    warmup_steps=500,
    augmentation="dfine",
    plain_part=0.1,
    scales=(0.75, 1.25),
)
_D_FINE_L = replace(
    _D_FINE,
    source="Peterande/D-FINE: configs/dfine/dfine_hgnetv2_l_coco.yml",
    learning_rate=2.5e-4,
    backbone_factor=0.05,
    weight_decay=1.25e-4,
    freeze_backbone="stem",
    images_at_once=8,
)
_DEIM = Recipe(
    source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_dinov3_s_coco.yml, configs/base/deimv2.yml, "
    "configs/base/optimizer.yml, configs/base/dataloader.yml",
    learning_rate=5e-4,
    batch_size=32,
    backbone_factor=0.05,
    warmup_steps=2000,
    augmentation="dfine",
    plain_part=0.1,
    scales=(0.75, 1.25),
)
_DEIM_NANO = replace(
    _DEIM,
    source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_hgnetv2_pico_coco.yml, deimv2_hgnetv2_femto_coco.yml",
    learning_rate=1.6e-3,
    batch_size=128,
    backbone_factor=0.5,
    warmup_steps=4000,
    scales=(1.0, 1.0),
)
_LW_DETR = Recipe(
    source="Atten4Vis/LW-DETR: scripts/lwdetr_tiny_coco_train.sh, scripts/lwdetr_small_coco_train.sh, "
    "util/get_param_dicts.py, models/backbone/backbone.py, datasets/coco.py",
    learning_rate=1e-4,
    batch_size=32,
    backbone_factor=1.5 * 0.7**2,
    layer_decay=0.8,
    factors={"model.decoder": 0.7},
    augmentation="rfdetr",
    scales=(0.7, 1.4),
    images_at_once=8,
)
_LW_DETR_LARGE = replace(
    _LW_DETR,
    source="Atten4Vis/LW-DETR: scripts/lwdetr_large_coco_train.sh, util/get_param_dicts.py",
    batch_size=16,
    backbone_factor=1.5 * 0.5**2,
    layer_decay=0.7,
    factors={"model.decoder": 0.5},
    images_at_once=4,
)
_DETR = Recipe(
    source="facebookresearch/detr: main.py, models/backbone.py, datasets/coco.py; 8 × 2 images as in its README.md",
    learning_rate=1e-4,
    batch_size=16,
    freeze_backbone="stem",
    scales=(0.6, 1.0),
    images_at_once=4,
)
_YOLOS = Recipe(
    source="hustvl/YOLOS: README.md, main.py, datasets/coco.py",
    learning_rate=2.5e-5,
    batch_size=8,
    backbone_factor=1.0,
    warmup_steps=0,
    scales=(0.6, 1.0),
    images_at_once=4,
)

_SMALL = replace(
    _RT_DETR,
    source="raydet: half the rate at which rt_detr_v2_small learns from scratch; no author trains models of this width",
    learning_rate=5e-4,
    batch_size=8,
    scales_with_batch=False,
    backbone_factor=1.0,
    warmup_steps=500,
    scales=(1.0, 1.0),
)
"""Fine-tuning of raydet's own small models."""

RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "rt_detr": {"small": _SMALL, "r18": _RT_DETR, "r34": _RT_DETR, "r50": _RT_DETR_R50, "r101": _RT_DETR_R101},
    "rt_detr_v2": {
        "small": _SMALL,
        "r18": replace(
            _RT_DETR,
            source=f"{_V2}, rtdetrv2_r18vd_120e_coco.yml",
            backbone_factor=1.0,
            scales=(1.0, 1.0),
        ),
        "r34": replace(_RT_DETR, source=f"{_V2}, rtdetrv2_r34vd_120e_coco.yml", backbone_factor=0.5),
        "r50": replace(_RT_DETR_R50, source=f"{_V2}, rtdetrv2_r50vd_6x_coco.yml, include/rtdetrv2_r50vd.yml"),
        "r101": replace(_RT_DETR_R101, source=f"{_V2}, rtdetrv2_r101vd_6x_coco.yml"),
    },
    "d_fine": {
        "small": replace(_SMALL, augmentation="dfine", plain_part=0.1),
        "n": replace(
            _D_FINE,
            source="Peterande/D-FINE: configs/dfine/dfine_hgnetv2_n_coco.yml",
            learning_rate=8e-4,
            batch_size=128,
            scales=(1.0, 1.0),
        ),
        "s": _D_FINE,
        "m": replace(_D_FINE, source="Peterande/D-FINE: configs/dfine/dfine_hgnetv2_m_coco.yml", backbone_factor=0.1),
        "l": _D_FINE_L,
        "x": replace(
            _D_FINE_L, source="Peterande/D-FINE: configs/dfine/dfine_hgnetv2_x_coco.yml", backbone_factor=0.01
        ),
    },
    "deimv2": {
        "atto": replace(
            _DEIM_NANO,
            source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_hgnetv2_atto_coco.yml",
            learning_rate=2e-3,
        ),
        "pico": _DEIM_NANO,
        "n": replace(
            _DEIM_NANO,
            source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_hgnetv2_n_coco.yml; its batch as in "
            "configs/deim_dfine/dfine_hgnetv2_n_coco.yml",
            learning_rate=8e-4,
            warmup_steps=2000,
        ),
        "s": replace(
            _DEIM,
            source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_hgnetv2_s_coco.yml",
            learning_rate=4e-4,
            backbone_factor=0.5,
        ),
        "m": replace(
            _DEIM,
            source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_hgnetv2_m_coco.yml",
            learning_rate=4e-4,
            backbone_factor=0.1,
        ),
        "l": replace(
            _DEIM,
            source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_hgnetv2_l_coco.yml",
            weight_decay=1.25e-4,
            images_at_once=8,
        ),
        "x": replace(
            _DEIM,
            source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_hgnetv2_x_coco.yml",
            backbone_factor=0.01,
            weight_decay=1.25e-4,
            freeze_backbone="stem",
            images_at_once=8,
        ),
        "dinov3_s": _DEIM,
        "dinov3_m": replace(
            _DEIM, source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_dinov3_m_coco.yml", images_at_once=8
        ),
        "dinov3_l": replace(
            _DEIM,
            source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_dinov3_l_coco.yml",
            backbone_factor=0.025,
            weight_decay=1.25e-4,
            images_at_once=8,
        ),
        "dinov3_x": replace(
            _DEIM,
            source="Intellindust-AI-Lab/DEIMv2: configs/deimv2/deimv2_dinov3_x_coco.yml",
            backbone_factor=0.02,
            weight_decay=1.25e-4,
            images_at_once=8,
        ),
    },
    "lw_detr": {
        "small": _LW_DETR,
        "medium": replace(
            _LW_DETR,
            source="Atten4Vis/LW-DETR: scripts/lwdetr_medium_coco_train.sh",
            batch_size=16,
            layer_decay=0.7,
        ),
        "large": _LW_DETR_LARGE,
        "xlarge": replace(
            _LW_DETR_LARGE,
            source="Atten4Vis/LW-DETR: scripts/lwdetr_xlarge_coco_train.sh",
            layer_decay=0.75,
            weight_decay=1e-3,
        ),
    },
    "rf_detr": {
        "": replace(
            _LW_DETR,
            source="roboflow/rf-detr: src/rfdetr/config.py (TrainConfig, with its target batch of 16), "
            "rfdetr/util/get_param_dicts.py, rfdetr/models/backbone/backbone.py, rfdetr/datasets/coco.py",
            batch_size=16,
            warmup_steps=0,
            scale_steps=5,
        )
    },
    "detr": {"": _DETR},
    "conditional_detr": {
        "": replace(_DETR, source="Atten4Vis/ConditionalDETR: main.py, with 8 × 2 images; the rest as DETR")
    },
    "dab-detr": {"": replace(_DETR, source="IDEA-Research/DAB-DETR: main.py, with 8 × 2 images; the rest as DETR")},
    "deformable_detr": {
        "": replace(
            _DETR,
            source="fundamentalvision/Deformable-DETR: main.py, models/backbone.py; batch of README.md",
            learning_rate=2e-4,
            batch_size=32,
            factors={"sampling_offsets": 0.1, "reference_points": 0.1},
        )
    },
    "table-transformer": {
        "": replace(
            _DETR,
            source="microsoft/table-transformer: src/detection_config.json, src/structure_config.json; their rate for "
            "a batch of 2 is kept for 16, half that of DETR; no mirror images, because pages hold text",
            learning_rate=5e-5,
            backbone_factor=0.2,
            augmentation=[{"RandomBrightnessContrast": {"p": 0.5}}],
            scales=(1.0, 1.0),
        )
    },
    "yolos": {
        "tiny": replace(_YOLOS, learning_rate=5e-5, batch_size=16, scales=(0.5, 1.2), images_at_once=8),
        "base": _YOLOS,
    },
}
"""Recipes by model type and size; see `raydet.models.recipes.variants`."""

_SCRATCH_AUGMENTATION: list[dict[str, Any]] = [
    {"HorizontalFlip": {"p": 0.5}},
    {"Affine": {"scale": [0.75, 1.33], "translate_percent": [-0.1, 0.1], "rotate": 0, "fill": 114, "p": 0.7}},
    {"RandomBrightnessContrast": {"brightness_limit": 0.15, "contrast_limit": 0.15, "p": 0.4}},
]


def from_scratch(recipe: Recipe) -> Recipe:
    """Return the recipe of the same model without pretrained weights.

    With the authors' rates, which assume a pretrained backbone, a model does not learn from a few hundred images.
    """
    return replace(
        recipe,
        source="raydet: docs/benchmarks.md, rt_detr_v2_small from scratch",
        learning_rate=1e-3,
        batch_size=8,
        scales_with_batch=False,
        backbone_factor=1.0,
        layer_decay=1.0,
        weight_decay=1e-4,
        freeze_backbone="none",
        warmup_steps=500,
        warmup_epochs=2,
        augmentation=_SCRATCH_AUGMENTATION,
        plain_part=0.067,
        scales=(1.0, 1.0),
        scale_steps=0,
    )
