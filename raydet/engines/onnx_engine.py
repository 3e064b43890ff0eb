"""A detector that runs in ONNX Runtime on the CPU."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raydet.config import PredictConfig
from raydet.engines.detector_engine import DetectorEngine, Outputs
from raydet.engines.engine import TORCH_INSTEAD, check_engine
from raydet.models.graph import OUTPUT_NAMES, input_names
from raydet.models.loading import load_detector
from raydet.models.onnx import open_session, to_onnx


class OnnxEngine(DetectorEngine):
    """The graph that `raydet.exports.onnx` writes, traced when the checkpoint is loaded, which takes a few seconds."""

    def __init__(self, config: PredictConfig, *, num_threads: int) -> None:
        """Load and convert the checkpoint of a config; see `load_engine`.

        Raises:
            UserError: The model does not exist, this engine does not support it, or ONNX Runtime is not installed.
        """
        assert config.checkpoint is not None, "the config names a model instead of a checkpoint"
        detector = load_detector(config.checkpoint)
        check_engine(config, detector.family.model_type)
        super().__init__(detector, device=torch.device("cpu"), pad_batches=config.pad_batches, num_threads=num_threads)
        graph = to_onnx(detector, where=config.checkpoint, remedy=TORCH_INSTEAD)
        self._session: Any = open_session(graph, num_threads=num_threads)
        self._names = input_names(detector)
        # The weights live in ONNX Runtime now.
        nn.Module.to(detector.model, "meta")

    def _run(self, inputs: Mapping[str, Tensor]) -> Outputs:
        logits, boxes = self._session.run(OUTPUT_NAMES, {name: inputs[name].numpy() for name in self._names})
        return Outputs(torch.from_numpy(logits), torch.from_numpy(boxes))
