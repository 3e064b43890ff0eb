"""The part that all detector engines share: images → inputs, outputs → detections."""

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
    """Images of one forward pass.

    Attributes:
        places: Index of each image among those passed to `prepare`.
        batch: The images, on the CPU.
    """

    places: list[int]
    batch: Batch


class DetectorEngine(ABC):
    """An `Engine` around a `Detector`; subclasses run the model.

    Attributes:
        categories: The classes in the order of their indices.
        max_detections: Maximum number of detections per image.
        resize_rule: Resize rule of the image processor.
    """

    def __init__(
        self, detector: Detector, *, device: torch.device, pad_batches: bool, num_threads: int | None = None
    ) -> None:
        """Set up the engine; load nothing.

        Args:
            detector: Detector that makes the model's inputs and converts its outputs.
            device: Device of the model's inputs, on which pixels are normalised.
            pad_batches: Pad images as in `ResizeRule.padded_size_hw`; if False, each size is a separate batch.
            num_threads: torch threads of the process; None leaves the number unchanged.
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
        """Return height and width in pixels of the model's input for an image of this size, without padding."""
        return self.resize_rule.target_size_hw(size_hw)

    def prepare(self, images: Sequence[Image]) -> list[EngineBatch]:
        """Resize images as the model's image processor does, and batch images of the same size.

        Args:
            images: RGB, uint8 [H, W, 3] each, of any size.
        """
        rule = self.resize_rule
        examples = []
        for place, image in enumerate(images):
            size_hw = (image.shape[0], image.shape[1])
            examples.append(_example(place, resized(image, rule), size_hw))
        return self.prepare_resized(examples)

    def prepare_resized(self, examples: Sequence[Example]) -> list[EngineBatch]:
        """Batch images of the same size.

        Args:
            examples: Images that `resize_rule` has already resized.
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
        """Return height and width in pixels of the batch for an image of this size, padding included."""
        # A model without a pixel mask would treat the padding as part of the image.
        pads_together = self._pad_batches and self._detector.family.uses_pixel_mask
        if self._detector.pads_to_largest and not pads_together:
            return target_hw
        return self.resize_rule.padded_size_hw(target_hw)

    def predict(self, prepared: Sequence[EngineBatch]) -> list[Detections]:
        """Detect objects.

        Args:
            prepared: Result of `prepare` or `prepare_resized`.

        Returns:
            One `Detections` per image, in order, in pixels of the image before the resize.
        """
        found: dict[int, Detections] = {}
        with torch.inference_mode():
            for part in prepared:
                # Only the uint8 pixels are copied to the device; all other inputs are made there.
                inputs = self._detector.model_inputs(part.batch.to(self._device))
                logits, boxes_cxcywh = self._run(inputs)
                answers = self._detector.detections(logits, boxes_cxcywh, part.batch.original_sizes_hw)
                found.update(zip(part.places, answers, strict=True))
        return [found[place] for place in range(len(found))]

    @abstractmethod
    def _run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            inputs: Result of `Detector.model_inputs`.

        Returns:
            Logits [B, Q, C] and boxes [B, Q, 4], centre form relative to the image, on any device.
        """


def _example(place: int, image: Image, original_size_hw: SizeHW) -> Example:
    return Example(place, image, original_size_hw, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
