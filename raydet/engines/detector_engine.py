"""The part that all detector engines share: images → inputs, outputs → detections."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raydet.config import Keep, ResizeOn
from raydet.engines.best import best_detections
from raydet.models.collate import Batch, Example
from raydet.models.detector import Detections, Detector
from raydet.models.geometry import Image, SizeHW, fill_padded, resized_on_device, resized_planes


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


class Outputs(NamedTuple):
    """Outputs of a forward pass, on any device.

    Attributes:
        logits: [B, Q, C].
        boxes_cxcywh: [B, Q, 4], centre form relative to the image.
        vectors: Vectors to keep, by field of `QueryVectors`, [B, …].
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    vectors: Mapping[str, Tensor] | None = None


class DetectorEngine(ABC):
    """An `Engine` around a `Detector`; subclasses run the model.

    Attributes:
        categories: The classes in the order of their indices.
        max_detections: Maximum number of detections per image.
        resize_rule: Resize rule of the image processor.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        device: torch.device,
        pad_batches: bool,
        num_threads: int | None = None,
        resize_on: ResizeOn = "cpu",
        keep: Sequence[Keep] = (),
    ) -> None:
        """Set up the engine for a loaded detector, with its inputs on `device`.

        `pad_batches` pads images as in `ResizeRule.padded_size_hw`; without it, each size is a separate batch.
        `num_threads` are torch's; None leaves their number. `prepare` resizes on the CPU or on `device`. `keep` names
        the vectors that detections have.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.categories = detector.categories
        self.max_detections = detector.max_detections
        self.resize_rule = detector.resize_rule
        self._detector = detector
        self._device = device
        self._pad_batches = pad_batches
        self._resize_on = resize_on
        self._keep = frozenset(keep)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def input_size_hw(self, size_hw: SizeHW) -> SizeHW:
        """Return height and width in pixels of the model's input for an image of this size, without padding."""
        return self.resize_rule.target_size_hw(size_hw)

    def prepare(self, images: Sequence[Image]) -> list[EngineBatch]:
        """Resize images, RGB uint8 [H, W, 3], as the model's image processor does, and batch those of the same size."""
        sizes_hw = [(image.shape[0], image.shape[1]) for image in images]
        targets_hw = [self.input_size_hw(size_hw) for size_hw in sizes_hw]
        if self._resize_on == "device":
            return self._batches(images, targets_hw, sizes_hw, self._resized_there)
        planes = [
            resized_planes(image, target_hw, self.resize_rule.resample)
            for image, target_hw in zip(images, targets_hw, strict=True)
        ]
        return self.prepare_planes(planes, sizes_hw)

    def prepare_resized(self, examples: Sequence[Example]) -> list[EngineBatch]:
        """Batch examples of a training table, which `resize_rule` has already resized."""
        planes = [example.image.transpose(2, 0, 1) for example in examples]
        return self.prepare_planes(planes, [example.original_size_hw for example in examples])

    def prepare_planes(self, planes: Sequence[Image], original_sizes_hw: Sequence[SizeHW]) -> list[EngineBatch]:
        """Batch images of the same size, and start their copy to the device; see `Engine.prepare_planes`."""
        sizes_hw = [(image.shape[1], image.shape[2]) for image in planes]
        return self._batches(planes, sizes_hw, original_sizes_hw, self._padded)

    def _batches(
        self,
        images: Sequence[Image],
        sizes_hw: Sequence[SizeHW],
        original_sizes_hw: Sequence[SizeHW],
        assemble: Callable[[list[Image], SizeHW], Tensor],
    ) -> list[EngineBatch]:
        """Group images by the size of their batch, and let `assemble` build the pixels of each batch on the device."""
        places: dict[SizeHW, list[int]] = {}
        for place, size_hw in enumerate(sizes_hw):
            places.setdefault(self._batch_size_hw(size_hw), []).append(place)
        batches = []
        for batch_hw, numbers in places.items():
            # On a separate stream, so that copy and resize run while the model works on the previous batch.
            with contextlib.nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
                pixels = assemble([images[number] for number in numbers], batch_hw)
                is_there = None if self._copies is None else self._copies.record_event()
            kept = [sizes_hw[number] for number in numbers], [original_sizes_hw[number] for number in numbers]
            batches.append(EngineBatch(numbers, Batch(numbers, pixels, *kept, labels=[]), is_there))
        return batches

    def _padded(self, planes: list[Image], batch_hw: SizeHW) -> Tensor:
        pixels = self._staging((len(planes), 3, *batch_hw))
        fill_padded(pixels.numpy(), planes)
        return pixels.to(self._device, non_blocking=True)

    def _resized_there(self, images: list[Image], batch_hw: SizeHW) -> Tensor:
        sizes = [image.size for image in images]
        staged = self._staging((sum(sizes),))
        np.concatenate([image.reshape(-1) for image in images], out=staged.numpy())
        pixels = torch.zeros((len(images), 3, *batch_hw), dtype=torch.uint8, device=self._device)
        sources = staged.to(self._device, non_blocking=True).split(sizes)
        for target, source, image in zip(pixels, sources, images, strict=True):
            height, width = self.input_size_hw((image.shape[0], image.shape[1]))
            planes = source.view(image.shape).permute(2, 0, 1)
            target[:, :height, :width] = resized_on_device(planes, (height, width), self.resize_rule.resample)
        return pixels

    def _staging(self, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised uint8 buffer, pinned if a GPU copies from it asynchronously."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._copies is not None)

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

    def start(
        self, prepared: Sequence[EngineBatch], *, observe: Callable[[EngineBatch, Tensor, Tensor], None] | None = None
    ) -> Callable[[], list[Detections]]:
        """Start detecting objects, see `Engine.start`; a GPU computes after the call returns.

        `observe` is called with each batch and its outputs: logits [B, Q, C] and boxes [B, Q, 4], centre form relative
        to the image.
        """
        started = []
        with torch.inference_mode():
            for part in prepared:
                if part.is_there is not None:
                    stream = torch.cuda.current_stream(self._device)
                    stream.wait_event(part.is_there)
                    part.batch.pixels.record_stream(stream)
                # Only the uint8 pixels are copied to the device; all other inputs are made there.
                logits, boxes_cxcywh, vectors = self._run(self._detector.model_inputs(part.batch))
                if observe is not None:
                    observe(part, logits, boxes_cxcywh)
                started.append(
                    best_detections(
                        self._detector.family,
                        logits,
                        boxes_cxcywh,
                        part.batch.original_sizes_hw,
                        keeps_class_scores="class_scores" in self._keep,
                        vectors=vectors,
                    )
                )

        def finish() -> list[Detections]:
            found: dict[int, Detections] = {}
            for part, fetch in zip(prepared, started, strict=True):
                found.update(zip(part.places, fetch(), strict=True))
            return [found[place] for place in range(len(found))]

        return finish

    @abstractmethod
    def _run(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Run the model on the result of `Detector.model_inputs`."""
