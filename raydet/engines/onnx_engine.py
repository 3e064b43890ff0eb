"""A detector that runs in ONNX Runtime, on the CPU or a GPU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydet.config import PredictConfig
from raydet.engines.detector_engine import DetectorEngine, Outputs
from raydet.engines.engine import TORCH_INSTEAD, check_engine
from raydet.models.graph import OUTPUT_NAMES, input_names
from raydet.models.loading import load_detector
from raydet.models.onnx import open_session, to_onnx

_DTYPES = {torch.float32: np.float32, torch.int64: np.int64}
"""Types of the graph's inputs."""


class OnnxEngine(DetectorEngine):
    """The graph that `raydet.exports.onnx` writes, traced when the checkpoint is loaded, which takes a few seconds."""

    def __init__(self, config: PredictConfig, *, device: str, num_threads: int) -> None:
        """Load and convert the checkpoint of a config; see `load_engine`.

        Raises:
            UserError: The model does not exist, this engine does not support it, or ONNX Runtime is not installed or
                cannot use the GPU.
        """
        assert config.checkpoint is not None, "the config names a model instead of a checkpoint"
        detector = load_detector(config.checkpoint)
        check_engine(config, detector.family.model_type)
        where = torch.device(device)
        super().__init__(detector, device=where, pad_batches=config.pad_batches, num_threads=num_threads)
        graph = to_onnx(detector, where=config.checkpoint, remedy=TORCH_INSTEAD)
        self._session: Any = open_session(graph, num_threads=num_threads, device=where)
        self._names = input_names(detector)
        # The weights live in ONNX Runtime now.
        nn.Module.to(detector.model, "meta")

    def _run(self, inputs: Mapping[str, Tensor]) -> Outputs:
        binding = self._session.io_binding()
        tensors = {name: inputs[name].contiguous() for name in self._names}
        for name, tensor in tensors.items():
            place = tensor.device.type, tensor.device.index or 0
            binding.bind_input(name, *place, _DTYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name in OUTPUT_NAMES:
            binding.bind_output(name)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # ONNX Runtime has a stream of its own
        self._session.run_with_iobinding(binding)
        logits, boxes = binding.copy_outputs_to_cpu()
        return Outputs(torch.from_numpy(logits), torch.from_numpy(boxes))
