"""`export_openvino()`: checkpoint → a folder that `predict --engine openvino` runs without the checkpoint."""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from raydet.common.console import Console
from raydet.common.display.progress import Progress
from raydet.common.notebook.showing import Shown
from raydet.common.packages import require_packages
from raydet.common.redaction import without_secrets
from raydet.common.threads import available_cpus
from raydet.common.version import __version__
from raydet.config import ExportOpenvinoConfig
from raydet.config.fields import with_options
from raydet.engines.engine import TORCH_INSTEAD
from raydet.engines.in_memory.loaded import load
from raydet.engines.openvino.engine import OpenVinoEngine
from raydet.engines.openvino.graph import compile_graph, images_per_run, openvino_package, trace, write_graph
from raydet.exports.openvino.proof import Int8Proof
from raydet.exports.pixels_in import DETECTIONS, with_pixels_in
from raydet.exports.receipt import (
    Detect,
    Receipt,
    class_indices,
    compare,
    detect_from_pixels,
    detect_with,
    difference_from_torch,
)
from raydet.models.checkpoints import GRAPH_FILES, OWN_FILE, read_checkpoint
from raydet.models.detector import Detector
from raydet.models.geometry import SizeHW
from raydet.models.graph import fixed_size_hw, input_names
from raydet.models.loading import load_detector
from raydet.models.onnx import to_onnx
from raydet.tables import storage
from raydet.tables.new_output import new_folder
from raydet.tables.table import Table, open_table

PIXELS_IN_FILE = "pixels_in.xml"
_KEY = "openvino"
"""Entry of the export in `raydet.json`."""


