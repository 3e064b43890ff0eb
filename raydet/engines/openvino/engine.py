"""A detector that runs in OpenVINO on the CPU."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raydet.config import PredictConfig
from raydet.engines.detector_engine import DetectorEngine, EngineBatch, Outputs
from raydet.engines.engine import check_engine
from raydet.engines.openvino.graph import compile_graph, images_per_run, read_graph, trace
from raydet.models.checkpoints import holds_graph
from raydet.models.detector import Detector
from raydet.models.graph import OUTPUT_NAMES, input_names
from raydet.models.loading import load_detector, load_without_weights

GraphInputs = list[npt.NDArray[Any]]
"""Inputs of a graph in the order of `input_names`, [B, …]."""


class OpenVinoEngine(DetectorEngine):
    """A graph that `export openvino` wrote, or that of a checkpoint, which takes a few seconds to trace.

    Attributes:
        compiled: The `openvino.CompiledModel`.
        images_per_run: Number of images that the graph takes at a time.
    """

    def __init__(
        self, detector: Detector, graph: Any, *, precision: str = "fp32", pad_batches: bool = True, num_threads: int
    ) -> None:
        """Compile a graph; `detector` describes it, and its model may be without weights. See `load_engine`."""
        super().__init__(detector, device=torch.device("cpu"), pad_batches=pad_batches, num_threads=num_threads)
        self.compiled: Any = compile_graph(graph, precision=precision, num_threads=num_threads)
        self._request: Any = self.compiled.create_infer_request()
        self.images_per_run = images_per_run(graph)
        self._names = input_names(detector)

    @classmethod
    def load(cls, config: PredictConfig, *, num_threads: int) -> Self:
        """Load the graph or the checkpoint of a config; see `load_engine`.

        Raises:
            UserError: The model does not exist, this engine does not support it, or OpenVINO is not installed.
        """
        assert config.checkpoint is not None, "the config names a model instead of a checkpoint"
        has_graph = holds_graph(config.checkpoint)
        detector = load_without_weights(config.checkpoint) if has_graph else load_detector(config.checkpoint)
        check_engine(config, detector.family.model_type)
        read = read_graph if has_graph else _traced
        graph = read(config.checkpoint, detector)
        engine = cls(
            detector, graph, precision=config.precision, pad_batches=config.pad_batches, num_threads=num_threads
        )
        # OpenVINO holds the weights now.
        nn.Module.to(detector.model, "meta")
        return engine

    def graph_inputs(self, prepared: Sequence[EngineBatch]) -> Iterator[GraphInputs]:
        """Yield what the graph gets for prepared images, run by run; the last run may repeat an image."""
        for part in prepared:
            inputs = self._detector.model_inputs(part.batch)
            yield from (arrays for arrays, _ in self._runs([inputs[name].numpy() for name in self._names]))

    def outputs_of(self, inputs: GraphInputs) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return logits [B, Q, C] and boxes [B, Q, 4] for the inputs of any number of images."""
        outputs: list[list[npt.NDArray[np.float32]]] = [[] for _ in OUTPUT_NAMES]
        for arrays, num_images in self._runs(inputs):
            results = self._request.infer(arrays)
            for number, output in enumerate(outputs):
                # A copy, because the next run overwrites the result.
                output.append(np.array(results[number][:num_images]))
        logits, boxes_cxcywh = (np.concatenate(output) for output in outputs)
        return logits, boxes_cxcywh

    def _runs(self, inputs: GraphInputs) -> Iterator[tuple[GraphInputs, int]]:
        """Yield the inputs of each run, and the number of different images in it; the last one is repeated."""
        num_images = len(inputs[0])
        for start in range(0, num_images, self.images_per_run):
            rows = np.minimum(np.arange(start, start + self.images_per_run), num_images - 1)
            yield [array[rows] for array in inputs], min(self.images_per_run, num_images - start)

    def _run(self, inputs: Mapping[str, Tensor]) -> Outputs:
        logits, boxes_cxcywh = self.outputs_of([inputs[name].numpy() for name in self._names])
        return Outputs(torch.from_numpy(logits), torch.from_numpy(boxes_cxcywh))


def _traced(name: str, detector: Detector) -> Any:
    return trace(detector, where=name)
