"""A detector as an ONNX graph, and a session that runs it."""

import importlib
import io
import json
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from raydet.common.errors import UserError
from raydet.common.version import __version__
from raydet.models.detector import Detector, quiet
from raydet.models.families import check_graph_sizes
from raydet.models.graph import OUTPUT_NAMES, example_inputs, fixed_size_hw, input_names, traceable

OPSET = 17
"""From 2022: supported by current runtimes, and recent enough to have the operator GridSample."""


def to_onnx(detector: Detector, *, where: str, remedy: str) -> bytes:
    """Trace a detector on the CPU.

    Args:
        detector: Detector in evaluation mode.
        where: Its checkpoint, for the error message.
        remedy: The end of the error message: what the user can do instead.

    Returns:
        Content of an ONNX file, with metadata.

    Raises:
        UserError: The images of this model vary in size, and its graph works at one size only.
    """
    import onnx

    size_hw = fixed_size_hw(detector)
    check_graph_sizes(detector.family, keeps_aspect=size_hw is None, where=where, remedy=remedy)
    names = input_names(detector)
    open_axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in (*names, *OUTPUT_NAMES)}
    if size_hw is None:
        open_axes["pixel_values"] |= {2: "height", 3: "width"}
        if "pixel_mask" in names:
            open_axes["pixel_mask"] |= {1: "height", 2: "width"}
    buffer = io.BytesIO()
    with quiet(), torch.no_grad(), traceable(detector) as graph:
        # The tracing exporter: the newer one takes minutes for these models.
        torch.onnx.export(
            graph,
            example_inputs(detector, 2, seed=0),
            buffer,  # type: ignore[arg-type] # the type hint describes the newer exporter only
            input_names=list(names),
            output_names=list(OUTPUT_NAMES),
            dynamic_axes=open_axes,
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, _metadata(detector))
    data: bytes = model.SerializeToString()
    return data


def open_session(graph: bytes, *, num_threads: int, device: torch.device | None = None) -> Any:
    """Open an ONNX Runtime session.

    Args:
        graph: Content of an ONNX file.
        num_threads: Number of compute threads on the CPU.
        device: cpu or cuda; the CPU by default.

    Raises:
        UserError: ONNX Runtime cannot use the GPU.
    """
    import onnxruntime

    providers = execution_providers(onnxruntime.get_available_providers(), device or torch.device("cpu"))
    if len(providers) > 1:
        onnxruntime.preload_dlls()  # CUDA and cuDNN as torch brings them
    if len(providers) > 2:
        importlib.import_module("tensorrt")  # loads its libraries
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads would take the cores from the threads that decode images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=providers)
    if len(providers) > 1 and "CUDAExecutionProvider" not in session.get_providers():
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load its CUDA provider; install the CUDA and cuDNN it was "
            "built for, or set --no-use-gpu"
        )
    return session


def execution_providers(available: Collection[str], device: torch.device) -> list[Any]:
    """Choose ONNX Runtime's execution providers for a device, the first one first.

    On a GPU TensorRT comes before CUDA if its Python package is installed: ONNX Runtime lists the provider without the
    library too, and would print an error.
    """
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    place = {"device_id": str(device.index or 0)}
    providers: list[Any] = []
    if "TensorrtExecutionProvider" in available and find_spec("tensorrt") is not None:
        # Building an engine takes minutes.
        cache = str(Path.home() / ".cache" / "raydet" / "tensorrt")
        own = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": cache}
        providers.append(("TensorrtExecutionProvider", place | own))
    return [*providers, ("CUDAExecutionProvider", place), "CPUExecutionProvider"]


def _metadata(detector: Detector) -> dict[str, str]:
    processor = detector.processor
    content = {
        "raydet_version": __version__,
        "model_type": detector.family.model_type,
        "categories": [{"id": item.id, "name": item.name} for item in detector.categories],
        "image_size_hw": fixed_size_hw(detector),
        "resize": detector.resize_rule.to_dict(),
        "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
        "image_mean": list(processor.image_mean) if processor.do_normalize else [0.0, 0.0, 0.0],
        "image_std": list(processor.image_std) if processor.do_normalize else [1.0, 1.0, 1.0],
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}
