"""The graph of a detector for OpenVINO: traced from a checkpoint, or read from the folder of `export openvino`."""

import sys
from pathlib import Path
from typing import Any, Literal

import torch

from raydet.common.errors import UserError, first_line
from raydet.common.packages import require_packages
from raydet.engines.engine import TORCH_INSTEAD
from raydet.engines.openvino.sampling import put_queries_last
from raydet.models.checkpoints import GRAPH_FILES
from raydet.models.detector import Detector, quiet
from raydet.models.families import check_graph_sizes
from raydet.models.graph import OUTPUT_NAMES, example_inputs, fixed_size_hw, input_names, traceable

_IMAGES_PER_RUN = 4
"""OpenVINO plans a graph of a fixed size better. An RT-DETRv2-R18 is a tenth faster in fours than in sixteens."""
_ONE_BY_ONE = ("table-transformer",)
"""OpenVINO 2026.4 fuses the masked attention of these models into one that fails for more than one image."""
_MOST_XML_BYTES = 256 * 2**20
"""An RT-DETRv2-R18 has 2 MB; OpenVINO parses the file in memory."""
FloatPrecision = Literal["fp32", "bf16"]
"""Precision of the layers that are not in INT8."""
_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def openvino_package() -> Any:
    """Import the package without its telemetry, which it delegates to another package.

    Raises:
        UserError: It is not installed.
    """
    require_packages("openvino")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def trace(detector: Detector, *, where: str, remedy: str = TORCH_INSTEAD) -> Any:
    """Convert a detector to an `openvino.Model` for a fixed number of images, and for any image size if sizes vary.

    Args:
        detector: Detector in evaluation mode.
        where: Its checkpoint, for the error message.
        remedy: The end of the error message: what the user can do instead.

    Raises:
        UserError: The images of this model vary in size, and its graph works at one size only.
    """
    openvino = openvino_package()
    size_hw = fixed_size_hw(detector)
    check_graph_sizes(detector.family, keeps_aspect=size_hw is None, where=where, remedy=remedy)
    num_images = 1 if detector.family.model_type in _ONE_BY_ONE else _IMAGES_PER_RUN
    examples = example_inputs(detector, num_images, seed=0)
    shapes = [openvino.PartialShape([num_images, *example.shape[1:-2], *(size_hw or (-1, -1))]) for example in examples]
    with quiet(), torch.no_grad(), traceable(detector) as graph:
        model = openvino.convert_model(graph, example_input=examples, input=shapes)
    put_queries_last(model)
    for ports, names in ((model.inputs, input_names(detector)), (model.outputs, OUTPUT_NAMES)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    return model


def write_graph(graph: Any, file: Path, *, fp16_weights: bool) -> None:
    """Write a graph as an XML file, and its weights as a file beside it that ends in `.bin`."""
    openvino_package().save_model(graph, file, compress_to_fp16=fp16_weights)


def read_graph(folder: str, detector: Detector) -> Any:
    """Read the graph in a folder of `export openvino`, and check that it belongs to the config beside it.

    Args:
        folder: Local folder.
        detector: The detector that the other files describe.

    Raises:
        UserError: The graph is damaged, too large, or that of another model or image size.
    """
    path = Path(folder) / GRAPH_FILES[0]
    if path.stat().st_size > _MOST_XML_BYTES:
        raise UserError(f"the graph {path} cannot be used: it is larger than {_MOST_XML_BYTES // 2**20} MiB")
    try:
        graph = openvino_package().Core().read_model(path)
    except RuntimeError as error:
        reason = first_line(error)
        raise UserError(f"cannot read the graph {path}: {reason}; run raydet export openvino again") from None
    height, width = fixed_size_hw(detector) or (-1, -1)
    num_logits = len(detector.categories) + detector.family.softmax
    wanted = [[3, height, width], [height, width]][: len(input_names(detector))]
    wanted += [[detector.num_queries, num_logits], [detector.num_queries, 4]]
    found = [_shape(port)[1:] for port in (*graph.inputs, *graph.outputs)]
    if found != wanted or len({_shape(port)[0] for port in graph.inputs}) != 1 or _shape(graph.inputs[0])[0] < 1:
        raise UserError(
            f"the graph {path} does not fit the config.json and preprocessor_config.json beside it: its inputs and "
            f"outputs are {found} for each image, expected {wanted}; run raydet export openvino again"
        )
    return graph


def _shape(port: Any) -> list[int]:
    """Return the shape of an input or output; −1 stands for any length."""
    return [axis.get_length() if axis.is_static else -1 for axis in port.get_partial_shape()]


def images_per_run(graph: Any) -> int:
    """Return the number of images that a graph takes at a time."""
    return _shape(graph.inputs[0])[0]


def compile_graph(graph: Any, *, precision: str, num_threads: int) -> Any:
    """Compile a graph for the CPU and return the `openvino.CompiledModel`.

    Args:
        graph: An `openvino.Model`.
        precision: Precision of all layers that are not quantised: fp32 or bf16.
        num_threads: Number of compute threads.
    """
    settings = {
        # By default OpenVINO uses bf16 on every CPU that supports it.
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": 1,
        # With pinning, several workers on one machine would share the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    return openvino_package().Core().compile_model(graph, "CPU", settings)
