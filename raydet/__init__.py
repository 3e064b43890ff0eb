"""raydet: fine-tune, run and measure DETR-family object detectors at scale on Ray.

One function and one config class per command: `raydet.train(raydet.TrainConfig(...))`, or with the options as keyword
arguments, `raydet.train(train_data=..., ...)`. `raydet.open_table` opens a table, `raydet.CocoAP` measures AP in any
evaluation loop, and `raydet.load(checkpoint)` detects objects in images in memory. Functions are loaded on first use,
because torch and ray take seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from raydet.cli.commands import COMMANDS as _COMMANDS
from raydet.common.errors import UserError
from raydet.common.version import __version__

if TYPE_CHECKING:  # for type checkers and editors; a test holds these names against the table of commands
    from raydet.browsing.browse import browse as browse
    from raydet.cli.demo import demo as demo
    from raydet.cli.doctor import doctor as doctor
    from raydet.cli.loop import loop as loop
    from raydet.cluster.forecast.plan import plan as plan
    from raydet.config import BrowseConfig as BrowseConfig
    from raydet.config import CompareConfig as CompareConfig
    from raydet.config import CropsConfig as CropsConfig
    from raydet.config import DemoConfig as DemoConfig
    from raydet.config import DoctorConfig as DoctorConfig
    from raydet.config import EvaluateConfig as EvaluateConfig
    from raydet.config import ExportCocoConfig as ExportCocoConfig
    from raydet.config import ExportCvatConfig as ExportCvatConfig
    from raydet.config import ExportLabelStudioConfig as ExportLabelStudioConfig
    from raydet.config import ExportOnnxConfig as ExportOnnxConfig
    from raydet.config import ExportOpenvinoConfig as ExportOpenvinoConfig
    from raydet.config import ExportVocConfig as ExportVocConfig
    from raydet.config import ExportYoloConfig as ExportYoloConfig
    from raydet.config import FitConfig as FitConfig
    from raydet.config import InspectConfig as InspectConfig
    from raydet.config import LoopConfig as LoopConfig
    from raydet.config import PlanConfig as PlanConfig
    from raydet.config import PredictConfig as PredictConfig
    from raydet.config import PrepareCocoConfig as PrepareCocoConfig
    from raydet.config import PrepareCsvConfig as PrepareCsvConfig
    from raydet.config import PrepareCvatConfig as PrepareCvatConfig
    from raydet.config import PrepareDetectionsConfig as PrepareDetectionsConfig
    from raydet.config import PrepareHubConfig as PrepareHubConfig
    from raydet.config import PrepareImagesConfig as PrepareImagesConfig
    from raydet.config import PrepareLabelStudioConfig as PrepareLabelStudioConfig
    from raydet.config import PrepareShapesConfig as PrepareShapesConfig
    from raydet.config import PrepareVocConfig as PrepareVocConfig
    from raydet.config import PrepareYoloConfig as PrepareYoloConfig
    from raydet.config import PushConfig as PushConfig
    from raydet.config import ReportConfig as ReportConfig
    from raydet.config import SelectConfig as SelectConfig
    from raydet.config import TrainConfig as TrainConfig
    from raydet.config import TuneConfig as TuneConfig
    from raydet.engines.in_memory.loaded import load as load
    from raydet.exports.coco import export_coco as export_coco
    from raydet.exports.cvat import export_cvat as export_cvat
    from raydet.exports.hub import push as push
    from raydet.exports.label_studio import export_label_studio as export_label_studio
    from raydet.exports.onnx import export_onnx as export_onnx
    from raydet.exports.openvino.export import export_openvino as export_openvino
    from raydet.exports.voc import export_voc as export_voc
    from raydet.exports.yolo import export_yolo as export_yolo
    from raydet.inspection.inspect import inspect as inspect
    from raydet.measuring.coco_ap import CocoAP as CocoAP
    from raydet.measuring.compare import compare as compare
    from raydet.measuring.evaluate import evaluate as evaluate
    from raydet.measuring.fitting.fit import fit as fit
    from raydet.preparation.prepare import prepare_coco as prepare_coco
    from raydet.preparation.prepare import prepare_csv as prepare_csv
    from raydet.preparation.prepare import prepare_cvat as prepare_cvat
    from raydet.preparation.prepare import prepare_detections as prepare_detections
    from raydet.preparation.prepare import prepare_hub as prepare_hub
    from raydet.preparation.prepare import prepare_images as prepare_images
    from raydet.preparation.prepare import prepare_label_studio as prepare_label_studio
    from raydet.preparation.prepare import prepare_shapes as prepare_shapes
    from raydet.preparation.prepare import prepare_voc as prepare_voc
    from raydet.preparation.prepare import prepare_yolo as prepare_yolo
    from raydet.reporting.report import report as report
    from raydet.scoring.predict import predict as predict
    from raydet.second_looks.crops import crops as crops
    from raydet.selection.select import select as select
    from raydet.tables.table import open_table as open_table
    from raydet.training.train import train as train
    from raydet.tuning.tune import tune as tune

_OTHERS = {
    "CocoAP": "raydet.measuring.coco_ap",
    "load": "raydet.engines.in_memory.loaded",
    "open_table": "raydet.tables.table",
}
"""Public names that are not part of a command, and their modules."""

__all__ = [  # noqa: PLE0604
    "UserError",
    "__version__",
    *(command.config.__name__ for command in _COMMANDS.values()),
    *(command.function for command in _COMMANDS.values()),
    *_OTHERS,
]


def __getattr__(name: str) -> Any:
    if name in _OTHERS:
        return getattr(importlib.import_module(_OTHERS[name]), name)
    for command in _COMMANDS.values():
        if name == command.config.__name__:
            return command.config
        if name == command.function:
            return getattr(importlib.import_module(command.module), name)
    raise AttributeError(f"module 'raydet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
