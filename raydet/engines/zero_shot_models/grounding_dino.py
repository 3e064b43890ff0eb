"""Zero-shot engine for Grounding DINO and MM Grounding DINO."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raydet.common.errors import UserError
from raydet.engines.zero_shot_models.base import Answer, Prepared, ZeroShotEngine
from raydet.models.geometry import Image, SizeHW, resize


class GroundingDinoEngine(ZeroShotEngine):
    """Grounding DINO and MM Grounding DINO.

    All labels form one text, "cat. remote control.", and the model scores each proposal against each token. As in the
    model's processor, a proposal's score is that of its best token. Its label is the one to which that token belongs,
    the closing full stop included. The processor would instead spell out all tokens above a threshold, which may
    belong to several labels or to none.

    The text model runs with each batch, because the model mixes image and text from the first layer onwards; its cost
    is small compared with the backbone's.
    """

    def prepare(self, images: Sequence[Image]) -> Prepared:
        """Batch only images of the same size, so that no result depends on the others; see `ZeroShotEngine.prepare`."""
        sizes_hw = [(image.shape[0], image.shape[1]) for image in images]
        # The processor itself fails on images so narrow that a side rounds to zero.
        resized = [
            resize(image, self.resize_rule.target_size_hw(size_hw), self.resize_rule.resample)
            for image, size_hw in zip(images, sizes_hw, strict=True)
        ]
        groups: dict[SizeHW | None, list[int]] = {}
        for number, image in enumerate(resized):
            together = self.resize_rule.pad_to_hw is not None
            groups.setdefault(None if together else (image.shape[0], image.shape[1]), []).append(number)
        return Prepared(sizes_hw, [self._as_part(resized, numbers, do_resize=False) for numbers in groups.values()])

    def _read_labels(self, labels: Sequence[str]) -> None:
        text, spans = _joined(labels)
        tokenizer, limit = self._processor.tokenizer, self._model.config.max_text_len
        tokens = tokenizer(text, return_tensors="pt", return_token_type_ids=True, return_offsets_mapping=True)
        offsets = tokens.pop("offset_mapping")[0].tolist()
        if len(offsets) > limit:
            raise UserError(
                f"too many labels: {len(offsets)} tokens in total, but {self._name} reads at most {limit}; "
                "pass fewer, or score in several runs"
            )
        # Special tokens have an empty span and belong to no label; they get a column behind the labels.
        label_of_token = torch.full((len(offsets),), len(labels))
        for index, (start, end) in enumerate(spans):
            inside = torch.tensor([start <= first < last <= end + 1 for first, last in offsets])
            words = torch.tensor([start <= first < last <= end for first, last in offsets])
            known = tokens["input_ids"][0][words] != tokenizer.unk_token_id
            if not known.any():
                raise UserError(f"the label {labels[index]!r} has no word that {self._name} knows; reword it")
            label_of_token[inside] = index
        self._label_of_token = label_of_token.to(self._device)
        self._text: dict[str, Tensor] = {name: value.to(self._device) for name, value in tokens.items()}

    def _num_proposals(self) -> int:
        return int(self._model.config.num_queries)

    def _compile(self) -> None:
        self._model.compile()

    def _answer(self, inputs: Mapping[str, Tensor]) -> Answer:
        num_images = len(inputs["pixel_values"])
        text = {name: value.expand(num_images, -1) for name, value in self._text.items()}
        outputs = self._model(**inputs, **text)
        logits = outputs.logits[..., : len(self._label_of_token)].float()
        columns = torch.full((*logits.shape[:2], len(self.categories) + 1), -torch.inf, device=logits.device)
        by_label = columns.scatter_reduce(-1, self._label_of_token.expand_as(logits), logits, "amax")
        categories = by_label[..., :-1].argmax(dim=-1)
        return Answer(logits.amax(dim=-1).sigmoid(), categories, outputs.pred_boxes.float())

    def _box_extent_hw(self, size_hw: SizeHW) -> SizeHW:
        return size_hw


def _joined(labels: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Join labels into the text that Grounding DINO was trained on: lower case, each followed by a full stop.

    Returns:
        The text, and for each label the offsets of its first character and of its full stop.
    """
    text, spans = "", []
    for label in labels:
        # Both characters separate labels and must not occur within one ("st. bernard").
        words = label.lower().replace(".", " ").replace("?", " ").split()
        start = len(text)
        text += " ".join(words)
        spans.append((start, len(text)))
        text += ". "
    return text.strip(), spans
