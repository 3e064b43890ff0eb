"""Tiny models of images, and of images and texts, with random weights, written as Hugging Face model folders.

The classes of transformers are imported on use, since every process of a test run imports this module.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

SIDE = 32
WORDS = ("cat", "dog", "red", "blue", "what", "colour", "is", "it", "a", "photo", "of", "the", "this", "?", ".")
_LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION: dict[str, Any] = {**_LAYERS, "image_size": SIDE, "patch_size": 8}


def write_model(name: str, folder: Path) -> str:
    """Write one of `TINY_MODELS`, and return its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = TINY_MODELS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # otherwise answers would hardly depend on the image
                    parameter.copy_(torch.randn(parameter.shape) * 2 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _bert_tokenizer() -> hf.BertTokenizer:
    # BLIP's first token of an answer is [DEC]; its ids and those of BERT are in the configs below.
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *WORDS]
    return hf.BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=32)


_NUM_TOKENS = 7 + len(WORDS)
_TEXT: dict[str, Any] = {
    **_LAYERS,
    "vocab_size": _NUM_TOKENS,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "eos_token_id": 3,
    "sep_token_id": 3,
}


def _vit() -> tuple[Any, Any]:
    config = hf.ViTConfig(**_VISION, id2label={index: f"kind {index}" for index in range(7)})
    return hf.ViTForImageClassification(config), hf.ViTImageProcessor(size={"height": SIDE, "width": SIDE})


def _dinov2() -> tuple[Any, Any]:
    processor = hf.BitImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return hf.Dinov2Model(hf.Dinov2Config(**_VISION)), processor


def _depth_anything() -> tuple[Any, Any]:
    options: dict[str, Any] = {"out_indices": [1, 2], "reshape_hidden_states": False}
    config: Any = hf.DepthAnythingConfig(
        backbone_config=hf.Dinov2Config(**_VISION, **options),
        patch_size=8,
        reassemble_hidden_size=32,
        reassemble_factors=[4, 2],
        neck_hidden_sizes=[16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    processor = hf.DPTImageProcessor(size={"height": SIDE, "width": SIDE}, ensure_multiple_of=8, keep_aspect_ratio=True)
    return hf.DepthAnythingForDepthEstimation(config), processor


def _clip() -> tuple[Any, Any]:
    from tokenizers import pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["!pad", *characters, *(f"{character}</w>" for character in characters)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = hf.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], pad_token="!pad", model_max_length=64
    )
    text = {**_LAYERS, "vocab_size": len(vocabulary), "max_position_embeddings": 64}
    text |= {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 0}
    config = hf.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16, logit_scale_init_value=1.0)
    image_processor = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return hf.CLIPModel(config), hf.CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def _blip(kind: Any) -> tuple[Any, Any]:
    config = hf.BlipConfig(
        text_config={**_TEXT, "projection_dim": 16, "encoder_hidden_size": 32},
        vision_config={**_VISION, "projection_dim": 16},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    image_processor = hf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    return kind(config), hf.BlipProcessor(image_processor=image_processor, tokenizer=_bert_tokenizer())


def _git() -> tuple[Any, Any]:
    config = hf.GitConfig(**_TEXT, vision_config=_VISION)
    image_processor = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return hf.GitForCausalLM(config), hf.GitProcessor(image_processor=image_processor, tokenizer=_bert_tokenizer())


def _vilt() -> tuple[Any, Any]:
    config = hf.ViltConfig(
        **_VISION,
        vocab_size=_NUM_TOKENS,
        max_position_embeddings=40,
        id2label={index: f"answer {index}" for index in range(9)},
    )
    options: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "size_divisor": 8}
    image_processor = hf.ViltImageProcessor(**options)
    return hf.ViltForQuestionAnswering(config), hf.ViltProcessor(
        image_processor=image_processor, tokenizer=_bert_tokenizer()
    )


TINY_MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "vit": _vit,
    "dinov2": _dinov2,
    "depth_anything": _depth_anything,
    "clip": _clip,
    "blip_captions": lambda: _blip(hf.BlipForConditionalGeneration),
    "blip_questions": lambda: _blip(hf.BlipForQuestionAnswering),
    "git": _git,
    "vilt": _vilt,
}
