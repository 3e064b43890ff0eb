"""Checkpoint → one ONNX file, checked against torch before it is written."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from raydet.common.console import Console
from raydet.common.display.progress import Progress
from raydet.common.notebook.showing import Shown
from raydet.common.packages import require_packages
from raydet.common.redaction import without_secrets
from raydet.config import ExportOnnxConfig
from raydet.config.fields import with_options
from raydet.exports.pixels_in import DETECTIONS, PIXELS, with_pixels_in
from raydet.exports.pixels_in import OPSET as PIXELS_IN_OPSET
from raydet.exports.receipt import Receipt, Run, compare, detect_from_pixels, difference_from_torch
from raydet.models.checkpoints import read_checkpoint
from raydet.models.detector import Detector
from raydet.models.geometry import SizeHW
from raydet.models.graph import OUTPUT_NAMES, fixed_size_hw, input_names
from raydet.models.loading import build_detector, load_detector
from raydet.models.onnx import OPSET, open_session, to_onnx
from raydet.tables import storage
from raydet.tables.new_output import new_file
from raydet.tables.table import open_table


@dataclass(frozen=True)
class OnnxExportReport(Shown):
    """Result of an export to ONNX.

    Attributes:
        num_bytes: Size of the file in bytes.
        input_names: `pixel_values` float32 [B, 3, H, W] and, for some models, `pixel_mask` int64 [B, H, W]; or
            `pixels` uint8 [B, H, W, 3].
        image_size_hw: Required height and width in pixels; None if any size works.
        num_classes: Number of classes; logits may have one more, "no object".
        max_difference: Largest difference from torch in scores and boxes (fractions of the image's sides) on random
            images; with `pixels_in`, of the model without the steps around it.
        receipt: With `check_data`, agreement with the checkpoint on its images.
    """

    path: str
    num_bytes: int
    opset: int
    input_names: tuple[str, ...]
    image_size_hw: SizeHW | None
    num_classes: int
    max_difference: float
    receipt: Receipt | None = None

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        size = (
            "any height and width" if self.image_size_hw is None else f"{self.image_size_hw[0]}×{self.image_size_hw[1]}"
        )
        outputs = DETECTIONS if self.input_names == (PIXELS,) else OUTPUT_NAMES
        return [
            f"{self.path}: {self.num_bytes / 1e6:.1f} MB, ONNX opset {self.opset}, {self.num_classes} classes",
            f"inputs: {', '.join(self.input_names)} (any number of images, {size}); outputs: {', '.join(outputs)}",
            f"largest difference from torch in scores and boxes: {self.max_difference:.1e}",
            *(self.receipt.lines() if self.receipt else ()),
        ]


@with_options(ExportOnnxConfig)
def export_onnx(config: ExportOnnxConfig, *, console: Console | None = None) -> OnnxExportReport:
    """Write a detector as one ONNX file, atomically.

    The graph accepts normalised pixels and returns raw `logits` [B, Q, C] and `pred_boxes` [B, Q, 4], cxcywh as
    fractions of the image without its padding; the batch size B is dynamic. Its metadata holds, as JSON, the values for
    pre- and post-processing: `categories`, `image_size_hw`, `image_mean`, `image_std`, `rescale_factor`, and
    `raydet_version`.

    With `pixels_in` it accepts pictures instead, `pixels` uint8 [B, height, width, 3] in RGB, all of one size, and
    returns `boxes_xyxy` [B, K, 4] in pixels of the picture, `scores` [B, K] and `labels` [B, K], the best first. With
    `check_data` it detects the objects of a table beside the checkpoint, and `OUT` with the ending `.receipt.json` has
    the result.

    The graph is compared with torch on random images before it is written. An existing file is replaced.

    Raises:
        UserError: The model or the table does not exist, the model cannot be exported, or a package is missing.
        RunError: The graph's outputs differ from torch's by more than `MAX_DIFFERENCE`.
    """
    require_packages("onnx")
    checkpoint, out, image_size = config.checkpoint, storage.absolute_uri(config.out), config.image_size
    table = None if config.check_data is None else open_table(config.check_data, "images")
    receipt = None
    with (
        new_file(out, command="export onnx", endings=(".onnx",)) as file,
        (console or Console()).progress("loading the model") as progress,
    ):
        detector, data, difference = _build(checkpoint, image_size, progress)
        if config.pixels_in:
            data = with_pixels_in(data, detector).SerializeToString()
        if table is not None:
            detect = detect_from_pixels(_runner(data, DETECTIONS, (PIXELS,)))
            receipt = compare(detect, checkpoint, table, progress)
        file.write(data)
    if receipt is not None:
        content = json.dumps({"checkpoint": without_secrets(checkpoint), **asdict(receipt)}, indent=2)
        storage.write_bytes(out.removesuffix(".onnx") + ".receipt.json", content.encode())
    return OnnxExportReport(
        out,
        len(data),
        PIXELS_IN_OPSET if config.pixels_in else OPSET,
        (PIXELS,) if config.pixels_in else input_names(detector),
        None if config.pixels_in else fixed_size_hw(detector),
        len(detector.categories),
        difference,
        receipt,
    )


def _build(checkpoint: str, image_size: int | None, progress: Progress) -> tuple[Detector, bytes, float]:
    """Build the detector and its ONNX graph, and measure the largest difference between their outputs."""
    if image_size is None:
        detector = load_detector(checkpoint)
    else:
        # Built as for training at this size, because positional encodings and anchors depend on it.
        categories = read_checkpoint(checkpoint).categories
        detector = build_detector(checkpoint, categories, image_size=image_size, seed=0)
        detector.model.eval()
    progress.begin("tracing the graph")
    data = to_onnx(detector, where=checkpoint, remedy="set --image-size")
    progress.begin("comparing the graph with torch")
    run = _runner(data, OUTPUT_NAMES, input_names(detector))
    difference = difference_from_torch(detector, run, where=f"the ONNX graph of {checkpoint}")
    return detector, data, difference


def _runner(graph: bytes, outputs: Sequence[str], inputs: Sequence[str]) -> Run:
    session = open_session(graph, num_threads=torch.get_num_threads())
    return lambda arrays: session.run(outputs, dict(zip(inputs, arrays, strict=True)))
