"""The size of a model, read from its config alone: the row of the table of recipes that it follows."""

import re
from collections.abc import Mapping
from typing import Any

Content = Mapping[str, Any]
"""A `config.json`. It may lack what equals the defaults of transformers."""

_SMALL_WIDTH = 64
"""Channels of the encoder of raydet's small models."""


def variant_of(model_type: str, content: Content) -> str:
    """Return the key of a model in the table of its model type; the nearest one for a size that its authors lack."""
    find = _FINDERS.get(model_type)
    return "" if find is None else find(content, content.get("backbone_config") or {})


def _rt_detr(content: Content, backbone: Content) -> str:
    if content.get("encoder_hidden_dim", 256) <= _SMALL_WIDTH:
        return "small"
    name = re.search(r"resnet(\d+)", str(content.get("backbone") or ""))
    if name:
        num_layers = int(name[1])
    else:
        is_basic = backbone.get("layer_type", "bottleneck") == "basic"
        num_layers = (2 if is_basic else 3) * sum(backbone.get("depths", (3, 4, 6, 3))) + 2
    return "r18" if num_layers < 26 else "r34" if num_layers < 42 else "r50" if num_layers < 75 else "r101"


def _d_fine(content: Content, backbone: Content) -> str:
    width, num_layers = content.get("encoder_hidden_dim", 256), content.get("decoder_layers", 6)
    if width >= 384:
        return "x"
    return (
        "small"
        if width <= _SMALL_WIDTH
        else "n"
        if width <= 128
        else "s"
        if num_layers <= 3
        else "m"
        if num_layers <= 4
        else "l"
    )


def _deimv2(content: Content, backbone: Content) -> str:
    width, num_layers = content.get("encoder_hidden_dim", 256), content.get("decoder_layers", 6)
    if str(backbone.get("model_type", "hgnet_v2")).startswith("dinov3"):
        size = "s" if width <= 192 else "l" if width <= 224 else "m" if num_layers <= 4 else "x"
        return f"dinov3_{size}"
    return "atto" if width <= _SMALL_WIDTH else "pico" if width <= 112 else _d_fine(content, backbone)


def _lw_detr(content: Content, backbone: Content) -> str:
    width = backbone.get("hidden_size", 768)
    if content.get("d_model", 256) > 256:
        return "xlarge" if width > 384 else "large"
    return "medium" if width > 192 else "small"


def _yolos(content: Content, backbone: Content) -> str:
    return "tiny" if content.get("hidden_size", 768) <= 192 else "base"


_FINDERS = {
    "rt_detr": _rt_detr,
    "rt_detr_v2": _rt_detr,
    "d_fine": _d_fine,
    "deimv2": _deimv2,
    "lw_detr": _lw_detr,
    "yolos": _yolos,
}