@dataclass(frozen=True, kw_only=True)
class OpenVinoExportReport(Shown):
    """Result of an export to OpenVINO.

    Attributes:
        out: The folder; None if INT8 was refused, and nothing was written.
        num_bytes: Size of the graph's files in bytes.
        input_names: `pixel_values` float32 [N, 3, H, W] and, for some models, `pixel_mask` int64 [N, H, W].
        images_per_run: Number of images N that the graph takes at a time.
        image_size_hw: Required height and width in pixels; None if any size works.
        num_classes: Number of classes; logits may have one more, "no object".
        max_difference: Largest difference of the float graph from torch in scores and boxes (fractions of the image's
            sides) on random images.
        receipt: With `check_data`, agreement with the checkpoint on its images.
        int8: With `int8`, the figures of what was tried.
    """

    out: str | None
    num_bytes: int
    input_names: tuple[str, ...]
    images_per_run: int
    image_size_hw: SizeHW | None
    num_classes: int
    max_difference: float
    receipt: Receipt | None = None
    int8: Int8Proof | None = None

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 1 if INT8 was refused."""
        return int(self.out is None)

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        size = "×".join(map(str, self.image_size_hw)) if self.image_size_hw else "any height and width"
        written = [
            f"{self.out}: {self.num_bytes / 1e6:.1f} MB, {self.num_classes} classes",
            f"inputs: {', '.join(self.input_names)} ({self.images_per_run} images at a time, {size})",
        ]
        return [
            *(written if self.out is not None else ()),
            f"largest difference of the float graph from torch in scores and boxes: {self.max_difference:.1e}",
            *(self.receipt.lines() if self.receipt else ()),
            *(self.int8.lines() if self.int8 else ()),
        ]


class _Refused(Exception):  # noqa: N818 - a result, not an error; it makes `new_folder` leave nothing
    """No INT8 graph passed."""


@with_options(ExportOpenvinoConfig)
def export_openvino(config: ExportOpenvinoConfig, *, console: Console | None = None) -> OpenVinoExportReport:
    """Write a detector as a folder with an OpenVINO graph, which appears when it is complete.

    The folder has the graph (`model.xml`, `model.bin`), the config and the image processor of the checkpoint, and
    `raydet.json` with the record of the export. `predict --engine openvino` and `raydet.load` run it. The graph accepts
    normalised pixels and returns raw `logits` [N, Q, C] and `pred_boxes` [N, Q, 4], cxcywh as fractions of the image
    without its padding. It is compared with torch on random images before it is written. With `pixels_in`, the folder
    also has the graph of `export_onnx` that accepts pictures and returns boxes, as `pixels_in.xml`. With `check_data`
    the graph detects the objects of a table beside the checkpoint.

    With `int8`, levels of quantisation are tried, from all layers in INT8 to those of the backbone only. The fastest
    graph is written for which the paired 95 % interval of the difference in AP, on the images of `truth`, excludes a
    loss of more than `max_ap_drop`. If there is none, or none is faster than float, nothing is written, and the report
    has the figures and the exit code 1.

    Raises:
        UserError: The model or a table does not exist, the model cannot be exported, `out` contains files, or a package
            is missing.
        RunError: The graph's outputs differ from torch's by more than 0.001.
    """
    require_packages("int8" if config.int8 else "openvino")
    if config.pixels_in:
        require_packages("onnx")
    names = ("check_data", "calibration", "truth")
    tables = {name: open_table(uri, "images") for name in names if (uri := getattr(config, name)) is not None}
    class_names = [category.name for category in read_checkpoint(config.checkpoint).categories]
    for name in {"check_data", "truth"} & tables.keys():
        class_indices(tables[name], class_names, config.checkpoint)
    try:
        with (
            new_folder(config.out, command="export openvino") as folder,
            (console or Console()).progress("loading the model") as progress,
        ):
            return _export(config, folder, tables, progress)
    except _Refused as refusal:
        report: OpenVinoExportReport = refusal.args[0]
        return report


def _export(
    config: ExportOpenvinoConfig, folder: Path, tables: dict[str, Table], progress: Progress
) -> OpenVinoExportReport:
    detector = load_detector(config.checkpoint)
    progress.begin("tracing the graph")
    graph = trace(detector, where=config.checkpoint, remedy=TORCH_INSTEAD)
    progress.begin("comparing the graph with torch")
    difference = difference_from_torch(
        detector,
        OpenVinoEngine(detector, graph, num_threads=available_cpus()).outputs_of,
        where=f"the OpenVINO graph of {config.checkpoint}",
    )
    proof = None
    if config.int8:
        from raydet.exports.openvino.trials import find_int8

        nn.Module.to(detector.model, "meta")  # OpenVINO holds the weights now
        chosen, proof = find_int8(detector, graph, config, tables, progress)
        graph = chosen or graph

    def report(receipt: Receipt | None = None) -> OpenVinoExportReport:
        is_refused = proof is not None and proof.taken is None
        return OpenVinoExportReport(
            out=None if is_refused else storage.absolute_uri(config.out),
            num_bytes=0 if is_refused else sum((folder / name).stat().st_size for name in GRAPH_FILES),
            input_names=input_names(detector),
            images_per_run=images_per_run(graph),
            image_size_hw=fixed_size_hw(detector),
            num_classes=len(detector.categories),
            max_difference=difference,
            receipt=receipt,
            int8=proof,
        )

    if proof is not None and proof.taken is None:
        raise _Refused(report())
    detector.save_description(str(folder))
    write_graph(graph, folder / GRAPH_FILES[0], fp16_weights=config.fp16_weights)
    if config.pixels_in:
        write_graph(_pixels_in(detector, config.checkpoint), folder / PIXELS_IN_FILE, fp16_weights=config.fp16_weights)
    receipt = None
    if "check_data" in tables:
        receipt = compare(_detector_in(folder), config.checkpoint, tables["check_data"], progress)
    finished = report(receipt)
    (folder / OWN_FILE).write_text(json.dumps({_KEY: _record(config, finished)}, indent=1))
    return finished


def _pixels_in(detector: Detector, checkpoint: str) -> Any:
    """Return the graph of `export onnx --pixels-in` as an `openvino.Model`."""
    onnx = with_pixels_in(to_onnx(detector, where=checkpoint, remedy=TORCH_INSTEAD), detector)
    return openvino_package().convert_model(io.BytesIO(onnx.SerializeToString()))


def _detector_in(folder: Path) -> Detect:
    """Return a function that runs the graph that was written into a folder: the one with pixels in, if there is one."""
    if not (folder / PIXELS_IN_FILE).exists():
        return detect_with(load(folder, engine="openvino", score_threshold=0.0))
    graph = openvino_package().Core().read_model(folder / PIXELS_IN_FILE)
    compiled = compile_graph(graph, precision="fp32", num_threads=available_cpus())

    def run(pictures: list[Any]) -> list[Any]:
        results = compiled(pictures)
        return [results[name] for name in DETECTIONS]

    return detect_from_pixels(run)


def _record(config: ExportOpenvinoConfig, report: OpenVinoExportReport) -> dict[str, Any]:
    """Return the entry of the export in `raydet.json`."""
    versions = {"raydet": __version__, "openvino": openvino_package().__version__}
    content = {name: value for name, value in asdict(report).items() if name != "out"}
    return {"checkpoint": without_secrets(config.checkpoint), "versions": versions, **content}
