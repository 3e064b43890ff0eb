"""Tiny detectors with a vision transformer as backbone, saved as a folder from which a training can start."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForObjectDetection

from raydet.models.families import FAMILIES
from raydet.models.processors import default_processor
from raydet.models.small import SMALL_MODELS

NAMES = ("lw_detr_tiny", "rf_detr_tiny", "yolos_tiny", "deimv2_dinov3_tiny")
CLASSES = ("cat", "dog", "toothbrush")


def save_pretrained(name: str, folder: Path, *, side: int = 96) -> str:
    """Save a model with random weights, whose outputs depend on the image, and return its folder."""
    if name == "deimv2_dinov3_tiny":
        backbone = {
            "model_type": "dinov3_vit",
            "hidden_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "intermediate_size": 96,
            "num_register_tokens": 0,
            "pos_embed_rescale": None,
            "key_bias": False,
            "out_indices": [1, 2, 3],
            "apply_layernorm": False,
            "reshape_hidden_states": True,
        }
        sizes = {"encoder_in_channels": [32] * 3, "encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3}
        tiny = SMALL_MODELS["deimv2_tiny"].make_options()
        config = AutoConfig.for_model("deimv2", **{**tiny, **sizes, "backbone_config": backbone})
    else:
        config = SMALL_MODELS[name].make_config()
    config.id2label = dict(enumerate(CLASSES))
    config.label2id = {label: index for index, label in config.id2label.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForObjectDetection.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    processor = default_processor(FAMILIES[config.model_type])
    processor.size = {"height": side, "width": side}
    processor.save_pretrained(folder)
    return str(folder)
