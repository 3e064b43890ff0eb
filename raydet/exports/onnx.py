"""A checkpoint as one ONNX file, checked against torch before it is written."""

import io
import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from raydet import storage
from raydet.checkpoints import read_checkpoint
from raydet.config import ExportOnnxConfig
from raydet.detector import Detector, quiet
from raydet.errors import RunError, UserError
from raydet.exports import check_sizes, require_packages
from raydet.exports.graph import OUTPUT_NAMES, example_inputs, fixed_size_hw, input_names, traceable
from raydet.geometry import SizeHW
from raydet.models import build_detector, load_detector

OPSET = 17
"""Of the ONNX standard, 2022: old enough for today's runtimes, and it can sample between pixels."""

MAX_DIFFERENCE = 1e-3
"""Between the file's and torch's scores and boxes, the latter in parts of the image's side."""

_CHECKED_BATCHES = (1, 3)


@dataclass(frozen=True)
class OnnxExportReport:
    """What was written.

    Attributes:
        path: The file.
        num_bytes: Its size.
        opset: Of the ONNX standard.
        input_names: `pixel_values` float32 [B, 3, H, W] and perhaps `pixel_mask` int64 [B, H, W].
        image_size_hw: Height and width in pixels that it takes; None where it takes any.
        num_classes: Classes that it knows; logits may have one more, "no object".
        max_difference: From torch's scores and boxes (parts of the image's side) on random pictures.
    """

    path: str
    num_bytes: int
    opset: int
    input_names: tuple[str, ...]
    image_size_hw: SizeHW | None
    num_classes: int
    max_difference: float

    def lines(self) -> list[str]:
        """The report for the screen."""
        size = (
            "any height and width" if self.image_size_hw is None else f"{self.image_size_hw[0]}×{self.image_size_hw[1]}"
        )
        return [
            f"{self.path}: {self.num_bytes / 1e6:.1f} MB, ONNX opset {self.opset}, {self.num_classes} classes",
            f"takes {', '.join(self.input_names)}: any number of images, {size}; gives {', '.join(OUTPUT_NAMES)}",
            f"scores and boxes within {self.max_difference:.1e} of torch's",
        ]


def export_onnx(config: ExportOnnxConfig) -> OnnxExportReport:
    """Writes a detector as one ONNX file, whole or not at all.

    It takes normalised pixels and gives the raw `logits` [B, Q, C] and `pred_boxes` [B, Q, 4], centre form in parts of
    the image without its padding; the number of images is free. Its metadata hold, as JSON, what is needed around
    it: `categories`, `image_size_hw`, `image_mean`, `image_std`, `rescale_factor`, and `raydet_version`.

    It runs beside torch on random pictures before it is written. A file that is there is replaced.

    Raises:
        UserError: No such model, one that cannot be exported so, or a package is missing.
        RunError: The graph's answers differ from torch's by more than `MAX_DIFFERENCE`.
    """
    require_packages("onnx")
    checkpoint, out, image_size = config.checkpoint, storage.absolute_uri(config.out), config.image_size
    if not out.endswith(".onnx"):
        raise UserError(f"out must be the name of a file that ends in .onnx, got {out}")
    if image_size is None:
        detector = load_detector(checkpoint)
    else:
        # Made as for training at this size: position codes and anchors are not laid out for the old one.
        categories = read_checkpoint(checkpoint).categories
        detector = build_detector(checkpoint, categories, image_size=image_size, seed=0)
        detector.model.eval()
    data = to_onnx(detector, where=checkpoint, remedy="give image_size")
    difference = _difference(detector, data)
    if not difference <= MAX_DIFFERENCE:
        raise RunError(
            f"the ONNX graph of {checkpoint} answers otherwise than torch does: scores or boxes differ by "
            f"{difference:.1e}, more than {MAX_DIFFERENCE:.0e}; nothing was written"
        )
    storage.write_bytes(out, data)
    return OnnxExportReport(
        out, len(data), OPSET, input_names(detector), fixed_size_hw(detector), len(detector.categories), difference
    )


