"""A detection model with its image processor and classes: pixels → inputs.

It is saved as a plain Hugging Face model folder.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from raydet.common.boxes import Boxes
from raydet.common.errors import UserError
from raydet.common.hub_client import quiet_client
from raydet.models.adapters.folder import write_adapter
from raydet.models.adapters.lora import merged, untied
from raydet.models.collate import Batch
from raydet.models.families import Family, family_of
from raydet.models.processors import resize_rule_of
from raydet.tables.schema import Category

_MOST_QUERIES = 100_000
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""dtype of autocast by precision; None for no autocast."""


@dataclass(frozen=True)
class QueryVectors:
    """Vectors of one image and of its queries, as `predict --keep` asks for them; None where it does not.

    Attributes:
        class_scores: float16 [Q, C], the scores of all classes, without "no object".
        embedding: float16 [Q, D], the last hidden state of the decoder.
        image_embedding: float16 [D], the mean of the encoder's features.
    """

    class_scores: npt.NDArray[np.float16] | None = None
    embedding: npt.NDArray[np.float16] | None = None
    image_embedding: npt.NDArray[np.float16] | None = None

    def take(self, queries: npt.NDArray[np.int64]) -> Self:
        """Select queries by index, in the given order."""
        scores, embedding = (None if part is None else part[queries] for part in (self.class_scores, self.embedding))
        return replace(self, class_scores=scores, embedding=embedding)


@dataclass(frozen=True)
class Detections:
    """Detections in one image, in descending score order.

    Attributes:
        boxes_xywh: float64 [K, 4], absolute pixels of the upright image before any resize.
        scores: float64 [K], above 0, at most 1.
        categories: int64 [K], category indices.
        queries: int64 [K], the index of each detection's query in `vectors`; None without vectors.
        vectors: Vectors of the queries; None unless they are kept.
    """

    boxes_xywh: Boxes
    scores: npt.NDArray[np.float64]
    categories: npt.NDArray[np.int64]
    queries: npt.NDArray[np.int64] | None = None
    vectors: QueryVectors | None = None

    def take(self, kept: npt.NDArray[np.int64]) -> Self:
        """Select detections by index, in the given order."""
        return replace(
            self,
            boxes_xywh=self.boxes_xywh[kept],
            scores=self.scores[kept],
            categories=self.categories[kept],
            queries=None if self.queries is None else self.queries[kept],
        )

    def with_used_queries(self) -> Self:
        """Keep the vectors of the queries that have a detection, in the order of their first detections."""
        if self.queries is None or self.vectors is None:
            return self
        used, first, number = np.unique(self.queries, return_index=True, return_inverse=True)
        order = np.argsort(first)
        return replace(self, queries=np.argsort(order)[number], vectors=self.vectors.take(used[order]))


