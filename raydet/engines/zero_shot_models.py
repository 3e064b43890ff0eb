"""What runs OWL-ViT, OWLv2 and Grounding DINO: pictures and labels → detections.

Pictures go through the model's own image processor, so that boxes and scores are those of transformers. The labels
are read once, when the model is loaded. They are given to the model as they are, as transformers' pipeline does it.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, PreTrainedModel

from raydet.augmentation.view import resized
from raydet.common.boxes import clip_xywh, has_area
from raydet.common.errors import UserError
from raydet.config import PredictConfig
from raydet.engines.engine import no_fp16_on_cpu
from raydet.models.detector import Detections, quiet
from raydet.models.families import resize_rule_of
from raydet.models.geometry import Image, ResizeRule, SizeHW
from raydet.tables import storage
from raydet.tables.schema import Category

MAX_DETECTIONS = 300
"""The best ones of an image that are kept. OWLv2 proposes 3,600 boxes for each, nearly all of them noise."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ZeroShotInputs:
    """Pictures ready for the model, in host memory.

    Attributes:
        sizes_hw: Height and width in pixels of each picture as it was given.
        parts: What the model sees at once: places of pictures, and for them `pixel_values` float32 [B, 3, H, W] and,
            for models that use it, `pixel_mask` int64 [B, H, W].
    """

    sizes_hw: list[SizeHW]
    parts: list[tuple[list[int], dict[str, Tensor]]]


@dataclass(frozen=True)
class Answer:
    """What a model says of a batch, one label for each of its Q proposals.

    Attributes:
        scores: float32 [B, Q], 0 to 1.
        categories: int64 [B, Q], indices of the labels.
        boxes_cxcywh: float32 [B, Q, 4], centre form in parts of what `_box_extent_hw` says.
    """

    scores: Tensor
    categories: Tensor
    boxes_cxcywh: Tensor


class ZeroShotEngine(ABC):
    """A zero-shot detector with its labels.

    Attributes:
        categories: The labels, each with its place as id.
        max_detections: The most detections that an image can have.
        resize_rule: What becomes of a picture's size, not counting its padding.
    """

    categories: tuple[Category, ...]
    max_detections: int
    resize_rule: ResizeRule

    def __init__(
        self, name: str, labels: Sequence[str], *, config: PredictConfig, device: str, num_threads: int
    ) -> None:
        """Loads the model and reads the labels.

        Args:
            name: A model folder or URI, or a name on the Hub.
            labels: At least one, stripped, all different.
            config: For precision, compile and channels_last.
            device: cpu, cuda or cuda:N.
            num_threads: Of torch, on the CPU.

        Raises:
            UserError: The model cannot be read, or it cannot read the labels, or precision and device do not fit.
        """
        self._device = torch.device(device)
        if config.precision == "fp16" and self._device.type == "cpu":
            raise no_fp16_on_cpu(config.engine)
        torch.set_num_threads(num_threads)
        self._name = name
        self._dtype = _DTYPES[config.precision]
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self._model: Any
        self._model, self._processor = _load(name)
        self._model.to(device=self._device, memory_format=self._memory_format).eval()
        self.categories = tuple(Category(id=index, name=label) for index, label in enumerate(labels))
        self.resize_rule = self._read_resize_rule()
        with torch.inference_mode():
            self._read_labels(labels)
        self.max_detections = min(MAX_DETECTIONS, self._num_proposals())
        if config.compile:
            self._compile()

    def input_size_hw(self, size_hw: SizeHW) -> SizeHW:
        """Height and width in pixels at which the model sees a picture of this size, without its padding."""
        return self.resize_rule.target_size_hw(size_hw)

    @abstractmethod
    def prepare(self, images: Sequence[Image]) -> ZeroShotInputs:
        """Resizes, normalises and pads pictures as the model's processor does, on the CPU.

        Args:
            images: uint8 [H, W, 3], RGB, of any sizes.
        """

    def _read_resize_rule(self) -> ResizeRule:
        return resize_rule_of(self._processor.image_processor, where=self._name)

    @abstractmethod
    def _read_labels(self, labels: Sequence[str]) -> None:
        """Keeps what the model needs to know of the labels."""

    @abstractmethod
    def _num_proposals(self) -> int:
        """Boxes that the model proposes for each picture."""

    @abstractmethod
    def _compile(self) -> None:
        """Has torch compile what takes the time."""

    @abstractmethod
    def _answer(self, inputs: Mapping[str, Tensor]) -> Answer:
        """Runs the model on a part of a `ZeroShotInputs`, on the device and under autocast."""

    @abstractmethod
    def _box_extent_hw(self, size_hw: SizeHW) -> SizeHW:
        """What boxes are parts of, for a picture of this size: height and width in pixels."""

    @torch.inference_mode()
    def predict(self, prepared: ZeroShotInputs) -> list[Detections]:
        """Finds the labels in pictures.

        Args:
            prepared: By `prepare`.

        Returns:
            One `Detections` for each picture, in order: the `max_detections` best, with the boxes cut to the picture
            and without those of which nothing is left. Otherwise what the model's processor makes of it at threshold
            0: one label, the best one, for each box that the model proposes.
        """
        results: dict[int, Detections] = {}
        for numbers, inputs in prepared.parts:
            on_device = {name: value.to(self._device, non_blocking=True) for name, value in inputs.items()}
            on_device["pixel_values"] = on_device["pixel_values"].contiguous(memory_format=self._memory_format)
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                answer = self._answer(on_device)
            arrays = (answer.scores.cpu().numpy(), answer.categories.cpu().numpy(), answer.boxes_cxcywh.cpu().numpy())
            for number, scores, categories, boxes_cxcywh in zip(numbers, *arrays, strict=True):
                results[number] = self._detections(scores, categories, boxes_cxcywh, prepared.sizes_hw[number])
        return [results[number] for number in range(len(prepared.sizes_hw))]

    def _detections(
        self,
        scores: npt.NDArray[np.float32],
        categories: npt.NDArray[np.int64],
        boxes_cxcywh: npt.NDArray[np.float32],
        size_hw: SizeHW,
    ) -> Detections:
        height, width = self._box_extent_hw(size_hw)
        boxes = boxes_cxcywh.astype(np.float64) * [width, height, width, height]
        boxes_xywh = clip_xywh(np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=1), size_hw)
        kept = np.flatnonzero(has_area(boxes_xywh) & (scores > 0))
        best = kept[np.argsort(-scores[kept], kind="stable")][: self.max_detections]
        return Detections(boxes_xywh[best], scores[best].astype(np.float64), categories[best])

    def _as_part(
        self, images: Sequence[Image], numbers: list[int], **options: Any
    ) -> tuple[list[int], dict[str, Tensor]]:
        """Runs the image processor on pictures."""
        # Without the format it takes a picture of three rows for one of planes.
        inputs = self._processor.image_processor(
            [images[number] for number in numbers], return_tensors="pt", input_data_format="channels_last", **options
        )
        tensors = {name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}
        if self._device.type == "cuda":
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        return numbers, tensors


