"""A detector that runs in torch, on the CPU or a GPU: loaded from a checkpoint, or a live one in training."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raydet.config import Keep, Precision, PredictConfig, ResizeOn
from raydet.engines.detector_engine import DetectorEngine, Outputs
from raydet.engines.embedding import EmbeddingReader
from raydet.engines.engine import no_fp16_on_cpu, no_lanczos_on_device
from raydet.models.adapted.loading import load_adapted
from raydet.models.adapters.description import AdapterFolder
from raydet.models.detector import AUTOCAST_DTYPES, Detector
from raydet.models.geometry import LANCZOS
from raydet.models.loading import load_detector


class TorchEngine(DetectorEngine):
    """Engine in torch. Lower precisions use autocast; weights and, by the detector, boxes stay in full precision."""

    def __init__(
        self,
        detector: Detector,
        *,
        precision: Precision = "fp32",
        pad_batches: bool = True,
        num_threads: int | None = None,
        resize_on: ResizeOn = "cpu",
        keep: Sequence[Keep] = (),
    ) -> None:
        """Wrap a detector on its own device; see `DetectorEngine`.

        The detector runs in evaluation mode, and each call leaves its mode unchanged. fp16 requires a GPU.
        """
        super().__init__(
            detector,
            device=detector.device,
            pad_batches=pad_batches,
            num_threads=num_threads,
            resize_on=resize_on,
            keep=keep,
        )
        self._embedding = EmbeddingReader(detector) if "embedding" in keep else None
        self._dtype = AUTOCAST_DTYPES[precision]
        self._memory_format = torch.contiguous_format
        self._model: Any = detector.model

    @classmethod
    def load(cls, config: PredictConfig, *, device: str, num_threads: int) -> "TorchEngine":
        """Load the checkpoint of a config; see `load_engine`.

        Raises:
            UserError: The model does not exist, or the device does not support the precision or the resize.
        """
        assert config.checkpoint is not None, "the config names no checkpoint"
        return cls._around(load_detector(config.checkpoint), config, device=device, num_threads=num_threads)

    @classmethod
    def load_adapted(
        cls, config: PredictConfig, adapters: Sequence[AdapterFolder], *, device: str, num_threads: int
    ) -> "list[TorchEngine]":
        """Load the checkpoint of a config with each of some adapters, which share the weights of the checkpoint.

        The engines take each other's prepared images.

        Raises:
            UserError: An adapter does not fit, see `raydet.models.adapted.loading.load_adapted`, or as of `load`.
        """
        assert config.checkpoint is not None, "the config names no checkpoint"
        detectors = list(load_adapted(config.checkpoint, adapters))
        return [cls._around(detector, config, device=device, num_threads=num_threads) for detector in detectors]

    @classmethod
    def _around(cls, detector: Detector, config: PredictConfig, *, device: str, num_threads: int) -> "TorchEngine":
        where = torch.device(device)
        if config.precision == "fp16" and where.type == "cpu":
            raise no_fp16_on_cpu("torch")
        if config.resize_on == "device" and detector.resize_rule.resample == LANCZOS:
            raise no_lanczos_on_device(config.checkpoint)
        detector.to(where).model.eval()
        options: Any = {name: getattr(config, name) for name in ("precision", "pad_batches", "resize_on")}
        engine = cls(detector, num_threads=num_threads, keep=config.keep or (), **options)
        if config.channels_last:
            engine._memory_format = torch.channels_last
            nn.Module.to(detector.model, memory_format=torch.channels_last)
        if config.compile:
            # dynamic=True compiles once for all sizes; with a fixed image size only the number of images varies.
            engine._model = torch.compile(detector.model, dynamic=detector.pads_to_largest or None)
        return engine

    def _run(self, inputs: Mapping[str, Tensor]) -> Outputs:
        pixels = inputs["pixel_values"].contiguous(memory_format=self._memory_format)
        with (
            _evaluating(self._detector.model),
            torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None),
        ):
            outputs = self._model(**{**inputs, "pixel_values": pixels})
        vectors = None if self._embedding is None else self._embedding.vectors(outputs)
        return Outputs(outputs.logits, outputs.pred_boxes, vectors)


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
