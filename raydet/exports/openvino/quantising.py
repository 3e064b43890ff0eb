"""A graph and typical inputs → the same graph in INT8, by NNCF."""

import contextlib
import io
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydet.engines.openvino.engine import GraphInputs
from raydet.engines.openvino.graph import openvino_package
from raydet.exports.openvino.levels import LAYERS, MOVING, nodes_of

_CPU_INFO = Path("/proc/cpuinfo")
_INSTRUCTIONS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16"
)  # fmt: skip
"""Instructions that decide how fast OpenVINO runs INT8 and bf16."""


def quantise(graph: Any, inputs: Iterable[GraphInputs], num_runs: int, float_nodes: Sequence[str]) -> Any:
    """Return a quantised copy of an `openvino.Model`.

    Activations get one scale a tensor, weights one a channel, symmetric where that loses nothing; biases are corrected.

    Args:
        graph: Graph in float.
        inputs: Inputs to calibrate with; iterated over several times.
        num_runs: Number of them.
        float_nodes: Names of the nodes that stay in float.
    """
    nncf = _nncf()
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(
            graph.clone(),
            nncf.Dataset(inputs),
            subset_size=num_runs,
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=list(float_nodes), validate=False),
        )


def _nncf() -> Any:
    openvino_package()  # without telemetry, which NNCF would use too
    # It warns of the lack of CUDA when NNCF loads the part for torch.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


def layers_by_precision(graph: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the modules of the layers of a quantised graph that compute in INT8, and those in float, sorted.

    A layer that NNCF left out by itself, because its inputs are no tensor that can be quantised, is one in float.
    """
    quantised = {
        node.get_friendly_name()
        for node in graph.get_ops()
        if node.get_type_name() in LAYERS and all(_is_quantised(node.input_value(port).get_node()) for port in range(2))
    }
    layers = [node for node in nodes_of(graph) if node.kind in LAYERS]
    sides = ([node for node in layers if (node.name in quantised) is wanted] for wanted in (True, False))
    in_int8, in_float = (tuple(sorted(node.module for node in side)) for side in sides)
    return in_int8, in_float


def _is_quantised(node: Any) -> bool:
    """Return True if a value comes from a quantiser, directly or through nodes that only move values."""
    while node.get_type_name() in MOVING:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize") or _is_dequantised(node)


def _is_dequantised(node: Any) -> bool:
    """Return True for the scale of weights that are stored in INT8."""
    while node.get_type_name() in ("Multiply", "Subtract"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Convert" and node.get_input_element_type(0).get_type_name() in ("i8", "u8"))


def cpu_instructions() -> tuple[str, ...]:
    """Return those instructions of this machine's CPU that matter for INT8 and bf16; empty where Linux does not say."""
    if sys.platform != "linux" or not _CPU_INFO.exists():
        return ()
    flags = next((line for line in _CPU_INFO.read_text().splitlines() if line.startswith("flags")), "")
    found = set(flags.split())
    return tuple(name for name in _INSTRUCTIONS if name in found)


def supports_bf16() -> bool:
    """Return True if OpenVINO computes in bf16 on this machine's CPU."""
    return "BF16" in openvino_package().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def kernels_of(compiled: Any) -> Mapping[str, int]:
    """Return the kernels that a compiled graph runs its layers with, and the number of layers of each."""
    kinds = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kernels = [str(info["primitiveType"].value) for info in infos if str(info["layerType"].value) in kinds]
    return dict(Counter(kernels).most_common())