class OwlEngine(ZeroShotEngine):
    """OWL-ViT and OWLv2.

    The labels go through the text model once; what is left for each picture is to compare it with their embeddings.
    OWLv2 pads pictures to a square at the bottom and on the right, and its boxes are parts of that square.
    """

    def prepare(self, images: Sequence[Image]) -> ZeroShotInputs:
        """Resizes, normalises and pads pictures as the model's processor does, on the CPU.

        Args:
            images: uint8 [H, W, 3], RGB, of any sizes.
        """
        sizes_hw = [(image.shape[0], image.shape[1]) for image in images]
        return ZeroShotInputs(sizes_hw, [self._as_part(images, list(range(len(images))))])

    def _read_resize_rule(self) -> ResizeRule:
        size, side = self._processor.image_processor.size, self._model.config.vision_config.image_size
        if (size.height, size.width) != (side, side):
            raise UserError(
                f"the processor of {self._name} makes pictures of {size.height} × {size.width} pixels, its model wants "
                f"{side} × {side}; correct size in its preprocessor_config.json"
            )
        if self._pads_to_square:
            # The processor's own rule is that of the square with its padding.
            return ResizeRule(mode="keep_aspect", limit_hw=(side, side))
        return super()._read_resize_rule()

    @property
    def _pads_to_square(self) -> bool:
        return bool(self._model.config.model_type == "owlv2" and self._processor.image_processor.do_pad)

    def _read_labels(self, labels: Sequence[str]) -> None:
        tokenizer, limit = self._processor.tokenizer, self._model.config.text_config.max_position_embeddings
        for label, token_ids in zip(labels, tokenizer(list(labels))["input_ids"], strict=True):
            if len(token_ids) > limit:
                raise UserError(
                    f"the label {label!r} is too long: {len(token_ids)} tokens, {self._name} reads {limit}; shorten it"
                )
        texts = tokenizer(list(labels), padding="max_length", max_length=limit, return_tensors="pt").to(self._device)
        # As in the model's own forward, which normalises once more in the class head.
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
        # In half precision boxes would be off by whole pixels, and the heads are small.
        with torch.autocast(self._device.type, enabled=False):
            logits, _ = self._model.class_predictor(features, label_embeddings)
            boxes_cxcywh = self._model.box_predictor(features, feature_map)
        best = logits.max(dim=-1)
        return Answer(best.values.sigmoid(), best.indices, boxes_cxcywh)

    def _box_extent_hw(self, size_hw: SizeHW) -> SizeHW:
        return (max(size_hw), max(size_hw)) if self._pads_to_square else size_hw


