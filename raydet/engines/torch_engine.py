"""A detector that runs in torch, on the CPU or a GPU: loaded from a checkpoint, or a live one in training."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raydet.config import Precision, PredictConfig, ResizeOn
from raydet.engines.detector_engine import DetectorEngine
from raydet.engines.engine import no_fp16_on_cpu, no_lanczos_on_device
from raydet.models.detector import AUTOCAST_DTYPES, Detector
from raydet.models.geometry import LANCZOS
from raydet.models.loading import load_detector

_BOX_LAYERS = ("bbox_embed", "bbox_predictor")


class TorchEngine(DetectorEngine):
    """Engine in torch. Lower precisions use autocast; weights and box layers stay in full precision."""

    def __init__(
        self,
        detector: Detector,
        *,
        precision: Precision = "fp32",
        pad_batches: bool = True,
        num_threads: int | None = None,
        resize_on: ResizeOn = "cpu",
    ) -> None:
        """Wrap a detector on its own device. Each call leaves the model's mode and layers unchanged.

        Args:
            detector: Detector in any mode; it runs in evaluation mode.
            precision: Precision of the computation; fp16 requires a GPU.
            pad_batches: Pad images as in `ResizeRule.padded_size_hw`; if False, each size is a separate batch.
            num_threads: torch CPU threads of the process; None leaves the number unchanged.
            resize_on: Place where `prepare` resizes; `device` is the detector's own.
        """
        super().__init__(
            detector, device=detector.device, pad_batches=pad_batches, num_threads=num_threads, resize_on=resize_on
        )
        self._dtype = AUTOCAST_DTYPES[precision]
        self._memory_format = torch.contiguous_format
        self._model: Any = detector.model
        # Built once, because torch.compile would recompile the model for new functions.
        self._box_layers = [] if self._dtype is None else _box_layers(detector.model, self._device.type)

    @classmethod
    def load(cls, config: PredictConfig, *, device: str, num_threads: int) -> "TorchEngine":
        """Load the checkpoint of a config.

        Args:
            config: Config; `checkpoint`, `precision`, `compile`, `channels_last`, `pad_batches` and `resize_on` are
                used.
            device: cpu, cuda or cuda:N.
            num_threads: torch CPU threads of the process.

        Raises:
            UserError: The model does not exist, or the device does not support the precision or the resize.
        """
        assert config.checkpoint is not None, "the config names no checkpoint"
        where = torch.device(device)
        if config.precision == "fp16" and where.type == "cpu":
            raise no_fp16_on_cpu("torch")
        detector = load_detector(config.checkpoint).to(where)
        if config.resize_on == "device" and detector.resize_rule.resample == LANCZOS:
            raise no_lanczos_on_device(config.checkpoint)
        detector.model.eval()
        engine = cls(
            detector,
            precision=config.precision,
            pad_batches=config.pad_batches,
            num_threads=num_threads,
            resize_on=config.resize_on,
        )
        if config.channels_last:
            engine._memory_format = torch.channels_last
            nn.Module.to(detector.model, memory_format=torch.channels_last)
        if config.compile:
            # dynamic=True compiles once for all sizes; with a fixed image size only the number of images varies.
            engine._model = torch.compile(detector.model, dynamic=detector.pads_to_largest or None)
        return engine

    def _run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        pixels = inputs["pixel_values"].contiguous(memory_format=self._memory_format)
        with (
            _evaluating(self._detector.model),
            _in_full_precision(self._box_layers),
            torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None),
        ):
            outputs = self._model(**{**inputs, "pixel_values": pixels})
        return outputs.logits, outputs.pred_boxes


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: keep a model in evaluation mode while the block runs."""
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
    """Return the small layers that predict boxes, each with a forward function that disables autocast.

    bf16 has eight significant bits, so that its rounding would move a box by up to 1/256 of the image's side.
    """
    layers: dict[nn.Module, None] = {}  # without repetitions: some models list a layer several times
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _BOX_LAYERS:
            # A ModuleList is never called; its layers are.
            layers |= dict.fromkeys(module if isinstance(module, nn.ModuleList) else [module])
    return [(layer, _full_precision_forward(layer.forward, device_type)) for layer in layers]


def _full_precision_forward(forward: Any, device_type: str) -> _Forward:
    def run(hidden: Tensor) -> Any:
        with torch.autocast(device_type, enabled=False):
            return forward(hidden.float())

    return run


@contextlib.contextmanager
def _in_full_precision(layers: list[tuple[nn.Module, _Forward]]) -> Iterator[None]:
    """Context manager: replace the forward functions of layers while the block runs."""
    for layer, forward in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, _ in layers:
            del layer.forward
