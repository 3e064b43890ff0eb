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


_CHAT = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %} <end>{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)
"""Template of a chat; IMAGE stands for the tokens of a picture."""


def _chat_tokenizer(*image_tokens: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<end>", *image_tokens]
    words = [*special, *WORDS, "user", "assistant", ":", "Describe", "image"]
    tokens = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    roles: dict[str, Any] = {f"{role}_token": f"<{role}>" for role in ("pad", "bos", "eos", "unk")}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, **roles, additional_special_tokens=special[4:], model_max_length=512
    )


def _chat_text(tokenizer: Any) -> dict[str, Any]:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    return {**_LAYERS, **tokens, "num_key_value_heads": 4, "max_position_embeddings": 512}


def _llava() -> tuple[Any, Any]:
    tokenizer = _chat_tokenizer("<image>")
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION),
        text_config=hf.LlamaConfig(**_chat_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT.replace("IMAGE", "<image>"),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    """Architecture of SmolVLM: larger crops are several pictures."""
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    own = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles)
    tokenizer = _chat_tokenizer(*own)
    config = hf.Idefics3Config(
        vision_config=_VISION,
        text_config=hf.LlamaConfig(**_chat_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    image_processor = hf.Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    template = _CHAT.replace("IMAGE", "<image>")
    processor = hf.Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=template)
    return hf.Idefics3ForConditionalGeneration(config), processor


def _qwen2_vl() -> tuple[Any, Any]:
    """Architecture whose number of tokens depends on the size of the crop."""
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    tokenizer = _chat_tokenizer(*names.values())
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = hf.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
        text_config={**_chat_text(tokenizer), "rope_parameters": rope},
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    processor = hf.Qwen2VLProcessor(
        hf.Qwen2VLImageProcessor(size={"shortest_edge": 16**2, "longest_edge": 64**2}, patch_size=8),
        tokenizer,
        hf.Qwen2VLVideoProcessor(),
        chat_template=_CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return hf.Qwen2VLForConditionalGeneration(config), processor


TINY_MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "vit": _vit,
    "dinov2": _dinov2,
    "depth_anything": _depth_anything,
    "clip": _clip,
    "blip_captions": lambda: _blip(hf.BlipForConditionalGeneration),
    "blip_questions": lambda: _blip(hf.BlipForQuestionAnswering),
    "git": _git,
    "vilt": _vilt,
    "llava": _llava,
    "idefics3": _idefics3,
    "qwen2_vl": _qwen2_vl,
}