class GroundingDinoEngine(ZeroShotEngine):
    """Grounding DINO and MM Grounding DINO.

    All labels stand in one text, "cat. remote control.", and the model scores each proposal against each token. A
    proposal's score is that of its best token, as in the model's processor. Its label is the one whose tokens,
    the closing full stop among them, hold the best one; the processor would instead spell out the tokens above a
    threshold, which may be parts of several labels or of none.

    The text runs through the text model with each batch, since picture and text are mixed from the first layer on;
    that part is small beside the backbone.
    """

    def prepare(self, images: Sequence[Image]) -> ZeroShotInputs:
        """Resizes, normalises and pads pictures as the model's processor does, on the CPU.

        Those of one size are run together, so that no picture's result depends on the others.

        Args:
            images: uint8 [H, W, 3], RGB, of any sizes.
        """
        sizes_hw = [(image.shape[0], image.shape[1]) for image in images]
        # By the rule, since the processor fails on pictures so narrow that a side would round to zero.
        seen = [resized(image, self.resize_rule) for image in images]
        groups: dict[SizeHW | None, list[int]] = {}
        for number, image in enumerate(seen):
            together = self.resize_rule.pad_to_hw is not None
            groups.setdefault(None if together else (image.shape[0], image.shape[1]), []).append(number)
        return ZeroShotInputs(sizes_hw, [self._as_part(seen, numbers, do_resize=False) for numbers in groups.values()])

    def _read_labels(self, labels: Sequence[str]) -> None:
        text, spans = _joined(labels)
        tokenizer, limit = self._processor.tokenizer, self._model.config.max_text_len
        tokens = tokenizer(text, return_tensors="pt", return_token_type_ids=True, return_offsets_mapping=True)
        offsets = tokens.pop("offset_mapping")[0].tolist()
        if len(offsets) > limit:
            raise UserError(
                f"the labels are too many: {len(offsets)} tokens together, {self._name} reads {limit}; give fewer, or "
                "score in several runs"
            )
        # Special tokens have an empty span and belong to no label: to a column of its own behind the labels.
        label_of_token = torch.full((len(offsets),), len(labels))
        for index, (start, end) in enumerate(spans):
            inside = torch.tensor([start <= first < last <= end + 1 for first, last in offsets])
            words = torch.tensor([start <= first < last <= end for first, last in offsets])
            known = tokens["input_ids"][0][words] != tokenizer.unk_token_id
            if not known.any():
                raise UserError(f"the label {labels[index]!r} has no word that {self._name} can read; use others")
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
    """The labels as Grounding DINO was taught to read them: in lower case, each with a full stop.

    Returns:
        The text, and where in it each label begins and where its full stop is.
    """
    text, spans = "", []
    for label in labels:
        # These two part labels from each other, so that none may stand within one ("st. bernard").
        words = label.lower().replace(".", " ").replace("?", " ").split()
        start = len(text)
        text += " ".join(words)
        spans.append((start, len(text)))
        text += ". "
    return text.strip(), spans


def _load(name: str) -> tuple[PreTrainedModel, Any]:
    if not storage.exists(name):
        return _load_local(name, where=name)
    if storage.is_local(name):
        return _load_local(storage.resolve(name)[1], where=name)
    with tempfile.TemporaryDirectory() as folder:
        storage.fetch_folder(name, folder)
        return _load_local(folder, where=name)


def _load_local(source: str, *, where: str) -> tuple[PreTrainedModel, Any]:
    """A model and its processor, from a folder on this machine or from the Hub."""
    try:
        with quiet():
            model, report = AutoModelForZeroShotObjectDetection.from_pretrained(
                source,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are reported below, in one line
                output_loading_info=True,
            )
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot read the zero-shot model {where}: {lines[0]}") from error
    unfit = {str(key if isinstance(key, str) else key[0]) for key in report["mismatched_keys"]}
    missing = sorted((unfit | set(report["missing_keys"])) & {name for name, _ in model.named_parameters()})
    if missing:
        raise UserError(
            f"the zero-shot model {where} is not whole: {len(missing)} weights are missing or do not fit its "
            f"config.json, such as {missing[0]}"
        )
    return model, processor
