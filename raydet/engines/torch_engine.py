"""A detector that runs in torch, on the CPU or a GPU: loaded from a checkpoint, or live, such as one in training."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raydet.config import Precision, PredictConfig
from raydet.engines.detector_engine import DetectorEngine
from raydet.engines.engine import no_fp16_on_cpu
from raydet.models.detector import Detector
from raydet.models.loading import load_detector

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BOX_LAYERS = ("bbox_embed", "bbox_predictor")


class TorchEngine(DetectorEngine):
    """Autocast for the lower precisions; weights stay in full precision, and so do the layers that place boxes."""

    def __init__(
        self,
        detector: Detector,
        *,
        precision: Precision = "fp32",
        pad_batches: bool = True,
        num_threads: int | None = None,
    ) -> None:
        """Runs a detector as it is, on its own device; between two calls the model is as it was before.

        Args:
            detector: In training mode or not: it runs in evaluation mode.
            precision: fp16 is for GPUs alone.
            pad_batches: See `ResizeRule.padded_size_hw`; without it each size runs by itself.
            num_threads: Of torch on the CPU, in the whole process; None leaves them as they are.
        """
        super().__init__(detector, device=detector.device, pad_batches=pad_batches, num_threads=num_threads)
        self._dtype = _DTYPES[precision]
        self._memory_format = torch.contiguous_format
        self._model: Any = detector.model
        # Made once: torch.compile would take a new function for a new model.
        self._box_layers = [] if self._dtype == torch.float32 else _box_layers(detector.model, self._device.type)

    @classmethod
    def load(cls, config: PredictConfig, *, device: str, num_threads: int) -> "TorchEngine":
        """Loads the checkpoint of a config.

        Args:
            config: `checkpoint`, `precision`, `compile`, `channels_last` and `pad_batches` are read.
            device: cpu, cuda or cuda:N.
            num_threads: Of torch on the CPU, in the whole process.

        Raises:
            UserError: No such model, or a precision that the device does not have.
        """
        assert config.checkpoint is not None, "a detector comes from a checkpoint"
        where = torch.device(device)
        if config.precision == "fp16" and where.type == "cpu":
            raise no_fp16_on_cpu("torch")
        detector = load_detector(config.checkpoint).to(where)
        detector.model.eval()
        engine = cls(detector, precision=config.precision, pad_batches=config.pad_batches, num_threads=num_threads)
        if config.channels_last:
            engine._memory_format = torch.channels_last
            nn.Module.to(detector.model, memory_format=torch.channels_last)
        if config.compile:
            # Sizes that vary are compiled for once and for all; of a fixed size only the number of images does.
            engine._model = torch.compile(detector.model, dynamic=detector.pads_to_largest or None)
        return engine

    def _run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        pixels = inputs["pixel_values"].contiguous(memory_format=self._memory_format)
        is_lower = self._dtype != torch.float32
        with (
            _evaluating(self._detector.model),
            _in_full_precision(self._box_layers),
            torch.autocast(self._device.type, self._dtype, enabled=is_lower),
        ):
            outputs = self._model(**{**inputs, "pixel_values": pixels})
        return outputs.logits, outputs.pred_boxes


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode for the time of a `with`."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


_Forward = Callable[[Tensor], Any]


def _box_layers(model: nn.Module, device_type: str) -> list[tuple[nn.Module, _Forward]]:
    """The small layers that place boxes, each with a forward that takes it out of autocast.

    bf16 has eight significant bits: a box that leaves its layer in it is off by up to 1/256 of the picture's side.
    """
    layers: dict[nn.Module, None] = {}  # each once, though some models list one layer several times
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _BOX_LAYERS:
            # A list of such layers is never called itself.
            layers |= dict.fromkeys(module if isinstance(module, nn.ModuleList) else [module])
    return [(layer, _full_precision_forward(layer.forward, device_type)) for layer in layers]


def _full_precision_forward(forward: Any, device_type: str) -> _Forward:
    def run(hidden: Tensor) -> Any:
        with torch.autocast(device_type, enabled=False):
            return forward(hidden.float())

    return run


@contextlib.contextmanager
def _in_full_precision(layers: list[tuple[nn.Module, _Forward]]) -> Iterator[None]:
    """Has layers run with their other forward for the time of a `with`."""
    for layer, forward in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, _ in layers:
            del layer.forward
