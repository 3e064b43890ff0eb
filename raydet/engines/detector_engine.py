"""The part that all detector engines share: images → inputs, outputs → detections."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydet.engines.best import best_detections
from raydet.models.collate import Batch, Example
from raydet.models.detector import Detections, Detector
from raydet.models.geometry import Image, SizeHW, fill_padded, resized_planes


@dataclass(frozen=True)
class EngineBatch:
    """Images of one forward pass.

    Attributes:
        places: Index of each image among those passed to `prepare`.
        batch: The images, on the model's device.
        is_there: Event after the copy to a GPU; None on the CPU.
    """

    places: list[int]
    batch: Batch
    is_there: torch.cuda.Event | None = None


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
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def input_size_hw(self, size_hw: SizeHW) -> SizeHW:
        """Return height and width in pixels of the model's input for an image of this size, without padding."""
        return self.resize_rule.target_size_hw(size_hw)

    def prepare(self, images: Sequence[Image]) -> list[EngineBatch]:
        """Resize images as the model's image processor does, and batch images of the same size.

        Args:
            images: RGB, uint8 [H, W, 3] each, of any size.
        """
        rule = self.resize_rule
        sizes_hw = [(image.shape[0], image.shape[1]) for image in images]
        planes = [
            resized_planes(image, rule.target_size_hw(size_hw), rule.resample)
            for image, size_hw in zip(images, sizes_hw, strict=True)
        ]
        return self.prepare_planes(planes, sizes_hw)

    def prepare_resized(self, examples: Sequence[Example]) -> list[EngineBatch]:
        """Batch examples of a training table, which `resize_rule` has already resized."""
        planes = [example.image.transpose(2, 0, 1) for example in examples]
        return self.prepare_planes(planes, [example.original_size_hw for example in examples])

    def prepare_planes(self, planes: Sequence[Image], original_sizes_hw: Sequence[SizeHW]) -> list[EngineBatch]:
        """Batch images of the same size, and start their copy to the device.

        Args:
            planes: RGB, uint8 [3, H, W] each, resized by `resize_rule`.
            original_sizes_hw: Height and width in pixels of each image before the resize.
        """
        places: dict[SizeHW, list[int]] = {}
        for place, image in enumerate(planes):
            places.setdefault(self._batch_size_hw((image.shape[1], image.shape[2])), []).append(place)
        return [
            self._batch(batch_hw, numbers, [planes[number] for number in numbers], original_sizes_hw)
            for batch_hw, numbers in places.items()
        ]

    def _batch(
        self, batch_hw: SizeHW, numbers: list[int], planes: Sequence[Image], original_sizes_hw: Sequence[SizeHW]
    ) -> EngineBatch:
        pixels = torch.empty((len(planes), 3, *batch_hw), dtype=torch.uint8, pin_memory=self._copies is not None)
        fill_padded(pixels.numpy(), planes)
        is_there = None
        if self._copies is not None:
            # On a separate stream, so that the copy runs while the model works on the previous batch.
            with torch.cuda.stream(self._copies):
                pixels = pixels.to(self._device, non_blocking=True)
                is_there = self._copies.record_event()
        sizes_hw = [(image.shape[1], image.shape[2]) for image in planes]
        batch = Batch(numbers, pixels, sizes_hw, [original_sizes_hw[number] for number in numbers], labels=[])
        return EngineBatch(numbers, batch, is_there)

    def _batch_size_hw(self, target_hw: SizeHW) -> SizeHW:
        """Return height and width in pixels of the batch for an image of this size, padding included."""
        # A model without a pixel mask would treat the padding as part of the image.
        pads_together = self._pad_batches and self._detector.family.uses_pixel_mask
        if self._detector.pads_to_largest and not pads_together:
            return target_hw
        return self.resize_rule.padded_size_hw(target_hw)

    def predict(self, prepared: Sequence[EngineBatch]) -> list[Detections]:
        """Detect objects; see `start`."""
        return self.start(prepared)()

    def start(self, prepared: Sequence[EngineBatch]) -> Callable[[], list[Detections]]:
        """Start detecting objects; a GPU computes after the call returns.

        Args:
            prepared: Result of `prepare` or `prepare_planes`.

        Returns:
            A function that waits for the result: one `Detections` per image, in order, in pixels of the image before
            the resize.
        """
        started = []
        with torch.inference_mode():
            for part in prepared:
                if part.is_there is not None:
                    stream = torch.cuda.current_stream(self._device)
                    stream.wait_event(part.is_there)
                    part.batch.pixels.record_stream(stream)
                # Only the uint8 pixels are copied to the device; all other inputs are made there.
                logits, boxes_cxcywh = self._run(self._detector.model_inputs(part.batch))
                started.append(
                    best_detections(self._detector.family, logits, boxes_cxcywh, part.batch.original_sizes_hw)
                )

        def finish() -> list[Detections]:
            found: dict[int, Detections] = {}
            for part, fetch in zip(prepared, started, strict=True):
                found.update(zip(part.places, fetch(), strict=True))
            return [found[place] for place in range(len(found))]

        return finish

    @abstractmethod
    def _run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            inputs: Result of `Detector.model_inputs`.

        Returns:
            Logits [B, Q, C] and boxes [B, Q, 4], centre form relative to the image, on any device.
        """
