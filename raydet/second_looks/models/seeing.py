"""Models that turn a crop into classes, a vector or a depth."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydet.common.errors import UserError
from raydet.config import CropsConfig
from raydet.second_looks.models.looker import Pixels

DEFAULT_TEMPLATE = "This is a photo of {}."
"""That of transformers' pipeline."""


class _Seer:
    """A model with an image processor."""

    def __init__(self, model: Any, processor: Any, config: CropsConfig) -> None:
        self._model, self._processor, self._config = model, processor, config

    def _inputs(self, crops: Sequence[Pixels]) -> Mapping[str, Tensor]:
        found = self._processor(images=list(crops), return_tensors="pt", input_data_format="channels_last")
        inputs: Mapping[str, Tensor] = found.to(self._model.device, self._model.dtype)
        return inputs


class Classifier(_Seer):
    """An image classifier: the classes with the highest scores."""

    @torch.inference_mode()
    def look(self, crops: Sequence[Pixels]) -> list[dict[str, Any]]:
        """See `Looker.look`."""
        logits = self._model(**self._inputs(crops)).logits.float()
        is_multi_label = self._model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
        scores = logits.sigmoid() if is_multi_label else logits.softmax(-1)
        names = self._model.config.id2label
        return _best(scores, [names[index] for index in range(scores.shape[1])], self._config.top_k)


class ZeroShotClassifier(_Seer):
    """A model of images and texts, such as CLIP and SigLIP: the labels whose texts fit best."""

    def __init__(self, model: Any, processor: Any, config: CropsConfig) -> None:
        super().__init__(model, processor.image_processor, config)
        labels = list(config.labels or ())
        template = config.prompt_template or DEFAULT_TEMPLATE
        self._is_siglip = "siglip" in model.config.model_type
        padding: dict[str, Any] = {"padding": True}
        if self._is_siglip:
            padding = {"padding": "max_length", "max_length": 64, "truncation": True}
        texts = [template.replace("{}", label) for label in labels]
        self._texts = processor.tokenizer(texts, return_tensors="pt", **padding).to(model.device)
        limit = getattr(model.config.text_config, "max_position_embeddings", None)
        if limit is not None and self._texts["input_ids"].shape[1] > limit:
            raise UserError(f"--labels: a label in its template is longer than the {limit} tokens that the model reads")

    @torch.inference_mode()
    def look(self, crops: Sequence[Pixels]) -> list[dict[str, Any]]:
        """See `Looker.look`."""
        logits = self._model(**self._texts, **self._inputs(crops)).logits_per_image.float()
        scores = logits.sigmoid() if self._is_siglip else logits.softmax(-1)
        return _best(scores, list(self._config.labels or ()), self._config.top_k)


def _best(scores: Tensor, names: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    rows = zip(values[:, :top_k].tolist(), indices[:, :top_k].tolist(), strict=True)
    return [
        {
            "label": names[own[0]],
            "label_score": best[0],
            "labels": [names[index] for index in own],
            "label_scores": best,
        }
        for best, own in rows
    ]


class Embedder(_Seer):
    """A vision model: its pooled output, or that of a model of images and texts, or else the mean of its features."""

    @torch.inference_mode()
    def look(self, crops: Sequence[Pixels]) -> list[dict[str, Any]]:
        """See `Looker.look`."""
        inputs = self._inputs(crops)
        has_texts = hasattr(self._model, "get_image_features")
        found = self._model.get_image_features(**inputs) if has_texts else self._model(**inputs)
        vectors = found if isinstance(found, Tensor) else getattr(found, "pooler_output", None)
        if vectors is None:
            vectors = found.last_hidden_state.mean(dim=1)
        halves = vectors.flatten(1).float().cpu().numpy().astype(np.float16)
        return [{"embedding": vector} for vector in halves]


class DepthMeter(_Seer):
    """A model of depth: the median over the crop, in the model's unit."""

    @torch.inference_mode()
    def look(self, crops: Sequence[Pixels]) -> list[dict[str, Any]]:
        """See `Looker.look`."""
        # One by one, because models keep the aspect ratio.
        depths = [self._model(**self._inputs([crop])).predicted_depth for crop in crops]
        return [{"depth": float(depth.float().median())} for depth in depths]
