"""A detector that runs in OpenVINO on the CPU."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydet.common.packages import require_packages
from raydet.config import PredictConfig
from raydet.engines.detector_engine import DetectorEngine, Outputs
from raydet.engines.engine import TORCH_INSTEAD, check_engine
from raydet.models.detector import Detector, quiet
from raydet.models.families import check_graph_sizes
from raydet.models.graph import OUTPUT_NAMES, example_inputs, fixed_size_hw, input_names, traceable
from raydet.models.loading import load_detector

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
_IMAGES_PER_RUN = 4
"""OpenVINO plans a graph of a fixed size better. An RT-DETRv2-R18 is a tenth faster in fours than in sixteens."""
_ONE_BY_ONE = ("table-transformer",)
"""OpenVINO 2026.4 fuses the masked attention of these models into one that fails for more than one image."""


class OpenVinoEngine(DetectorEngine):
    """A graph of the checkpoint, traced when it is loaded, which takes a few seconds."""

    def __init__(self, config: PredictConfig, *, num_threads: int) -> None:
        """Load and convert the checkpoint of a config; see `load_engine`.

        Raises:
            UserError: The model does not exist, this engine does not support it, or OpenVINO is not installed.
        """
        assert config.checkpoint is not None, "the config names a model instead of a checkpoint"
        detector = load_detector(config.checkpoint)
        check_engine(config, detector.family.model_type)
        super().__init__(detector, device=torch.device("cpu"), pad_batches=config.pad_batches, num_threads=num_threads)
        settings = {
            # By default OpenVINO uses bf16 on every CPU that supports it.
            "INFERENCE_PRECISION_HINT": _PRECISIONS[config.precision],
            "INFERENCE_NUM_THREADS": num_threads,
            "NUM_STREAMS": 1,
            # With pinning, several workers on one machine would share the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        self._images_per_run = 1 if detector.family.model_type in _ONE_BY_ONE else _IMAGES_PER_RUN
        model = _convert(detector, config.checkpoint, self._images_per_run)
        compiled = _openvino().Core().compile_model(model, "CPU", settings)
        self._request: Any = compiled.create_infer_request()
        self._names = input_names(detector)
        # OpenVINO holds the weights now.
        nn.Module.to(detector.model, "meta")

    def _run(self, inputs: Mapping[str, Tensor]) -> Outputs:
        arrays = [inputs[name].numpy() for name in self._names]
        num_images = len(arrays[0])
        outputs: list[list[Tensor]] = [[] for _ in OUTPUT_NAMES]
        for start in range(0, num_images, self._images_per_run):
            # The last run repeats the last image, and its answers are dropped.
            rows = np.minimum(np.arange(start, start + self._images_per_run), num_images - 1)
            results = self._request.infer([array[rows] for array in arrays])
            for number, output in enumerate(outputs):
                # A copy, because the next run overwrites the result.
                output.append(torch.from_numpy(np.array(results[number][: num_images - start])))
        logits, boxes_cxcywh = (torch.cat(output) for output in outputs)
        return Outputs(logits, boxes_cxcywh)


def _openvino() -> Any:
    """Import the package without its telemetry, which it delegates to another package."""
    require_packages("openvino")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _convert(detector: Detector, where: str, num_images: int) -> Any:
    """Convert a detector to OpenVINO for a fixed number of images, and for any image size if sizes vary."""
    openvino = _openvino()
    size_hw = fixed_size_hw(detector)
    check_graph_sizes(detector.family, keeps_aspect=size_hw is None, where=where, remedy=TORCH_INSTEAD)
    examples = example_inputs(detector, num_images, seed=0)
    shapes = [openvino.PartialShape([num_images, *example.shape[1:-2], *(size_hw or (-1, -1))]) for example in examples]
    with quiet(), torch.no_grad(), traceable(detector) as graph:
        return openvino.convert_model(graph, example_input=examples, input=shapes)