def to_onnx(detector: Detector, *, where: str, remedy: str) -> bytes:
    """Traces a detector on the CPU.

    Args:
        detector: In evaluation mode.
        where: Its checkpoint, for messages.
        remedy: What would be right for a model that cannot be exported, for messages.

    Returns:
        The content of an ONNX file, with metadata.

    Raises:
        UserError: Images of this model have many sizes, and its graph works at one only.
    """
    import onnx

    size_hw = fixed_size_hw(detector)
    check_sizes(detector.family.model_type, keeps_aspect=size_hw is None, where=where, remedy=remedy)
    names = input_names(detector)
    open_axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in (*names, *OUTPUT_NAMES)}
    if size_hw is None:
        open_axes["pixel_values"] |= {2: "height", 3: "width"}
        if "pixel_mask" in names:
            open_axes["pixel_mask"] |= {1: "height", 2: "width"}
    buffer = io.BytesIO()
    with quiet(), torch.no_grad(), traceable(detector) as graph:
        # By tracing: the exporter that reads the program itself takes minutes for these models.
        torch.onnx.export(
            graph,
            example_inputs(detector, 2, seed=0),
            buffer,  # type: ignore[arg-type] # it is for files of the other exporter that the hint speaks
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


def open_session(graph: bytes, *, num_threads: int) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        graph: The content of an ONNX file.
        num_threads: To compute with.
    """
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait would take the cores from those that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _metadata(detector: Detector) -> dict[str, str]:
    processor = detector.processor
    content = {
        "raydet_version": version("raydet"),
        "model_type": detector.family.model_type,
        "categories": [{"id": item.id, "name": item.name} for item in detector.categories],
        "image_size_hw": fixed_size_hw(detector),
        "resize": detector.resize_rule.to_dict(),
        "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
        "image_mean": list(processor.image_mean) if processor.do_normalize else [0.0, 0.0, 0.0],
        "image_std": list(processor.image_std) if processor.do_normalize else [1.0, 1.0, 1.0],
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}


def _difference(detector: Detector, graph: bytes) -> float:
    """The largest difference between the answers of torch and of a graph, over random batches of 1 and of 3."""
    session = open_session(graph, num_threads=torch.get_num_threads())
    worst = 0.0
    for batch_size in _CHECKED_BATCHES:
        inputs = example_inputs(detector, batch_size, seed=batch_size)
        named = dict(zip(input_names(detector), inputs, strict=True))
        theirs = session.run(OUTPUT_NAMES, {name: value.numpy() for name, value in named.items()})
        with torch.inference_mode():
            outputs = detector.model(**named)
        ours = (outputs.logits, outputs.pred_boxes)
        for mine, other in zip(
            _answers(detector, *ours), _answers(detector, *map(torch.from_numpy, theirs)), strict=True
        ):
            worst = max(worst, _distance(mine, other))
    return worst


def _answers(detector: Detector, logits: Tensor, boxes: Tensor) -> Any:
    """float64 [B, Q, C + 4]: scores of the classes, and boxes."""
    scores = logits.softmax(-1)[..., :-1] if detector.family.softmax else logits.sigmoid()
    return torch.cat([scores, boxes], dim=-1).double().numpy()


def _distance(mine: Any, other: Any) -> float:
    """The largest difference between the queries of an image, each with its own partner.

    Families that choose their queries may list them in another order, and the last ones chosen may be others, where
    rounding decides; so the lower half by score is left out.
    """
    assert mine.shape == other.shape, f"{mine.shape} answers are not {other.shape}"
    if not np.isfinite(other).all():
        return float("inf")
    between = np.abs(mine[:, None] - other[None]).max(axis=-1)
    rows, columns = linear_sum_assignment(between)
    best = np.argsort(-mine[:, :-4].max(axis=-1))[: max(1, len(mine) // 2)]
    return float(between[rows, columns][best].max())
