"""A checkpoint as one ONNX file, checked against torch before it is written."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from raydet.common.errors import RunError
from raydet.common.packages import require_packages
from raydet.config import ExportOnnxConfig
from raydet.models.checkpoints import read_checkpoint
from raydet.models.detector import Detector
from raydet.models.geometry import SizeHW
from raydet.models.graph import OUTPUT_NAMES, example_inputs, fixed_size_hw, input_names
from raydet.models.loading import build_detector, load_detector
from raydet.models.onnx import OPSET, open_session, to_onnx
from raydet.tables import storage
from raydet.tables.new_output import new_file

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
            f"inputs: {', '.join(self.input_names)} (any number of images, {size}); outputs: {', '.join(OUTPUT_NAMES)}",
            f"largest difference from torch in scores and boxes: {self.max_difference:.1e}",
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
    with new_file(out, command="export onnx", endings=(".onnx",)) as file:
        detector, data, difference = _build(checkpoint, image_size)
        file.write(data)
    return OnnxExportReport(
        out, len(data), OPSET, input_names(detector), fixed_size_hw(detector), len(detector.categories), difference
    )


def _build(checkpoint: str, image_size: int | None) -> tuple[Detector, bytes, float]:
    """Makes the detector and its ONNX file, and measures how far their answers differ."""
    if image_size is None:
        detector = load_detector(checkpoint)
    else:
        # Made as for training at this size: position codes and anchors are not laid out for the old one.
        categories = read_checkpoint(checkpoint).categories
        detector = build_detector(checkpoint, categories, image_size=image_size, seed=0)
        detector.model.eval()
    data = to_onnx(detector, where=checkpoint, remedy="give --image-size")
    difference = _difference(detector, data)
    if not difference <= MAX_DIFFERENCE:
        raise RunError(
            f"the ONNX graph of {checkpoint} answers otherwise than torch does: scores or boxes differ by "
            f"{difference:.1e}, more than {MAX_DIFFERENCE:.0e}; nothing was written"
        )
    return detector, data, difference


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
