"""Models that turn a crop and a question into words."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from raydet.config import CropsConfig
from raydet.second_looks.models.looker import Pixels, answer_fields


class _Speaker(ABC):
    """A model with a processor of images and texts."""

    def __init__(self, model: Any, processor: Any, config: CropsConfig) -> None:
        self._model, self._processor, self._config = model, processor, config
        self._columns = [field.name for field in answer_fields(config)]

    @torch.inference_mode()
    def look(self, crops: Sequence[Pixels]) -> list[dict[str, Any]]:
        """See `Looker.look`."""
        images = [Image.fromarray(crop) for crop in crops]
        questions: list[str | None] = list(self._config.ask) if self._config.ask else [None]
        answers = [self._answer(images, question) for question in questions]
        return [dict(zip(self._columns, own, strict=True)) for own in zip(*answers, strict=True)]

    @abstractmethod
    def _answer(self, images: list[Image.Image], question: str | None) -> list[str]:
        """Return the answer about each image."""

    def _generate(self, inputs: Any) -> Any:
        return self._model.generate(**inputs, max_new_tokens=self._config.max_new_tokens, do_sample=False, num_beams=1)

    def _to_device(self, inputs: Any) -> Any:
        return inputs.to(self._model.device, self._model.dtype)


class ChatAnswerer(_Speaker):
    """A model that is asked in the form of a chat, such as SmolVLM and LLaVA."""

    def _answer(self, images: list[Image.Image], question: str | None) -> list[str]:
        text = question or "Describe this image."
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
            for image in images
        ]
        self._processor.tokenizer.padding_side = "left"  # so that each answer begins where its question ends
        inputs = self._processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        found = self._generate(self._to_device(inputs))[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._processor.batch_decode(found, skip_special_tokens=True)]


class Captioner(_Speaker):
    """A model that continues a text about an image, or answers a question, such as BLIP and GIT."""

    def _answer(self, images: list[Image.Image], question: str | None) -> list[str]:
        texts = {} if question is None else {"text": [question] * len(images), "padding": True}
        inputs = self._to_device(self._processor(images=images, return_tensors="pt", **texts))
        found = self._processor.batch_decode(self._generate(inputs), skip_special_tokens=True)
        return [_continuation(text.strip(), question or "") for text in found]


def _continuation(text: str, start: str) -> str:
    """Return what follows the text that a model was to continue, in which tokenizers change case and spaces."""
    plain = start.strip().lower()
    return text[len(plain) :].strip() if plain and text.lower().startswith(plain) else text


class QuestionClassifier(_Speaker):
    """A model that chooses one of the answers that it knows, such as ViLT."""

    def _answer(self, images: list[Image.Image], question: str | None) -> list[str]:
        texts = [question or ""] * len(images)
        inputs = self._to_device(self._processor(images=images, text=texts, return_tensors="pt", padding=True))
        best = self._model(**inputs).logits.argmax(-1).tolist()
        return [self._model.config.id2label[index] for index in best]
