"""Tiny zero-shot detectors with random weights, written as Hugging Face model folders."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForZeroShotObjectDetection,
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    Owlv2Config,
    Owlv2ImageProcessor,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTImageProcessor,
    OwlViTProcessor,
    PreTrainedConfig,
    SwinConfig,
)

WORDS = ("cat", "remote", "control", "dog", "st", "bernard", "traffic", "light", "##s", "the", "a")
"""Words for which the tiny Grounding DINO has a token; it does not know any other word."""

TINY_ZERO_SHOT = ("owlvit", "owlv2", "grounding-dino", "mm-grounding-dino")
"""Model types that `write_zero_shot` knows."""


def write_zero_shot(model_type: str, folder: Path, *, seed: int = 0) -> str:
    """Write a model, its image processor and its tokenizer.

    Args:
        model_type: One of `TINY_ZERO_SHOT`.
        folder: Folder to write to; created if necessary.
        seed: Seed of the weights.

    Returns:
        The folder, as a value for `--model`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, processor = _owl(model_type) if model_type.startswith("owl") else _grounding_dino(model_type)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForZeroShotObjectDetection.from_config(config)
        _spread(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _spread(model: Any) -> None:
    """Set weights with which scores differ between images and are not saturated."""
    gain = 2 if model.config.model_type.startswith("owl") else 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 0:
                # MM Grounding DINO starts at scores of 0.01.
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            else:
                parameter.copy_(torch.randn(parameter.shape) * gain / parameter[0].numel() ** 0.5)
        if model.config.model_type.endswith("grounding-dino"):
            # Otherwise all queries would prefer the same label.
            model.model.query_position_embeddings.weight.mul_(10)
        if model.config.model_type == "grounding-dino":
            # Scores are plain products of these features with those of the tokens, and would all be 1.
            model.model.decoder.layer_norm.weight.mul_(0.5)


def _owl(model_type: str) -> tuple[PreTrainedConfig, Any]:
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["!pad", *characters, *(f"{character}</w>" for character in characters), "ca", "cat</w>"]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    merges: Any = [("c", "a"), ("ca", "t</w>")]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,
        pad_token="!pad",
        model_max_length=16,
    )
    layers = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 0}
    config_class, processor_class = (
        (OwlViTConfig, OwlViTProcessor) if model_type == "owlvit" else (Owlv2Config, Owlv2Processor)
    )
    config = config_class(
        text_config={**layers, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 16},
        vision_config={**layers, "image_size": 64, "patch_size": 8},
        projection_dim=32,
    )
    image_class = OwlViTImageProcessor if model_type == "owlvit" else Owlv2ImageProcessor
    image_processor = image_class(size={"height": 64, "width": 64})
    return config, processor_class(image_processor=image_processor, tokenizer=tokenizer)


def _grounding_dino(model_type: str) -> tuple[PreTrainedConfig, Any]:
    # The ids of these tokens are hard-coded in the model.
    vocabulary = {index: f"[unused{index}]" for index in range(1100)}
    vocabulary |= {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    vocabulary |= {1030 + index: word for index, word in enumerate(WORDS)}
    tokenizer = BertTokenizer(vocab={token: index for index, token in vocabulary.items()}, model_max_length=512)
    swin: dict[str, Any] = {"image_size": 64, "window_size": 4, "embed_dim": 16, "depths": [1, 1, 1]}
    swin |= {"num_heads": [2, 2, 4], "out_features": ["stage2", "stage3"]}
    config_class = GroundingDinoConfig if model_type == "grounding-dino" else MMGroundingDinoConfig
    config = config_class(
        backbone_config=SwinConfig(**swin),
        text_config=BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=37,
            max_position_embeddings=512,
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        num_queries=20,
        num_feature_levels=3,
        max_text_len=32,
    )
    image_processor = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 106})
    return config, GroundingDinoProcessor(image_processor=image_processor, tokenizer=tokenizer)