class Detector:
    """A detection model with its image processor and classes.

    Attributes:
        model: The transformers model.
        processor: Its Hugging Face image processor.
        categories: The classes in the order of their indices.
        resize_rule: The processor's geometry.
        family: Family of the model type.
        notes: Lines about the weights that differ from those of the checkpoint: the rows of the class heads if the
            classes differ, and weights that the checkpoint lacks. Empty for a model from scratch.
        left_out: Parameters that the training loss may leave out; None until `raydet.models.losses` has found them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        categories: Sequence[Category],
        *,
        where: str,
        notes: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.processor = processor
        self.categories = tuple(categories)
        self.family: Family = family_of(model.config.model_type, where=where)
        if not 0 < self.num_queries <= _MOST_QUERIES:
            raise UserError(
                f"the config.json of {where} states {self.num_queries} queries; expected 1 to {_MOST_QUERIES:,}"
            )
        self.resize_rule = resize_rule_of(processor, where=where)
        self.notes = tuple(notes)
        self.left_out: tuple[nn.Parameter, ...] | None = None
        self._scale: tuple[Tensor, Tensor] | None = None
        _keep_boxes_precise(model, self.family)
        model.config.raydet = {"categories": [{"id": item.id, "name": item.name} for item in self.categories]}

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def num_queries(self) -> int:
        """Number of boxes that the model proposes per image."""
        config = self.model.config
        is_two_stage = getattr(config, "two_stage", False)
        return int(getattr(config, "two_stage_num_proposals" if is_two_stage else self.family.num_queries_field))

    @property
    def max_detections(self) -> int:
        """Maximum number of detections per image."""
        return self.num_queries if self.family.top_k is None else self.family.top_k

    def to(self, device: torch.device | str) -> "Detector":
        """Move the model to a device and return the detector."""
        nn.Module.to(self.model, device)
        return self

    def compile(self, *, num_sizes: int = 1, **options: Any) -> None:
        """Compile backbone and encoder, with one graph for each shape of their input.

        The rest of the model stays as it is: its shapes change with the number of boxes in each batch, and matching
        runs on the CPU. With more input sizes than stated, parts of the model may run uncompiled.
        """
        # Four graphs per size: for full and for last batches, in training and in validation.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * num_sizes)
        for name in self.family.compiled_modules:
            self.model.get_submodule(name).compile(dynamic=False, **options)

    @property
    def pads_to_largest(self) -> bool:
        """True if images keep their aspect ratio and are padded to the largest image of their batch."""
        return self.resize_rule.mode == "keep_aspect" and self.resize_rule.pad_to_hw is None

    def model_inputs(self, batch: Batch, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Normalise pixels on their device, as the image processor does.

        Args:
            batch: The batch, already on the model's device.
            dtype: Dtype of the pixel values.

        Returns:
            `pixel_values` [B, 3, H, W], zero in the padding, and, for families that use it, `pixel_mask` int64
            [B, H, W], 1 in the image and 0 in its padding.
        """
        pixels = self._normalise(batch.pixels)
        is_padded = any(size_hw != tuple(pixels.shape[-2:]) for size_hw in batch.sizes_hw)
        mask = _pixel_mask(batch) if is_padded or self.family.uses_pixel_mask else None
        if mask is not None and is_padded:
            pixels = pixels * mask[:, None]
        inputs = {"pixel_values": pixels.to(dtype)}
        if mask is not None and self.family.uses_pixel_mask:
            inputs["pixel_mask"] = mask
        return inputs

    def _normalise(self, pixels: Tensor) -> Tensor:
        processor = self.processor
        values = pixels.to(torch.float32)
        if not processor.do_normalize:
            return values * processor.rescale_factor if processor.do_rescale else values
        # One subtraction and one division, as in the processor, so that rounding is the same.
        mean, std = self._mean_and_std(values.device)
        return values.sub_(mean).div_(std)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of each channel for pixels from 0 to 255; without normalising 0 and 1."""
        processor = self.processor
        if not processor.do_normalize:
            return [0.0] * 3, [1.0 / processor.rescale_factor if processor.do_rescale else 1.0] * 3
        mean, std = self._mean_and_std(torch.device("cpu"))
        return mean.flatten().tolist(), std.flatten().tolist()

    def _mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation for pixels from 0 to 255, each float32 [3, 1, 1], cached on the device."""
        if self._scale is None or self._scale[0].device != device:
            processor = self.processor
            scale = 1.0 / processor.rescale_factor if processor.do_rescale else 1.0
            mean, std = (
                (torch.tensor(numbers) * scale).to(device).view(-1, 1, 1)
                for numbers in (processor.image_mean, processor.image_std)
            )
            self._scale = (mean, std)
        return self._scale

    def save(self, folder: str) -> None:
        """Write a Hugging Face model folder: safetensors weights, config, image processor. Adapters are merged.

        The write is not atomic; a caller that needs an atomic one must write elsewhere and rename.
        """
        with quiet(), merged(self.model):
            self.model.save_pretrained(folder)
            # Some model types have no default processor class, so that the folder must name one.
            self.processor.save_pretrained(folder)
        # safetensors makes files private; the others follow the umask.
        mode = Path(folder, "config.json").stat().st_mode & 0o777
        for file in Path(folder).glob("*.safetensors"):
            file.chmod(mode)

    def save_description(self, folder: str) -> None:
        """Write the config and the image processor, without weights, into a folder that exists."""
        with quiet():
            self.model.config.save_pretrained(folder)
            self.processor.save_pretrained(folder)

    def save_adapter(self, folder: str, *, base: str) -> None:
        """Write a folder for peft, see `write_adapter`, with the config and the image processor of the merged model.

        Weights that the merged model ties are separate according to this config, because peft fails on tied ones.

        Args:
            folder: Folder that exists.
            base: Name of the model that the adapters belong to, which may have other classes and another image size.
        """
        write_adapter(self.model, folder, base=base)
        with untied(self.model):
            self.save_description(folder)


class _InSinglePrecision(nn.Module):
    """A layer that computes at least in single precision under autocast. Its parameters keep their names."""

    def forward(self, *inputs: Tensor) -> Any:
        device_type = inputs[0].device.type
        if not torch.is_autocast_enabled(device_type):
            return super().forward(*inputs)
        with torch.autocast(device_type, enabled=False):
            return super().forward(*(at_least_single(value) for value in inputs))


@functools.cache
def _in_single_precision(kind: Any) -> Any:
    return type(kind.__name__, (_InSinglePrecision, kind), {})


def _keep_boxes_precise(model: nn.Module, family: Family) -> None:
    """Make the layers that predict boxes and score proposals ignore autocast, in training, validation and scoring."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in family.precise_layers:
            # A ModuleList is never called; its layers are.
            for layer in module if isinstance(module, nn.ModuleList) else [module]:
                kind: Any = type(layer)
                if not issubclass(kind, _InSinglePrecision):
                    layer.__class__ = _in_single_precision(kind)


def at_least_single(values: Tensor) -> Tensor:
    """Convert half precision to single precision; return other values unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _pixel_mask(batch: Batch) -> Tensor:
    # Created on the device of the pixels, so that only these have to be copied.
    mask = torch.zeros((len(batch), *batch.pixels.shape[-2:]), dtype=torch.int64, device=batch.pixels.device)
    for plane, (height, width) in zip(mask, batch.sizes_hw, strict=True):
        plane[:height, :width] = 1
    return mask


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager: suppress warnings, reports and progress bars of transformers and the Hub client."""
    verbosity, had_bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with quiet_client():
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if had_bars:
            transformers.logging.enable_progress_bar()
