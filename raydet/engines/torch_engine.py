"""A detector that runs in torch, on the CPU or a GPU."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raydet.config import PredictConfig
from raydet.engines.detector_engine import DetectorEngine
from raydet.engines.engine import no_fp16_on_cpu
from raydet.models.loading import load_detector

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine(DetectorEngine):
    """Autocast for the lower precisions; weights stay in full precision, and so do the layers that place boxes."""

    def __init__(self, config: PredictConfig, *, device: str, num_threads: int) -> None:
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
        super().__init__(detector, device=where, pad_batches=config.pad_batches, num_threads=num_threads)
        model = detector.model.eval()
        self._dtype = _DTYPES[config.precision]
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        if config.channels_last:
            nn.Module.to(model, memory_format=torch.channels_last)
        if self._dtype != torch.float32:
            _keep_boxes_in_full_precision(model, where.type)
        # Sizes that vary are compiled for once and for all; of a fixed size only the number of images does.
        self._model: Any = torch.compile(model, dynamic=detector.pads_to_largest or None) if config.compile else model

    def _run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        pixels = inputs["pixel_values"].contiguous(memory_format=self._memory_format)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            outputs = self._model(**{**inputs, "pixel_values": pixels})
        return outputs.logits, outputs.pred_boxes


def _keep_boxes_in_full_precision(model: nn.Module, device_type: str) -> None:
    """Takes the small layers that place boxes out of autocast.

    bf16 has eight significant bits: a box that leaves its layer in it is off by up to 1/256 of the picture's side.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("bbox_embed", "bbox_predictor"):
            _run_in_full_precision(module, device_type)


def _run_in_full_precision(module: nn.Module, device_type: str) -> None:
    # A list of such layers is never called itself.
    for layer in module if isinstance(module, nn.ModuleList) else [module]:
        forward = layer.forward

        def run(hidden: Tensor, forward: Any = forward) -> Any:
            with torch.autocast(device_type, enabled=False):
                return forward(hidden.float())

        layer.forward = run
