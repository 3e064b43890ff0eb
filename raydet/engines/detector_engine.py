"""The part that all engines of detectors share: images → inputs, outputs → detections."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raydet.augmentation.view import resized
from raydet.models.collate import Batch, Example, collate
from raydet.models.detector import Detections, Detector
from raydet.models.geometry import Image, SizeHW


@dataclass(frozen=True)
class EngineBatch:
    """Images that the model sees at once.

    Attributes:
        places: Where they stood among those given to `prepare`.
        batch: Their pixels, on the CPU.
    """

    places: list[int]
    batch: Batch


class DetectorEngine(ABC):
    """An `Engine` around a `Detector`; a subclass says how the model runs.

    Attributes:
        categories: Its classes in the order of their indices.
        max_detections: The most detections that it finds in an image.
        resize_rule: How it resizes.
    """

    def __init__(
        self, detector: Detector, *, device: torch.device, pad_batches: bool, num_threads: int | None = None
    ) -> None:
        """Keeps the detector; loads nothing.

        Args:
            detector: Feeds the model and reads its answer.
            device: Where pixels are normalised and the model's inputs are to be.
            pad_batches: See `ResizeRule.padded_size_hw`; without it each size runs by itself.
            num_threads: Of torch, in the whole process; None leaves them as they are.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.categories = detector.categories
        self.max_detections = detector.max_detections
        self.resize_rule = detector.resize_rule
        self._detector = detector
        self._device = device
        self._pad_batches = pad_batches

    def input_size_hw(self, size_hw: SizeHW) -> SizeHW:
        """Height and width in pixels at which the model sees an image of this size, without padding."""
        return self.resize_rule.target_size_hw(size_hw)

    def prepare(self, images: Sequence[Image]) -> list[EngineBatch]:
        """Resizes as the model's image processor does, and puts images into batches of one size each.

        Args:
            images: RGB, uint8 [H, W, 3] each, of any sizes.
        """
        rule = self.resize_rule
        examples = []
        for place, image in enumerate(images):
            size_hw = (image.shape[0], image.shape[1])
            examples.append(_example(place, resized(image, rule), size_hw))
        return self.prepare_resized(examples)

    def prepare_resized(self, examples: Sequence[Example]) -> list[EngineBatch]:
        """Puts images into batches of one size each.

        Args:
            examples: Already resized by `resize_rule`.
        """
        places: dict[SizeHW, list[int]] = {}
        for place, example in enumerate(examples):
            target_hw = (example.image.shape[0], example.image.shape[1])
            places.setdefault(self._batch_size_hw(target_hw), []).append(place)
        parts = []
        for batch_hw, numbers in places.items():
            batch = collate([examples[number] for number in numbers], pad_to_hw=batch_hw)
            if self._device.type == "cuda":
                batch.pixels = batch.pixels.pin_memory()
            parts.append(EngineBatch(numbers, batch))
        return parts

    def _batch_size_hw(self, target_hw: SizeHW) -> SizeHW:
        """Height and width of the batch that an image of this size is put into, padding included."""
        # A model that is not told where the padding is would take it for a part of the picture.
        pads_together = self._pad_batches and self._detector.family.uses_pixel_mask
        if self._detector.pads_to_largest and not pads_together:
            return target_hw
        return self.resize_rule.padded_size_hw(target_hw)

    def predict(self, prepared: Sequence[EngineBatch]) -> list[Detections]:
        """Finds objects.

        Args:
            prepared: From `prepare`.

        Returns:
            One `Detections` for each image, in order, in pixels of the image as it was given to `prepare`.
        """
        found: dict[int, Detections] = {}
        with torch.inference_mode():
            for part in prepared:
                # Pixels travel as bytes, in one piece; all else is made where the model is.
                inputs = self._detector.model_inputs(part.batch.to(self._device))
                logits, boxes_cxcywh = self._run(inputs)
                answers = self._detector.detections(logits, boxes_cxcywh, part.batch.original_sizes_hw)
                found.update(zip(part.places, answers, strict=True))
        return [found[place] for place in range(len(found))]

    @abstractmethod
    def _run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Runs the model.

        Args:
            inputs: From `Detector.model_inputs`.

        Returns:
            Logits [B, Q, C] and boxes [B, Q, 4], centre form in parts of the image, on any device.
        """


def _example(place: int, image: Image, original_size_hw: SizeHW) -> Example:
    return Example(place, image, original_size_hw, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
