"""Zero-shot engine for OWL-ViT and OWLv2."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from raydet.common.errors import UserError
from raydet.engines.zero_shot_models.base import Answer, Prepared, ZeroShotEngine
from raydet.engines.zero_shot_models.prompts import Box, Prompt, read_box, read_example
from raydet.images.decode import DecodeError, decode
from raydet.models.families import ZERO_SHOT_FAMILIES
from raydet.models.geometry import Image, ResizeRule, SizeHW


class OwlEngine(ZeroShotEngine):
    """OWL-ViT and OWLv2.

    Texts and example pictures are embedded once; those of a class are averaged, and each image is compared with them.
    OWLv2 pads images to a square at the bottom and on the right, and its boxes are relative to that square.
    """

    def __init__(self, name: str, prompts: Sequence[Prompt], **options: Any) -> None:
        """Load a model as `ZeroShotEngine` does, with texts and pictures of what to look for."""
        self._prompts = prompts
        self._max_pixels = options["config"].max_pixels
        super().__init__(name, [prompt.label for prompt in prompts], **options)

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
        texts = [text for prompt in self._prompts for text in prompt.texts]
        of_texts = iter(self._embed_texts(texts) if texts else ())
        rows = []
        for prompt in self._prompts:
            own = [next(of_texts) for _ in prompt.texts] + [self._embed_example(uri) for uri in prompt.examples]
            rows.append(own[0] if len(own) == 1 else torch.stack(own).mean(dim=0))
        self._label_embeddings = torch.stack(rows)

    def _embed_texts(self, labels: Sequence[str]) -> Tensor:
        """Return a vector of length 1 for each text, [N, D]."""
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
        normalised: Tensor = embeddings / torch.linalg.norm(embeddings, dim=-1, keepdim=True)
        return normalised

    def _embed_example(self, uri: str) -> Tensor:
        """Return the vector of the object in a picture, of length 1, [D].

        Without a box the model chooses the object, as in its `image_guided_detection`.
        """
        try:
            pixels = decode(read_example(uri), max_pixels=self._max_pixels)
        except DecodeError as error:
            raise UserError(f"cannot read the example {uri}: {error}") from None
        _, inputs = self._as_part([pixels], [0])
        feature_map, _ = self._model.image_embedder(inputs["pixel_values"].to(self._device))
        features = feature_map.flatten(1, 2)
        box = read_box(uri)
        if box is None:
            embeddings, _, _ = self._model.embed_image_query(features, feature_map)
            embedding = None if embeddings is None else embeddings[0, 0]
        else:
            nearest = self._nearest_box(features, feature_map, box, pixels)
            embedding = self._model.class_predictor(features)[1][0, nearest]
        if embedding is None:
            raise UserError(f"the model finds no object in the example {uri}; cut it out, or add its box")
        vector: Tensor = embedding / torch.linalg.norm(embedding)
        return vector

    def _nearest_box(self, features: Tensor, feature_map: Tensor, box: Box, pixels: Image) -> int:
        """Return the proposal that overlaps a box most, given as fractions of the picture."""
        height, width = pixels.shape[:2]
        extent_hw = self._box_extent_hw((height, width))
        scale = torch.tensor([width / extent_hw[1], height / extent_hw[0]] * 2, device=self._device)
        wanted = torch.tensor([box], device=self._device) * scale
        found = self._model.box_predictor(features, feature_map)[0]
        overlaps = box_iou(*(box_convert(boxes, "cxcywh", "xyxy") for boxes in (wanted, found)))
        return int(overlaps[0].argmax())

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
