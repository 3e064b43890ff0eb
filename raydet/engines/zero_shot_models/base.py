"""The part that all zero-shot engines share.

Images go through the model's own image processor, so that boxes and scores equal those of transformers. Labels are
read once, when the model is loaded, and passed to the model verbatim, as in transformers' pipeline.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raydet.common.boxes import clip_xywh, has_area
from raydet.config import PredictConfig
from raydet.engines.engine import no_fp16_on_cpu
from raydet.engines.zero_shot_models.loading import load_model
from raydet.models.detector import AUTOCAST_DTYPES, Detections
from raydet.models.geometry import Image, ResizeRule, SizeHW
from raydet.models.processors import resize_rule_of
from raydet.tables.schema import Category

MAX_DETECTIONS = 300
"""Detections kept per image, the best-scoring ones. OWLv2 proposes 3,600 boxes per image, nearly all of them noise."""


@dataclass(frozen=True)
class Prepared:
    """Images ready for the model, in host memory.

    Attributes:
        sizes_hw: Height and width in pixels of each image as given.
        parts: Batches for the model: the positions of their images, and `pixel_values` float32 [B, 3, H, W] and, for
            models that use it, `pixel_mask` int64 [B, H, W].
    """

    sizes_hw: list[SizeHW]
    parts: list[tuple[list[int], dict[str, Tensor]]]


@dataclass(frozen=True)
class Answer:
    """Output of a model for a batch: one label for each of Q proposals per image.

    Attributes:
        scores: float32 [B, Q], 0 to 1.
        categories: int64 [B, Q], indices of the labels.
        boxes_cxcywh: float32 [B, Q, 4], centre form relative to the extent that `_box_extent_hw` returns.
    """

    scores: Tensor
    categories: Tensor
    boxes_cxcywh: Tensor


class ZeroShotEngine(ABC):
    """A zero-shot detector with its labels.

    Attributes:
        categories: The labels; the id of a label is its position.
        max_detections: Maximum number of detections per image.
        resize_rule: Resize rule of the image processor, without its padding.
    """

    categories: tuple[Category, ...]
    max_detections: int
    resize_rule: ResizeRule

    def __init__(
        self, name: str, labels: Sequence[str], *, config: PredictConfig, device: str, num_threads: int
    ) -> None:
        """Load a model by its folder, URI or name on the Hub, and read the labels, stripped and all different.

        Raises:
            UserError: The model or a label cannot be read, or the device does not support the precision.
        """
        self._device = torch.device(device)
        if config.precision == "fp16" and self._device.type == "cpu":
            raise no_fp16_on_cpu(config.engine)
        torch.set_num_threads(num_threads)
        self._name = name
        self._dtype = AUTOCAST_DTYPES[config.precision]
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self._model: Any
        self._model, self._processor = load_model(name)
        self._model.to(device=self._device, memory_format=self._memory_format).eval()
        self.categories = tuple(Category(id=index, name=label) for index, label in enumerate(labels))
        self.resize_rule = self._read_resize_rule()
        with torch.inference_mode():
            self._read_labels(labels)
        self.max_detections = min(MAX_DETECTIONS, self._num_proposals())
        if config.compile:
            self._compile()

    def input_size_hw(self, size_hw: SizeHW) -> SizeHW:
        """Return height and width in pixels of the model's input for an image of this size, without padding."""
        return self.resize_rule.target_size_hw(size_hw)

    @abstractmethod
    def prepare(self, images: Sequence[Image]) -> Prepared:
        """Resize, normalise and pad images, RGB uint8 [H, W, 3], on the CPU, as the model's processor does."""

    def _read_resize_rule(self) -> ResizeRule:
        return resize_rule_of(self._processor.image_processor, where=self._name)

    @abstractmethod
    def _read_labels(self, labels: Sequence[str]) -> None:
        """Prepare the labels for the model."""

    @abstractmethod
    def _num_proposals(self) -> int:
        """Return the number of boxes that the model proposes per image."""

    @abstractmethod
    def _compile(self) -> None:
        """Compile the expensive part of the model."""

    @abstractmethod
    def _answer(self, inputs: Mapping[str, Tensor]) -> Answer:
        """Run the model on a part of a `Prepared`, on the device and under autocast."""

    @abstractmethod
    def _box_extent_hw(self, size_hw: SizeHW) -> SizeHW:
        """Return height and width in pixels of the area that boxes are relative to, for an image of this size."""

    def prepare_planes(self, planes: Sequence[Image], original_sizes_hw: Sequence[SizeHW]) -> Prepared:
        """Raise an error: the model's own processor resizes."""
        raise AssertionError("zero-shot models take images at full size")

    def start(self, prepared: Prepared) -> Callable[[], list[Detections]]:
        """Run the model; see `predict`."""
        found = self.predict(prepared)
        return lambda: found

    @torch.inference_mode()
    def predict(self, prepared: Prepared) -> list[Detections]:
        """Find the labels in images.

        Returns:
            One `Detections` per image, in order: for each proposed box its best label, as the model's processor
            returns at threshold 0. Boxes are clipped to the image and dropped if nothing is left; of the rest, the
            best `max_detections` are kept.
        """
        results: dict[int, Detections] = {}
        for numbers, inputs in prepared.parts:
            on_device = {name: value.to(self._device, non_blocking=True) for name, value in inputs.items()}
            on_device["pixel_values"] = on_device["pixel_values"].contiguous(memory_format=self._memory_format)
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
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
        """Run the image processor on some of the images."""
        # Without a format it mistakes an image of three rows for channels-first.
        inputs = self._processor.image_processor(
            [images[number] for number in numbers], return_tensors="pt", input_data_format="channels_last", **options
        )
        tensors = {name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}
        if self._device.type == "cuda":
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        return numbers, tensors
