"""Zero-shot engine for OWL-ViT and OWLv2."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raydet.common.errors import UserError
from raydet.engines.zero_shot_models.base import Answer, Prepared, ZeroShotEngine
from raydet.models.families import ZERO_SHOT_FAMILIES
from raydet.models.geometry import Image, ResizeRule, SizeHW


class OwlEngine(ZeroShotEngine):
    """OWL-ViT and OWLv2.

    The text model embeds the labels once, and each image is compared with their embeddings. OWLv2 pads images to a
    square at the bottom and on the right, and its boxes are relative to that square.
    """

    def prepare(self, images: Sequence[Image]) -> Prepared:
        """Make one batch of all images, which the processor resizes to one size; see `ZeroShotEngine.prepare`."""
        sizes_hw = [(image.shape[0], image.shape[1]) for image in images]
        return Prepared(sizes_hw, [self._as_part(images, list(range(len(images))))])

    def _read_resize_rule(self) -> ResizeRule:
        size, side = self._processor.image_processor.size, self._model.config.vision_config.image_size
        if (size.height, size.width) != (side, side):
            raise UserError(
                f"the image processor of {self._name} makes images of {size.height} × {size.width} pixels, but its "
                f"model needs {side} × {side}; correct size in its preprocessor_config.json"
            )
        if self._pads_to_square:
            # The processor states the size of the padded square.
            return ResizeRule(mode="keep_aspect", limit_hw=(side, side))
        return super()._read_resize_rule()

    @property
    def _pads_to_square(self) -> bool:
        family = ZERO_SHOT_FAMILIES[self._model.config.model_type]
        return bool(family.pads_to_square and self._processor.image_processor.do_pad)

    def _read_labels(self, labels: Sequence[str]) -> None:
        tokenizer, limit = self._processor.tokenizer, self._model.config.text_config.max_position_embeddings
        for label, token_ids in zip(labels, tokenizer(list(labels))["input_ids"], strict=True):
            if len(token_ids) > limit:
                raise UserError(
                    f"the label {label!r} is too long: it has {len(token_ids)} tokens and {self._name} reads at most "
                    f"{limit}; shorten it"
                )
        texts = tokenizer(list(labels), padding="max_length", max_length=limit, return_tensors="pt").to(self._device)
        # As in the model's own forward pass; the class head normalises once more.
        embeddings = self._model.base_model.get_text_features(**texts).pooler_output
        self._label_embeddings: Tensor = embeddings / torch.linalg.norm(embeddings, dim=-1, keepdim=True)

    def _num_proposals(self) -> int:
        vision = self._model.config.vision_config
        return int(vision.image_size // vision.patch_size) ** 2

    def _compile(self) -> None:
        self._model.base_model.vision_model.compile()

    def _answer(self, inputs: Mapping[str, Tensor]) -> Answer:
        feature_map, _ = self._model.image_embedder(inputs["pixel_values"])
        features = feature_map.flatten(1, 2).float()
        label_embeddings = self._label_embeddings.expand(len(features), -1, -1)
        # In half precision boxes would be off by more than a pixel. The heads are small.
        with torch.autocast(self._device.type, enabled=False):
            logits, _ = self._model.class_predictor(features, label_embeddings)
            boxes_cxcywh = self._model.box_predictor(features, feature_map)
        best = logits.max(dim=-1)
        return Answer(best.values.sigmoid(), best.indices, boxes_cxcywh)

    def _box_extent_hw(self, size_hw: SizeHW) -> SizeHW:
        return (max(size_hw), max(size_hw)) if self._pads_to_square else size_hw
